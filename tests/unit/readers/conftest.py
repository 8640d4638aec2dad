"""Small trees in the native layouts of datasets: pictures of noise, and what an import makes of a tree."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from facemllm.ingest.importing import HASH, imported
from facemllm.ingest.reader import Refused
from facemllm.settings import load
from facemllm.settings.data import Source
from facemllm.tables import LABELS, mapping
from tests.pictures import encode

Size = tuple[int, int]


def encoded(seed: int, size: Size = (64, 64), form: str = "JPEG") -> bytes:
    """A picture of coarse noise, `size` as (width, height)."""
    noise = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return encode(Image.fromarray(noise).resize(size, Image.Resampling.NEAREST), form)


@dataclass(frozen=True)
class Imported:
    """What an import gave: rows as plain values (maps as mappings, without hashes), and refused rows. `facts` of a row
    are the labels that are known."""

    rows: list[dict[str, Any]]
    refused: list[Refused]

    def column(self, name: str) -> dict[str, Any]:
        """A column by source_id."""
        return {row["source_id"]: row.get(name) for row in self.rows}


@pytest.fixture
def picture() -> Callable[..., Path]:
    """`picture(path, seed=0, size=(64, 64), form="JPEG")`: writes a picture, making its folders."""

    def write(path: Path, seed: int = 0, size: Size = (64, 64), form: str = "JPEG") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(seed, size, form))
        return path

    return write


@pytest.fixture
def pictures(picture: Callable[..., Path]) -> Callable[..., None]:
    """`pictures(folder, *names, size=(64, 64), form="JPEG")`: pictures under these names, no two alike."""

    def write(folder: Path, *names: str, **options: Any) -> None:
        for seed, name in enumerate(names):
            picture(folder / name, seed, **options)

    return write


@pytest.fixture
def take() -> Callable[..., Imported]:
    """`take(source, root, settings=[...overrides], **options)`: the rows that an import of a tree gives."""

    def run(source: str, root: Path, settings: list[str] | None = None, **options: str) -> Imported:
        data = load("laptop", settings or []).ingest
        found = list(imported(Source(name=source, root=str(root), options=options), data))
        rows = [row for row in found if not isinstance(row, Refused)]
        for row in rows:
            row.pop(HASH)
            for name in ("attributes", "action_units"):
                if row.get(name) is not None:
                    row[name] = mapping(row[name])
            row["facts"] = {label.name: row[label.name] for label in LABELS if row.get(label.name) is not None}
        return Imported(rows, [row for row in found if isinstance(row, Refused)])

    return run
