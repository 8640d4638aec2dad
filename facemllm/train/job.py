"""What one rank has to do of a stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from facemllm.settings import Lora, Model, Settings, Stage

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
    row_tokens: int = 0  # this and the following: as in settings.Train
    micro_images: int = 0
    feature_cache: bool = True
    recompute: bool = False
    compile: bool = False
    divergence: float = 0.0

    @classmethod
    def of(cls, settings: Settings, stage: str, key: str, device: str, **where: Any) -> Job:
        """The job of a stage by the settings; `where` are the other fields, of the rank and of its run."""
        training = settings.train
        return cls(
            name=stage,
            stage=settings.stages()[stage],
            lora=training.lora,
            seed=settings.seed,
            key=key,
            model=settings.model,
            precision=decide_precision(training.precision, device),
            device=device,
            checkpoint_every=training.checkpoint_every,
            **{name: getattr(training, name) for name in _PASSED},
            **where,
        )

    @property
    def part(self) -> slice:
        """This rank's faces of the global batch: the slices of all ranks are disjoint and cover it."""
        count = self.stage.batch_images
        return slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)


def decide_precision(wanted: str, device: str) -> str:
    """`auto` becomes bf16 where the processor multiplies it natively, else fp32."""
    import torch

    if wanted != "auto":
        return wanted
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"
