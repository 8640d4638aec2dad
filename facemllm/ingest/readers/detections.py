"""LAION-Face's face detections: `sample2detect_<part>.pth`, a pickled mapping of SAMPLE_ID to (box, landmarks, score).

A pickle can run code when it is read, so it is read by PyTorch's restricted reader (`weights_only=True`), which builds
containers, numbers and tensors; arrays and numbers of numpy, which these files hold, are admitted on top. Anything else
is refused. The mapping is packed into three arrays at once: about 70 bytes a face. While a part is read, its objects
need more, some 600 bytes a face; the parts are read one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facemllm.errors import UserError, one_line

FIELDS = 15
"""Numbers a face: left, top, right, bottom; five landmarks x, y; score."""


@dataclass(frozen=True)
class Detections:
    """Faces by sample: sorted ids (n,), where each one's faces start (n + 1,), and the faces (m, 15).

    A face that does not hold 15 numbers is a row of NaN.
    """

    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    faces: NDArray[np.float32]

    def find(self, sample: int) -> int:
        """The place of a sample; -1 when it is not there."""
        at = int(np.searchsorted(self.ids, sample))
        return at if at < len(self.ids) and int(self.ids[at]) == sample else -1

    def at(self, place: int) -> NDArray[np.float32]:
        """The faces (k, 15) of the sample at a place, in the detector's order."""
        return self.faces[self.starts[place] : self.starts[place + 1]]


def load(path: Path) -> Detections:
    """The detections of one part. Raises UserError when the file holds anything but such a mapping."""
    import torch

    try:
        with torch.serialization.safe_globals(_admitted()):
            table = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile pickle can raise almost anything from its reader
        raise UserError(
            f"{path}: not read, since it is damaged or holds more than numbers ({one_line(error, 200)})"
        ) from None
    if not isinstance(table, dict):
        raise UserError(f"{path}: holds no mapping of SAMPLE_ID to faces; give the file as LAION-Face publishes it")
    try:
        return packed(table)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: no mapping of SAMPLE_ID to lists of (box, landmarks, score): {error}") from None


def packed(table: dict[Any, Any]) -> Detections:
    """A mapping of SAMPLE_ID to lists of (box, landmarks, score) as arrays. Empties the mapping while it is read, so
    that both are never held whole."""
    keys = sorted(table, key=_number)
    ids = np.fromiter(map(_number, keys), np.int64, len(keys))
    starts = np.zeros(len(ids) + 1, np.int64)
    np.cumsum([len(table[key]) for key in keys], out=starts[1:])
    faces = np.full((int(starts[-1]), FIELDS), np.nan, np.float32)
    for start, key in zip(starts, keys, strict=False):
        for row, face in enumerate(table.pop(key), start=int(start)):
            faces[row] = _face(face)
    return Detections(ids, starts, faces)


def _number(key: Any) -> int:
    return int(key) if isinstance(key, int | np.integer) else int(float(key))


def _face(face: Any) -> NDArray[np.float32]:
    try:
        box, landmarks, score = face
        parts = [np.asarray(part, np.float32).reshape(-1) for part in (box, landmarks, score)]
    except (TypeError, ValueError):
        parts = []
    if [part.size for part in parts] != [4, 10, 1]:
        return np.full(FIELDS, np.nan, np.float32)
    return np.concatenate(parts)


def _admitted() -> list[Any]:
    """What numpy's arrays and numbers are pickled with, under its names of today and of before numpy 2."""
    from numpy._core import multiarray

    functions: Mapping[str, Any] = {"_reconstruct": multiarray._reconstruct, "scalar": multiarray.scalar}
    named = [(f, f"numpy.{core}.multiarray.{n}") for n, f in functions.items() for core in ("_core", "core")]
    kinds = [type(np.dtype(code)) for code in ("f4", "f8", "i4", "i8")]
    return [*named, np.ndarray, np.dtype, *kinds]
