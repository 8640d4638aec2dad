"""What a user is told of a running stage, and when it must stop.

Speeds are smoothed over logs (exponential moving average), so that a remaining time does not jump. A stage stops when
its loss is not finite, when it has diverged, when a branch finds nothing to learn from, when a module it declares gets
no gradient, or when nothing has changed.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from facemllm.core import cost
from facemllm.errors import UserError
from facemllm.model.branches import NO_MAP
from facemllm.model.families import family_class
from facemllm.settings import Stage
from facemllm.tasks.characteristics import UNKNOWN
from facemllm.train.checkpoint import local_part
from facemllm.train.corpus import FaceDataset
from facemllm.train.distributed import total_norm
from facemllm.train.stage import StageRun

_SMOOTHING = 0.3
_WINDOW = 50
_NAMED = 3
FEW = 0.01
"""A smaller share of faces with a map is reported."""


class Throughput:
    """Smoothed speeds of a stage that goes on from step `done`, from counts of what has been done."""

    def __init__(self, run: StageRun, done: int, flops_per_token: float) -> None:
        self.steps, self.device, self.flops_per_token = run.stage.steps, run.device, flops_per_token
        peak = cost.peak_flops(run.device, run.precision)
        self.peak = None if peak is None else peak * run.world_size
        self._mark, self.done = time.perf_counter(), done
        self._speeds: dict[str, float] = {}

    def measure(self, done: int, counts: dict[str, int]) -> dict[str, float]:
        """Metrics at step `done`; `counts` are of the steps since the last call."""
        now = time.perf_counter()
        seconds = max(now - self._mark, 1e-9)
        counts = {"steps": done - self.done, **counts}
        for name, count in counts.items():
            speed = count / seconds
            self._speeds[name] = speed + (1 - _SMOOTHING) * (self._speeds.get(name, speed) - speed)
        self._mark, self.done = now, done
        metrics = {f"{name}_per_second": speed for name, speed in self._speeds.items()}
        metrics["seconds_left"] = (self.steps - done) / max(self._speeds["steps"], 1e-9)
        metrics["memory_bytes"] = float(cost.peak_memory_bytes(self.device))
        if self.peak is not None:
            metrics["mfu"] = self._speeds["tokens"] * self.flops_per_token / self.peak
        return metrics


class LossMonitor:
    """Stops a stage whose loss is not finite, or has been `divergence` times its best level for some 50 steps. A level
    is the median of 50 losses; `divergence` 0 lets a stage diverge. Errors name the step, some of the images of its
    batch and the last checkpoint."""

    def __init__(self, name: str, divergence: float) -> None:
        self.name, self.divergence, self.checkpoint = name, divergence, 0
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._best = math.inf

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold for a resumed stage to stop where this one would: plain JSON."""
        return {"recent": list(self._recent), "best": self._best if math.isfinite(self._best) else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from another's `state_dict()`, or from nothing."""
        self._recent.extend(state.get("recent", ()))
        best = state.get("best")
        self._best = math.inf if best is None else best

    def check(self, step: int, loss: float, norm: float, images: Callable[[], Sequence[str]]) -> None:
        """Raise FloatingPointError if the stage must stop after `step`, counted from 1."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"stage {self.name}: the loss is {loss} and the gradient norm {norm} at step {step}"
                f"{self._where(images())}; lower train.stages.{self.name}.learning_rate, or set "
                "train.precision=fp32"
            )
        self._recent.append(loss)
        if len(self._recent) < _WINDOW or not self.divergence:
            return
        level = statistics.median(self._recent)
        self._best = min(self._best, level)
        if level > self.divergence * self._best:
            raise FloatingPointError(
                f"stage {self.name}: the loss has risen from {self._best:.3g} to {level:.3g} by step {step}"
                f"{self._where(images())}; lower train.stages.{self.name}.learning_rate, or train.divergence=0 "
                "lets it go on"
            )

    def _where(self, images: Sequence[str]) -> str:
        more = f" and {len(images) - _NAMED} more" if len(images) > _NAMED else ""
        last = f"last checkpoint: step {self.checkpoint}" if self.checkpoint else "no checkpoint yet"
        return f" (images {', '.join(images[:_NAMED])}{more}; {last})"


class ParameterMonitor:
    """Sees to it that training changes what it should: bits of the trained parameters, before and after. All ranks must
    check: where the model is sharded, each sees its own rows, and all come to one answer."""

    def __init__(self, run: StageRun, model: nn.Module) -> None:
        """Raises UserError when the model has no parameter that the stage trains."""
        self.name, self.objective, self.world_size = run.name, run.stage.objective, run.world_size
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.modules: dict[str, list[nn.Parameter]] = {}
        module_of = family_class(model.config).module_of(model)
        for key, parameter in self.trained.items():
            self.modules.setdefault(module_of(key), []).append(parameter)
        if not self.trained:
            wanted = [module for module, mode in run.stage.trains.model_dump().items() if mode != "frozen"]
            raise UserError(
                f"stage {self.name} trains nothing: this model has no {', '.join(wanted)}; "
                f"change train.stages.{self.name}.trains"
            )
        self._before = self._bits()

    def norms(self) -> dict[str, float]:
        """Gradient norm of each trained module."""
        gradients = {m: [p.grad for p in ps if p.grad is not None] for m, ps in self.modules.items()}
        return {f"grad_norm/{m}": total_norm(g) for m, g in gradients.items() if g}

    def check_gradients(self) -> None:
        """Raise UserError if the loss does not reach a module that the stage declares: it would stay as it is."""
        reached = self._any_rank([any(p.grad is not None for p in parameters) for parameters in self.modules.values()])
        idle = [module for module, there in zip(self.modules, reached, strict=True) if not there]
        if idle:
            raise UserError(
                f"stage {self.name}: objective {self.objective} does not reach the {', '.join(idle)}; set "
                f"{', '.join(f'train.stages.{self.name}.trains.{m}=frozen' for m in idle)}"
            )

    def check_changed(self) -> None:
        """Raise UserError if not a bit of the trained parameters has changed."""
        if not any(self._any_rank([self._bits() != self._before])):
            raise UserError(
                f"stage {self.name} changed no parameter: its steps are too small for the weights' precision; raise "
                f"train.stages.{self.name}.learning_rate"
            )

    def _bits(self) -> list[int]:
        return [_hash(local_part(parameter.detach())) for parameter in self.trained.values()]

    def _any_rank(self, flags: list[bool]) -> list[bool]:
        """Which of these hold on at least one rank."""
        if self.world_size == 1:
            return flags
        device = local_part(next(iter(self.trained.values()))).device
        counts = torch.tensor(flags, dtype=torch.float32, device=device)
        dist.all_reduce(counts)
        return [count > 0 for count in counts.tolist()]


def _hash(tensor: Tensor) -> int:
    # torch has no hash of nothing: of no prompt tokens, or of a rank that holds no row
    return int(torch.hash_tensor(tensor).view(torch.int64)) if tensor.numel() else 0


@contextmanager
def out_of_memory_explained(name: str) -> Iterator[None]:
    """Turn every way of running out of memory into one UserError that says what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        text = str(error)
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not re.search(
            r"not enough memory|out of memory|can't allocate memory", text, re.IGNORECASE
        ):
            raise
        raise UserError(
            f"stage {name} ran out of memory: set train.micro_images (faces at once, such as 1), "
            f"train.recompute=true, or lower train.row_tokens or train.stages.{name}.turns_per_image"
        ) from error


def shortfalls(name: str, stage: Stage, dataset: FaceDataset) -> dict[str, float]:
    """What there is too little of in the training faces; empty if nothing is. `faces_with_map`: their share, below
    `FEW`; `characteristics_untold`: how many characteristics of the model no face is known to have or to lack. Raises
    UserError when a branch that the stage `name` trains would learn nothing."""
    found: dict[str, float] = {}
    if dataset.maps is not None:
        share = float((dataset.maps[dataset.corpus.pixel_row, 0, 0] != NO_MAP).mean())
        if share == 0 and stage.trains.segmentation == "full":
            raise UserError(
                f"model.segmentation would learn nothing in stage {name}: no training face has a map of its parts "
                f"(column segmentation); set model.segmentation.mode: none, take a source that has maps, or go on from "
                f"a trained one with train.stages.{name}.trains.segmentation: frozen"
            )
        if share < FEW:
            found["faces_with_map"] = share
    if dataset.labels is not None:
        unlabelled = int((dataset.labels == UNKNOWN).all(0).sum())
        if unlabelled == dataset.labels.shape[1] and stage.trains.knowledge == "full":
            raise UserError(
                f"model.knowledge would learn nothing in stage {name}: the training split tells none of the model's "
                f"{unlabelled} characteristics; name the tasks it was first trained with in model.knowledge.tasks and "
                f"reformat.tasks, or set train.stages.{name}.trains.knowledge: frozen"
            )
        if unlabelled:
            found["characteristics_untold"] = float(unlabelled)
    return found


def in_words(found: dict[str, float]) -> str:
    """The shortfalls as a note behind the loss; nothing if there is none."""
    words = ""
    if "faces_with_map" in found:
        words += f", maps of {found['faces_with_map']:.2%} of the faces only"
    if "characteristics_untold" in found:
        words += f", {found['characteristics_untold']:.0f} characteristics untold"
    return words
