"""What one rank has to do of a stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from facemllm.settings import Lora, Model, Stage, Training

_PASSED = ("row_tokens", "micro_images", "feature_cache", "recompute", "compile", "divergence")


@dataclass(frozen=True)
class Job:
    """One rank's part of one stage."""

    name: str
    stage: Stage
    lora: Lora
    seed: int
    key: str  # digest of what the stage is made from; a checkpoint of another key is refused
    model: Model  # settings of the model's branches
    precision: str = "fp32"  # bf16 or fp32, already decided
    device: str = "cpu"
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    checkpoint_every: int = 200
    log_every: int = 20
    made_from: Mapping[str, Any] = field(default_factory=dict)  # what `key` is the digest of
    sharded: bool = False  # the model is dealt out among the ranks
    table: str = ""  # digest of the conversations
    cache: Path | None = None  # where tower features may be kept
    row_tokens: int = 0  # this and the following: as in settings.Training
    micro_images: int = 0
    feature_cache: bool = True
    recompute: bool = False
    compile: bool = False
    divergence: float = 0.0

    @property
    def part(self) -> slice:
        """This rank's faces of the global batch: the slices of all ranks are disjoint and cover it."""
        count = self.stage.batch_images
        return slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)


def passed(training: Training) -> dict[str, Any]:
    """The fields of a job that are settings of the same name."""
    return {name: getattr(training, name) for name in _PASSED}
