"""A training checkpoint: what a stage changes, the optimiser's moments and the step. Safetensors and JSON, no pickles.

    checkpoint-00000200-01/     step 200, written by attempt 1
      rank-0-of-2.safetensors   all of it; of a sharded model, this rank's rows of every tensor
      rank-1-of-2.safetensors   only of a sharded model
      training.json             step, key and what the run is made from, and the files above: written last

It is whole when every file that `training.json` names is there and reads. No random state is kept: every draw is a
function of the step (see `packing`). A sharded one may be read by any number of ranks, and by an unsharded model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from facemllm.errors import UserError

STATE = "training.json"
MOMENTUM = "momentum_buffer"
MOMENTS = ("exp_avg", "exp_avg_sq", MOMENTUM)
_STEP = "step"


@dataclass(frozen=True)
class Checkpoint:
    """A rank's part of a checkpoint about to be written: live tensors by name, and the first row of those that are a
    part of a whole. `world_size` is how many ranks write; 1 unless the model is sharded."""

    tensors: Mapping[str, Tensor]
    starts: Mapping[str, int]
    state: Mapping[str, Any]
    rank: int = 0
    world_size: int = 1

    @classmethod
    def of(
        cls,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> Checkpoint:
        """Of a model in training. `state` must hold `step` and `key`."""
        tensors: dict[str, Tensor] = {}
        starts: dict[str, int] = {}
        for name, parameter in _trained(model):
            parts = {f"model.{name}": parameter.detach()}
            held = optimizer.state.get(parameter, {})
            parts |= {f"{moment}.{name}": held[moment] for moment in MOMENTS if moment in held}
            for key, tensor in parts.items():
                tensors[key] = local_part(tensor)
                if tensor is not tensors[key]:
                    starts[key] = local_rows(parameter)[0]
            if _STEP in held:  # a parameter that had no gradient in some step has made fewer
                tensors[f"{_STEP}.{name}"] = local_part(torch.as_tensor(held[_STEP]))
        if rank == 0:
            tensors |= {f"model.{name}": buffer for name, buffer in _kept_buffers(model)}
        return cls(tensors, starts, state, rank, world_size)

    def clone(self, buffers: Mapping[str, Tensor] | None = None) -> Checkpoint:
        """The same in the machine's memory, where training no longer changes it; in `buffers`, the tensors of an
        earlier clone, if they fit: memory that is new to a process costs more time than the copy itself."""
        copies = {}
        for name, tensor in self.tensors.items():
            copy = (buffers or {}).get(name)
            if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copies[name] = copy.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in self.tensors.values()):
            torch.cuda.synchronize()
        return replace(self, tensors=copies)

    def write(self, folder: Path) -> list[Path]:
        """Write this rank's files into an existing folder; returns them in the order in which they must arrive."""
        tensors = folder / _file(self.rank, self.world_size)
        about = {"starts": json.dumps(dict(self.starts), sort_keys=True)}
        save_file({name: t.contiguous().cpu() for name, t in self.tensors.items()}, tensors, metadata=about)
        _sync(tensors)
        if self.rank:
            return [tensors]
        files = [_file(rank, self.world_size) for rank in range(self.world_size)]
        partial = folder / f".{STATE}.partial"
        partial.write_text(json.dumps({**self.state, "files": files}, sort_keys=True) + "\n", "utf-8")
        _sync(partial)
        partial.replace(folder / STATE)
        return [tensors, folder / STATE]


def is_whole(folder: Path) -> bool:
    """Whether a folder holds all of a checkpoint: one that was cut short lacks a file, or the end of one."""
    try:
        for name in json.loads((folder / STATE).read_text("utf-8"))["files"]:
            with safe_open(folder / name, "pt"):
                pass
    except (OSError, ValueError, KeyError, SafetensorError):
        return False
    return True


def load(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, key: str, made_from: Mapping[str, Any]
) -> dict[str, Any]:
    """Restore a checkpoint in place and return its state. Raises UserError when it cannot be read or belongs to another
    run: `made_from` are that key's parts, to show which."""
    try:
        state = json.loads((folder / STATE).read_text("utf-8"))
        with ExitStack() as files:
            parts = _Parts(files.enter_context(safe_open(folder / name, "pt")) for name in state["files"])
            if state.get("key") != key:
                changed = differences(state.get("made_from") or {}, made_from)
                raise UserError(
                    f"the checkpoint {folder} is of other settings or data ({changed}); "
                    f"take those, or remove it to train from the start"
                )
            _restore(model, optimizer, parts)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        said = f"{type(error).__name__}: {error}"
        raise UserError(f"cannot read the checkpoint {folder}: {said}; remove it to train from the start") from error
    return dict(state)


class _Parts:
    """Tensors that lie in one file or, by rows, in several."""

    def __init__(self, files: Iterable[Any]) -> None:
        self._places: dict[str, list[tuple[int, Any]]] = {}
        for file in files:
            starts = json.loads((file.metadata() or {}).get("starts", "{}"))
            for name in file.keys():  # noqa: SIM118 - safetensors' file is no mapping
                self._places.setdefault(name, []).append((starts.get(name, 0), file))

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def all(self, name: str) -> Tensor:
        """A tensor of which every file that has it has all."""
        tensor: Tensor = self._places[name][0][1].get_tensor(name)
        return tensor

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows `first` to `last` of a tensor, read from where they lie and no more."""
        found = []
        for start, file in sorted(self._places[name], key=lambda place: place[0]):
            piece = file.get_slice(name)
            end = start + piece.get_shape()[0]
            if start < last and end > first:
                found.append(piece[max(first - start, 0) : min(last, end) - start])
        if sum(len(piece) for piece in found) != last - first:
            raise KeyError(f"{name}: rows {first} to {last} are not all there")
        return torch.cat(found) if found else self._places[name][0][1].get_slice(name)[0:0]


@torch.no_grad()
def _restore(model: nn.Module, optimizer: torch.optim.Optimizer, parts: _Parts) -> None:
    for name, buffer in _kept_buffers(model):
        buffer.copy_(parts.all(f"model.{name}"))
    for name, parameter in _trained(model):
        _fill(parameter, parts, f"model.{name}")
        held = {moment: torch.empty_like(parameter) for moment in MOMENTS if f"{moment}.{name}" in parts}
        for moment, tensor in held.items():
            _fill(tensor, parts, f"{moment}.{name}")
        if f"{_STEP}.{name}" in parts:
            held[_STEP] = parts.all(f"{_STEP}.{name}").to(parameter.device)
        if held:  # else this parameter has had no gradient so far
            optimizer.state[parameter] = held


def _fill(tensor: Tensor, parts: _Parts, name: str) -> None:
    local = local_part(tensor.detach())
    local.copy_(parts.rows(name, *local_rows(tensor)) if tensor.ndim else parts.all(name))


def local_rows(tensor: Tensor) -> tuple[int, int]:
    """First row and end of what this rank holds of a tensor, as `fully_shard` gives rows out."""
    count = tensor.shape[0] if tensor.ndim else 0
    if not hasattr(tensor, "device_mesh"):
        return 0, count
    mesh = tensor.device_mesh
    chunk = -(-count // mesh.size())
    first = min(mesh.get_local_rank() * chunk, count)
    return first, min(first + chunk, count)


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _kept_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that training moves (normalisation statistics); constants such as rotary tables are not in state_dict."""
    kept = model.state_dict(keep_vars=True)
    return [(name, tensor) for name, tensor in model.named_buffers() if name in kept]


def _file(rank: int, world_size: int) -> str:
    return f"rank-{rank}-of-{world_size}.safetensors"


def _sync(path: Path) -> None:
    """Hand a file's bytes to the disk, so that its name never outlives them."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def local_part(tensor: Any) -> Tensor:
    """This rank's rows of a sharded tensor; any other tensor as it is."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def differences(old: Mapping[str, Any], new: Mapping[str, Any], limit: int = 5) -> str:
    """What differs between two nested mappings in words: `plan.steps: 60 -> 80, seed: 0 -> 1`."""
    before, after = _flat(old), _flat(new)
    found = [
        f"{name}: {_short(before.get(name))} -> {_short(after.get(name))}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    rest = [f"and {len(found) - limit} more"] if len(found) > limit else []
    return ", ".join(found[:limit] + rest) or "what differs was not kept"


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{name}.{key}" if name else str(key))
    return found


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
