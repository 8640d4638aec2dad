"""The Ray Data job: label columns read from the shards, annotated in batches, streamed back in row order.

On a running head (`RAY_ADDRESS`) it connects and leaves the head alone; else it starts Ray for itself and stops it.
Tasks, not actors: a tiny pool of actors takes longer to start than the oracle needs for thousands of rows.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from facemllm.annotation.annotator import Annotation, Annotator
from facemllm.records import Table

if TYPE_CHECKING:
    import pyarrow as pa

_OBJECT_STORE = 256 * 2**20
_TASK_CPUS = 0.5  # so that reading still fits beside two tasks on two cores

Answer = tuple[str, Annotation | None, str]
"""Of one row: its image_id, and either the annotation or the reason why there is none."""


def answers(annotator: Annotator, faces: Table, batch_size: int, concurrency: int) -> Iterator[Answer]:
    """The annotator's answers to all rows, in row order. Close the iterator to leave Ray early."""
    if not faces.rows:
        return
    columns = list(dict.fromkeys(("image_id", *annotator.columns, *(("image",) if annotator.needs_image else ()))))
    with _ray(concurrency):
        import ray

        shards = [str(faces.path / shard["name"]) for shard in faces.manifest["shards"]]
        data = ray.data.read_parquet(shards, columns=columns).map_batches(
            lambda batch: _annotate(annotator, batch),
            batch_size=batch_size,
            batch_format="pyarrow",
            num_cpus=_TASK_CPUS,
            concurrency=concurrency,
        )
        for batch in data.iter_batches(batch_size=batch_size, batch_format="pyarrow", prefetch_batches=1):
            for row in batch.to_pylist():
                annotation = None if row["reply"] is None else Annotation(**json.loads(row["reply"]))
                yield row["image_id"], annotation, row["reason"]


def _annotate(annotator: Annotator, batch: pa.Table) -> pa.Table:
    """One batch, in a Ray worker: replies as JSON, so that any annotator's labels fit one column."""
    import pyarrow as pa

    rows = batch.to_pylist()
    try:
        replies: list[Annotation | Exception] = list(annotator.annotate(rows))
        if len(replies) != len(rows):
            raise ValueError(f"{annotator.name} gave {len(replies)} replies for {len(rows)} rows")
    except Exception:
        replies = [_one(annotator, row) for row in rows]
    texts = [None if isinstance(r, Exception) else json.dumps(vars(r)) for r in replies]
    reasons = [f"{type(r).__name__}: {r}" if isinstance(r, Exception) else "" for r in replies]
    schema = pa.schema([("image_id", pa.string()), ("reply", pa.string()), ("reason", pa.string())])
    return pa.table([[row["image_id"] for row in rows], texts, reasons], schema=schema)


def _one(annotator: Annotator, row: dict[str, Any]) -> Annotation | Exception:
    try:
        (reply,) = annotator.annotate([row])
    except Exception as error:
        return error
    return reply


@contextmanager
def _ray(concurrency: int) -> Iterator[None]:
    """Ray, quiet and order-preserving: the one already connected, the head at `RAY_ADDRESS`, or one of our own."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    import ray
    import ray.data

    connected = ray.is_initialized()
    if not connected:
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if address := os.environ.get("RAY_ADDRESS"):
            ray.init(address=address, **quiet)
        else:
            cores = max(2, concurrency)
            ray.init(num_cpus=cores, include_dashboard=False, object_store_memory=_OBJECT_STORE, **quiet)
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.execution_options.preserve_order
    context.enable_progress_bars, context.execution_options.preserve_order = False, True
    try:
        yield
    finally:
        context.enable_progress_bars, context.execution_options.preserve_order = before
        logger.setLevel(level)
        if not connected:
            ray.shutdown()
