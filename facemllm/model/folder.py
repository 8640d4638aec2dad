"""What is looked at of a model directory before transformers opens anything of it: which files it would be read from,
that its JSON is sound and bounded, that nothing in config.json leads elsewhere, and what its weights are by their
headers. A directory comes from anywhere."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from facemllm.core.files import checkpoint_files
from facemllm.errors import UserError, one_line

REAL = "F32, F16 or BF16"
_REAL = {"F32", "F16", "BF16"}
_WHOLE = {"I64", "I32", "BOOL"}  # tables and masks that some models keep beside their weights
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OBJECTS = {"config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json", _INDEX}
_OBJECTS |= {"video_preprocessor_config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"}
_OBJECTS |= {"added_tokens.json", "vocab.json", "chat_template.json"}
_MOST_BYTES = 2**27
_LAYERS = {"num_hidden_layers", "num_layers", "depth", "n_layers", "n_layer", "encoder_layers", "decoder_layers"}
_QUANTISED = {"quantization_config", "compression_config"}
_ELSEWHERE = {
    "transformers_weights": "another file of weights",
    "fusion_config": "a change of transformers' own classes",
}
_KERNELS = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_DISTRIBUTED = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")


@dataclass(frozen=True)
class Held:
    """A tensor of a checkpoint, by the header of its file: safetensors' word for its type, and its size."""

    kind: str
    numel: int

    @property
    def real(self) -> bool:
        """Whether it holds real numbers."""
        return self.kind in _REAL


def checked_config(folder: Path) -> dict[str, Any]:
    """config.json of a model directory, all of whose files may be opened. Raises UserError for one that may not."""
    files = checkpoint_files(folder)
    if any(file.name == "adapter_config.json" for file in files):
        raise UserError(
            f"cannot load the model {folder}: it holds an adapter (adapter_config.json); merge it "
            "(peft's merge_and_unload, then save_pretrained), or take it out of the folder"
        )
    if odd := [file.name for file in files if _DISTRIBUTED.fullmatch(file.name)]:
        raise UserError(
            f"cannot load the model {folder}: {odd[0]} is part of a distributed checkpoint; "
            "save the model whole (save_pretrained), or take it out of the folder"
        )
    if (folder / "additional_chat_templates" / "default.jinja").exists():
        raise UserError(
            f"cannot load the model {folder}: additional_chat_templates/default.jinja stands beside the files of a "
            "model; put it into the folder itself, as chat_template.jinja"
        )
    tensors = tensors_of(folder)
    found = {file.name: _object(folder, file) for file in files if file.name in _OBJECTS}
    config: dict[str, Any] = found.get("config.json", {})
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"cannot load the model {folder}: it has no config.json that names a model_type")
    for key, value in _entries(config):
        if why := _refused(key, value, len(tensors)):
            raise UserError(f"cannot load the model {folder}: {why}")
    return config


def tensors_of(folder: Path) -> dict[str, Held]:
    """What the files hold that transformers reads weights from. Raises UserError for missing, damaged or odd ones."""
    found: dict[str, Held] = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    one = tensors.get_slice(name)
                    found[name] = Held(one.get_dtype(), math.prod(one.get_shape()))
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot load the model {folder}: {file.name} is damaged; fetch it again") from error
    for name, held in found.items():
        if held.kind not in _REAL | _WHOLE:
            raise UserError(f"cannot load the model {folder}: {name} is {held.kind}; weights have to be {REAL}")
    return found


def _weight_files(folder: Path) -> list[Path]:
    files = {file.name: file for file in checkpoint_files(folder) if file.suffix == ".safetensors"}
    if not files:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        why = "its weights are pickled; only safetensors are loaded" if pickled else "it holds no *.safetensors file"
        raise UserError(f"cannot load the model {folder}: {why}")
    if _SINGLE in files:
        return [files[_SINGLE]]
    if not (folder / _INDEX).exists():
        raise UserError(f"cannot load the model {folder}: its weights have to be in {_SINGLE}, or {_INDEX} name them")
    index = _object(folder, folder / _INDEX)
    places = index.get("weight_map")
    sound = isinstance(places, dict) and places and all(isinstance(one, str) for one in places.values())
    if not sound or not isinstance(index.get("metadata"), dict):
        raise UserError(
            f"cannot load the model {folder}: {_INDEX} is damaged: it needs a weight_map, of names to files, and "
            "metadata; fetch it again"
        )
    wanted = sorted({str(one) for one in places.values()})  # type: ignore[union-attr]
    if absent := [name for name in wanted if name not in files]:
        raise UserError(f"cannot load the model {folder}: {absent[0]} is missing; fetch it again")
    return [files[name] for name in wanted]


def _object(folder: Path, file: Path) -> dict[str, Any]:
    if (size := file.stat().st_size) > _MOST_BYTES:
        raise UserError(f"cannot load the model {folder}: {file.name} has {size} bytes; at most {_MOST_BYTES} are read")
    try:
        value = json.loads(file.read_text("utf-8"))
    except RecursionError:
        raise UserError(f"cannot load the model {folder}: {file.name} is nested too deep") from None
    except ValueError as error:
        raise UserError(
            f"cannot load the model {folder}: {file.name} is damaged, no JSON: {one_line(error)}; fetch it again"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"cannot load the model {folder}: {file.name} holds no JSON object; fetch it again")
    return value


def _entries(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values of an object and of all objects in it."""
    left: list[Any] = [config]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            yield from one.items()
            left += one.values()
        elif isinstance(one, list):
            left += one


def _refused(key: str, value: Any, tensors: int) -> str | None:
    """Why an entry of config.json is not followed; None where it says nothing, or nothing odd."""
    if key in _LAYERS and isinstance(value, int) and value > tensors:
        return (
            f"{key} in its config.json is {value}, its weights are {tensors} tensors; take the one that belongs to them"
        )
    if not value:
        return None
    if key in _QUANTISED:
        return f"its weights are quantised ({key} in config.json); take the unquantised checkpoint"
    if key in _ELSEWHERE or key.startswith("custom_"):
        return (
            f"{key} in its config.json names {_ELSEWHERE.get(key, 'code of its own')}, which is not followed; remove it"
        )
    if _KERNELS.fullmatch(key) and "/" in str(value):
        return f"{key} in its config.json names code of the hub ({value}), which is never run; remove it"
    return None
