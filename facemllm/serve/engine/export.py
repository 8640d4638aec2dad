"""A model directory as vLLM loads it: the same tensors, those of a LLaVA's tower under the names vLLM knows.

transformers 5 writes `vision_tower.embeddings...`, vLLM wants `vision_tower.vision_model.embeddings...` (CLIP and
SigLIP towers); other models go unchanged. In a safetensors file names stand in the header alone, so the bytes of
tensors are copied, block by block: memory stays bounded whatever the model's size. Beside the copy lies a record of
what it was made from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any, BinaryIO

from facemllm.core import digests
from facemllm.core.files import atomic_write, building, read_json, writing
from facemllm.errors import UserError
from facemllm.signing import manifest
from facemllm.signing.canonical import Refused

SERVED = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl")
"""Model types whose answers by vLLM were seen to be those of our own engine."""
TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Towers that vLLM's LLaVA has itself (and a CLIP or SigLIP pair's half of vision)."""
_OLD, _NEW = "vision_tower.", "vision_tower.vision_model."
_INDEX = "model.safetensors.index.json"
_MOST_HEADER = 100 * 2**20  # safetensors' own limit
_BLOCK = 1 << 20


def record_of(out: Path) -> Path:
    """The file beside an exported folder that says what it was made from."""
    return out.with_name(f"{out.name}.export.json")


def exported_from(out: Path) -> str:
    """The digest of the model that an exported folder was made from; empty unless its bytes are still those that were
    exported."""
    record = read_json(record_of(out))
    if not out.is_dir() or record.get("exported") != manifest.of(out).digest:
        return ""
    return str(record.get("model"))


def export_for_vllm(model_dir: Path, out: Path, digest: str = "") -> dict[str, Any]:
    """Write `model_dir` to the new folder `out` for vLLM, and the record beside it, which is returned: `model` and
    `exported` are the digests of the two folders, `renamed` counts tensors. What was read has the digest `model`.

    Raises UserError for a model that vLLM does not serve, Refused ("files") for a folder that none may be and
    ("digest") for one of another digest than `digest`, if that is given.
    """
    require_served(_config(model_dir).get("model_type"), str(model_dir))
    with building(out) as partial:
        with writing(out):
            read, renamed = _copied(model_dir, partial, tower_of(model_dir) in TOWERS)
        if digest and read != digest:
            raise Refused("digest", f"{model_dir} has digest {read[:12]}, not {digest[:12]}; nothing was exported")
        record = {"model": read, "exported": manifest.of(partial).digest, "renamed": renamed}
    atomic_write(record_of(out), (json.dumps(record, indent=2) + "\n").encode())
    return record


def _copied(model_dir: Path, out: Path, rename: bool) -> tuple[str, int]:
    """Copy a model directory; the digest of what was read, and how many tensors were renamed."""
    hashes: list[list[str]] = []
    renamed = 0
    for path in sorted(one.relative_to(model_dir).as_posix() for one in model_dir.rglob("*") if one.is_file()):
        with (model_dir / path).open("rb") as file:
            source = _Hashed(file)
            header, data = b"", b""
            if rename and path.endswith(".safetensors") and "/" not in path:
                header, count = _renamed_header(model_dir / path, source)
                renamed += count
            elif rename and path == _INDEX:
                data = _renamed_index(model_dir / path, source.read())
            with (out / path).open("xb") if not path.startswith("adapter/") else open(os.devnull, "wb") as target:
                target.write(header + data)
                shutil.copyfileobj(source, target, _BLOCK)
            hashes.append([path, source.hash.hexdigest()])
    return digests.of_json(hashes), renamed


class _Hashed:
    """A file that hashes what is read of it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.hash = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.hash.update(data)
        return data


def require_served(kind: Any, name: str) -> None:
    """Raise UserError unless a model of this type can be served through vLLM by our server."""
    if kind not in SERVED:
        branches = " (branches or maps)" if kind == "face_mllm" else ""
        raise UserError(
            f"vLLM serves models of the types {', '.join(SERVED)} here, and {name} is of the type {kind}{branches}: "
            "serve it with the own engine, serve.engine.name: own"
        )


def tower_of(model_dir: Path) -> str:
    """The model type of the tower: one of `TOWERS` loads in vLLM natively, any other by `--model-impl transformers`."""
    return str(_config(model_dir).get("vision_config", {}).get("model_type"))


def _config(model_dir: Path) -> dict[str, Any]:
    try:
        found = json.loads((model_dir / "config.json").read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{model_dir} has no readable config.json: {error}") from None
    return found


def _name(name: str) -> str:
    """A tensor's name as vLLM has it."""
    before, tower, after = name.partition(_OLD)
    if not tower or after.startswith("vision_model.") or before not in ("", "model."):
        return name
    return f"{before}{_NEW}{after}"


def _renamed_header(path: Path, file: _Hashed) -> tuple[bytes, int]:
    """The header of a safetensors file with its tensors renamed, and how many were; the file is read up to its end."""
    try:
        first = file.read(8)
        (size,) = struct.unpack("<Q", first)
        if size > _MOST_HEADER:
            raise ValueError("its header is too long")
        header = json.loads(file.read(size))
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
        names = {name: _name(name) for name in header}
        renamed = {names[name]: header[name] for name in header}
    except (struct.error, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no safetensors file: {error}") from None
    if len(renamed) != len(header):
        raise UserError(f"{path} holds a tensor under its old and its new name; export it anew")
    text = json.dumps(renamed, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, sum(old != new for old, new in names.items())


def _renamed_index(path: Path, content: bytes) -> bytes:
    try:
        found: dict[str, Any] = json.loads(content)
        found["weight_map"] = {_name(name): file for name, file in found["weight_map"].items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return (json.dumps(found, indent=2) + "\n").encode()
