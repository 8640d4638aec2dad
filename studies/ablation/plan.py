"""Which recipes are compared: `variants.yaml` beside this file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, model_validator

from facemllm.settings.base import Positive, Section

FILE = Path(__file__).with_name("variants.yaml")


class Variant(Section):
    """A recipe: `set` are overrides as of --set, `stages` those it trains, in order (none: all).

    `says` is what it is, in a few words. `control` names a variant that it is held against beside the baseline.
    """

    says: Annotated[str, Field(min_length=1)]
    set: list[str]
    stages: list[str] = []
    control: str = ""


class Ablation(Section):
    """The variants, from how many seeds each, and which one the others are held against."""

    seeds: Positive
    baseline: str
    variants: Annotated[dict[str, Variant], Field(min_length=1)]

    @model_validator(mode="after")
    def _knows_its_baseline(self) -> Ablation:
        for name in (self.baseline, *(variant.control for variant in self.variants.values() if variant.control)):
            if name not in self.variants:
                raise ValueError(f"{name!r} is none of the variants {', '.join(self.variants)}")
        return self


def shipped() -> dict[str, Any]:
    """What `variants.yaml` holds."""
    plan: dict[str, Any] = yaml.safe_load(FILE.read_text("utf-8"))
    return plan


def ablation() -> Ablation:
    """The plan of `variants.yaml`. Raises ValueError when it is none."""
    return Ablation.model_validate(shipped())
