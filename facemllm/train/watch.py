"""What a user is told of a running stage, and when it must stop.

Speeds are smoothed over logs (exponential moving average), so that a remaining time does not jump. A stage stops when
its loss is not finite, when it has diverged, when a module it declares gets no gradient, or when nothing has changed.
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
from facemllm.settings import Stage
from facemllm.train.checkpoint import local_part
from facemllm.train.fsdp import total_norm
from facemllm.train.stages import module_of

_SMOOTHING = 0.3
_WINDOW = 50
_NAMED = 3


class Pace:
    """Smoothed speeds of a stage of `steps` steps, from counts of what has been done."""

    def __init__(self, steps: int, done: int, device: str, precision: str, world: int, flops_per_token: float) -> None:
        self.steps, self.device, self.flops_per_token = steps, device, flops_per_token
        peak = cost.peak_flops(device, precision)
        self.peak = None if peak is None else peak * world
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


class Watch:
    """Stops a stage whose loss is not finite, or has been `divergence` times its best level for some 50 steps.

    A level is the median of 50 losses; `divergence` 0 lets a stage diverge. Errors name the step, some of the images of
    its batch and the last checkpoint.
    """

    def __init__(self, name: str, divergence: float, checkpoint: int) -> None:
        self.name, self.divergence, self.checkpoint = name, divergence, checkpoint
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._best = math.inf

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold for a resumed stage to stop where this one would: plain JSON."""
        return {"recent": list(self._recent), "best": self._best if math.isfinite(self._best) else None}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from another's `state()`, or from nothing."""
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


class Changed:
    """Tells whether training changes what it should: bits of the trained parameters, before and after.

    All of `world` ranks must check: where the model is sharded, each sees its own rows, and all come to one answer.
    """

    def __init__(self, model: nn.Module, name: str, stage: Stage, world: int = 1) -> None:
        """Raises UserError when the model has no parameter that `stage` trains."""
        self.name, self.stage, self.world = name, stage, world
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.modules: dict[str, list[nn.Parameter]] = {}
        for key, parameter in self.trained.items():
            self.modules.setdefault(module_of(key), []).append(parameter)
        if not self.trained:
            wanted = [module for module, mode in stage.trains.model_dump().items() if mode != "frozen"]
            raise UserError(
                f"stage {name} trains nothing: this model has no {', '.join(wanted)}; change train.stages.{name}.trains"
            )
        self._before = self._bits()

    def norms(self) -> dict[str, float]:
        """Gradient norm of each trained module."""
        gradients = {m: [p.grad for p in ps if p.grad is not None] for m, ps in self.modules.items()}
        return {f"grad_norm/{m}": total_norm(g) for m, g in gradients.items() if g}

    def check_gradients(self) -> None:
        """Raise UserError if the loss does not reach a module that the stage declares: it would stay as it is."""
        reached = self._on_any([any(p.grad is not None for p in parameters) for parameters in self.modules.values()])
        idle = [module for module, there in zip(self.modules, reached, strict=True) if not there]
        if idle:
            raise UserError(
                f"stage {self.name}: objective {self.stage.objective} does not reach the {', '.join(idle)}; set "
                f"{', '.join(f'train.stages.{self.name}.trains.{m}=frozen' for m in idle)}"
            )

    def check_changed(self) -> None:
        """Raise UserError if not a bit of the trained parameters has changed."""
        if not any(self._on_any([self._bits() != self._before])):
            raise UserError(
                f"stage {self.name} changed no parameter: its steps are too small for the weights' precision; raise "
                f"train.stages.{self.name}.learning_rate"
            )

    def _bits(self) -> list[int]:
        return [_hash(local_part(parameter.detach())) for parameter in self.trained.values()]

    def _on_any(self, here: list[bool]) -> list[bool]:
        """Which of these hold on at least one rank."""
        if self.world == 1:
            return here
        counts = torch.tensor(here, dtype=torch.float32, device=local_part(next(iter(self.trained.values()))).device)
        dist.all_reduce(counts)
        return [count > 0 for count in counts.tolist()]


def _hash(tensor: Tensor) -> int:
    # torch has no hash of nothing: of no prompt tokens, or of a rank that holds no row
    return int(torch.hash_tensor(tensor).view(torch.int64)) if tensor.numel() else 0


@contextmanager
def memory_explained(name: str) -> Iterator[None]:
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
