"""A training checkpoint: what a stage changes, the optimiser's moments and the step. Safetensors and JSON, atomic.

No random state is kept: every draw is a function of the step (see `packing`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from facemllm.errors import UserError

TENSORS, STATE = "training.safetensors", "training.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def write(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Write a checkpoint into an existing folder; `state` must hold `step` and `key`. The JSON file comes last."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"model.{name}"] = parameter.detach()
            for moment in _MOMENTS:
                if moment in optimizer.state[parameter]:
                    tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    tensors |= {f"model.{name}": buffer for name, buffer in _kept_buffers(model)}
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, folder / TENSORS)
    partial = folder / f".{STATE}.partial"
    partial.write_text(json.dumps(state, sort_keys=True) + "\n", "utf-8")
    partial.replace(folder / STATE)


def whole(folder: Path) -> bool:
    """Whether a folder holds all of a checkpoint: a copy that was cut short may lack a file, or the end of one."""
    try:
        with safe_open(folder / TENSORS, "pt"):
            return (folder / STATE).is_file()
    except (OSError, SafetensorError):
        return False


def read(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, key: str) -> dict[str, Any]:
    """Restore a checkpoint in place and return its state. Raises UserError when it belongs to another run."""
    try:
        state = json.loads((folder / STATE).read_text("utf-8"))
        tensors = load_file(folder / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot read the checkpoint {folder}: {error}; remove it to train from the start") from error
    if state.get("key") != key:
        raise UserError(f"the checkpoint {folder} is of other settings or data; remove it to train from the start")
    with torch.no_grad():
        for name, buffer in _kept_buffers(model):
            buffer.copy_(tensors[f"model.{name}"])
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            parameter.copy_(tensors[f"model.{name}"])
            if f"{_MOMENTS[0]}.{name}" not in tensors:  # this parameter has had no gradient so far
                continue
            optimizer.state[parameter] = {
                "step": torch.tensor(float(state["step"]), device=parameter.device),
                **{m: torch.empty_like(parameter).copy_(tensors[f"{m}.{name}"]) for m in _MOMENTS},
            }
    return dict(state)


def _kept_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that training moves (normalisation statistics); constants such as rotary tables are not in state_dict."""
    kept = model.state_dict(keep_vars=True)
    return [(name, tensor) for name, tensor in model.named_buffers() if name in kept]
