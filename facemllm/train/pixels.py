"""Decoded pictures and maps of a table in memory maps: made once per table and image processor, shared by the stages.

A file is named by digest and built under a temporary name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facemllm.core import digests
from facemllm.core.files import atomic_file, locked, writing
from facemllm.core.machine import cores
from facemllm.errors import UserError
from facemllm.model.families import Family
from facemllm.model.families.llava import cut_by
from facemllm.model.inputs import face_map
from facemllm.tables import Table

Decode = Callable[[list[Any]], NDArray[np.uint8]]

_POOL_ROWS = 20_000  # below this, starting decoder processes (each imports torch) costs more than it saves


def pixel_cache(table: Table, family: Family, cache: Path, workers: int = 0) -> NDArray[np.uint8]:
    """Pixels of every row of a conversations table, in row order: a read-only memory map (rows, S, S, 3) uint8. Built
    once per table digest and kind of pictures; a half-built cache is never seen. `workers: 0` is one a core."""
    path = cache / f"pixels-{table.digest[:24]}-{kind_of(family.prepared_by)}.npy"
    return _cached(path, table, "images", partial(_decode_images, family), workers)


def map_cache(table: Table, processor: Any, cache: Path, workers: int = 0) -> NDArray[np.uint8]:
    """Maps of face parts of every row, in row order, (rows, S, S) uint8: as `pixel_cache`, for a processor of maps."""
    kind = kind_of(cut_by(processor.image_processor), processor.withheld_classes)
    decode = partial(_decode_maps, processor.image_processor, processor.withheld_classes)
    return _cached(cache / f"maps-{table.digest[:24]}-{kind}.npy", table, "segmentation", decode, workers)


def kind_of(prepared_by: Sequence[str], *more: Any) -> str:
    """Short digest of what decides prepared pixels (`Family.prepared_by`), and of `more`."""
    return digests.of_json([*prepared_by, *map(str, more)])[:8]


def _cached(path: Path, table: Table, column: str, decode: Decode, workers: int) -> NDArray[np.uint8]:
    if not path.exists():
        with locked(path.with_name(f".{path.name}.lock")):  # one process builds, on however many machines
            if not path.exists():
                _build(path, table, column, decode, workers or cores())
    return np.load(path, mmap_mode="r")


def _build(path: Path, table: Table, column: str, decode: Decode, workers: int) -> None:
    batches = (batch.column(column).to_pylist() for batch in table.batches(columns=[column], batch_rows=64))
    blocks: np.memmap[Any, np.dtype[np.uint8]] | None = None
    done = 0
    with writing(path), atomic_file(path, tidy=True) as unfinished:
        for block in _decoded(batches, decode, workers if table.rows >= _POOL_ROWS else 1):
            if blocks is None:
                blocks = np.lib.format.open_memmap(unfinished, "w+", np.uint8, (table.rows, *block.shape[1:]))
            blocks[done : done + len(block)] = block
            done += len(block)
        if blocks is None:
            raise UserError(f"{table.path}: the table has no rows to train on")
        blocks.flush()


def _decoded(batches: Iterator[list[Any]], decode: Decode, workers: int) -> Iterator[NDArray[np.uint8]]:
    if workers == 1:
        yield from map(decode, batches)
        return
    context = get_context("forkserver")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        pending = []
        for batch in batches:  # a few batches ahead, so that memory stays flat
            pending.append(pool.submit(decode, batch))
            if len(pending) > 2 * workers:
                yield pending.pop(0).result()
        yield from (future.result() for future in pending)


def _decode_images(family: Family, rows: list[Any]) -> NDArray[np.uint8]:
    return np.stack([family.pixels(images[0]["bytes"]) for images in rows])


def _decode_maps(image_processor: Any, withheld: Sequence[int], rows: list[Any]) -> NDArray[np.uint8]:
    return np.stack([face_map(row and row["bytes"], image_processor, withheld) for row in rows])
