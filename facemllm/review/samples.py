"""Faces to look at: pictures and what was said of them, beside what the champion said where it said otherwise."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from facemllm.report.web import plain
from facemllm.review.fields import Object, is_digest, mapping, number, rows, said, text

_PICTURE = re.compile(r"samples/[A-Za-z0-9_-]{1,40}\.(jpg|png)")


@dataclass(frozen=True)
class Said:
    """One question about a face: what this model, the champion and the label say; a verdict is good, bad or none."""

    question: str
    answer: str
    verdict: str
    champion: str
    champion_verdict: str
    label: str


@dataclass(frozen=True)
class Sample:
    """A face: the name of its picture in the bundle (empty: not shown), and what was said."""

    image: str
    image_id: str
    answers: tuple[Said, ...]


@dataclass(frozen=True)
class Samples:
    """The faces of a bundle; `compared` with the champion, else with the labels; how many were `withheld`."""

    faces: tuple[Sample, ...]
    compared: bool
    withheld: int


def read(bundle: Object) -> Samples:
    """The faces that a bundle shows."""
    found = mapping(bundle, "samples")
    withheld = number(found.get("withheld")) or 0.0
    return Samples(tuple(map(_sample, rows(found.get("faces")))), found.get("against") == "champion", int(withheld))


def pictures(bundle: Object) -> Iterator[str]:
    """The names of the pictures."""
    return (one.image for one in read(bundle).faces if one.image)


def _sample(face: Object) -> Sample:
    name = face.get("file")
    shown = isinstance(name, str) and _PICTURE.fullmatch(name) is not None and is_digest(face.get("sha256"))
    return Sample(str(name) if shown else "", text(face, "image_id"), tuple(map(_said, rows(face.get("answers")))))


def _said(answer: Object) -> Said:
    task, item = text(answer, "task"), text(answer, "item")
    label = answer.get("label")
    mine, theirs = answer.get("candidate"), answer.get("champion")
    return Said(item or task, _words(mine), _right(mine, label), _words(theirs), _right(theirs, label), said(label))


def _words(answer: object) -> str:
    return "–" if answer is None else plain(answer)


def _right(answer: object, label: object) -> str:
    """Whether an answer in words is the label; of numbers, which are near or far, nothing is said."""
    text = str(label)
    if label is None or text.replace(".", "", 1).lstrip("-").isdigit():
        return ""
    return "good" if answer == label else "bad"
