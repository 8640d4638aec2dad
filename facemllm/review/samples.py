"""Faces to look at: pictures and what was said of them, beside what the champion said where it said otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from facemllm.signing.decisions import Decisions


@dataclass(frozen=True)
class Said:
    """One question about a face: the answers of both models and the truth, each with its verdict (good, bad)."""

    question: str
    answer: str
    verdict: str
    champion: str
    champion_verdict: str
    truth: str


@dataclass(frozen=True)
class Sample:
    """A face: the name of its picture in the bundle, whether the champion was asked too, and what was said."""

    image: str
    compared: bool
    answers: tuple[Said, ...]


def samples(decisions: Decisions, bundle: str, raw: Mapping[str, Any]) -> tuple[Sample, ...]:
    """The faces of a bundle; none where it holds none."""
    return ()
