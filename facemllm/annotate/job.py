"""The Ray Data job: pieces of the table go out to tasks by number, and answers stream back in row order.

A piece is a run of row groups. The task reads from the shard what the annotator wants to see and nothing else, so no
image travels through Ray, and one large shard spreads over many tasks as well as many small ones do.
On a running head (`RAY_ADDRESS`) it connects and leaves the head alone; else it starts Ray for itself and stops it.
Tasks, not actors: a tiny pool of actors takes longer to start than the oracle needs for thousands of rows. A task whose
machine is lost is done again. Replies are kept in an SQLite database, which machines must not share: an actor on the
driver's has it open for all tasks.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from facemllm.annotate.annotator import Annotation, Annotator, answers_one_by_one, checked
from facemllm.asking.requests import JobStopped, Reply, RowRefused
from facemllm.asking.store import Opening, Replies
from facemllm.errors import UserError, one_line
from facemllm.tables import Table

_OBJECT_STORE = 256 * 2**20
_TASK_CPUS = 0.5  # so that two tasks still fit beside other work on two cores
_MAX_BLOCKS = 1000  # of Ray Data: more cost the driver more than they spread the work

_ANSWERS = pa.schema([(name, pa.string()) for name in ("image_id", "reply", "reason", "stop")])

Piece = tuple[str, tuple[int, ...]]
"""A shard's path and the row groups to read from it."""

Answer = tuple[str, Annotation | None, str]
"""Of one row: its image_id, and either the annotation or the reason why there is none."""


def answers(annotator: Annotator, faces: Table, batch_size: int, concurrency: int) -> Generator[Answer, None, None]:
    """The annotator's answers to all rows, in row order. Close the iterator to leave Ray early. Raises JobStopped when
    the annotator cannot go on, in the place of the first row that has no answer. It comes from a task as a value: what
    Ray makes of an exception is no line for a person."""
    if not faces.rows:
        return
    pieces = _pieces(faces, batch_size)
    with _ray(concurrency):
        import ray

        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        bound = getattr(annotator, "one_machine", False)
        gpus = getattr(annotator, "gpus", 0.0) if "GPU" in ray.cluster_resources() else 0.0
        if (home := getattr(annotator, "home", None)) and not bound:
            annotator = cast(Any, annotator).kept_by(_kept_here(home, here))
        data = ray.data.range(len(pieces), override_num_blocks=min(len(pieces), _MAX_BLOCKS)).map_batches(
            lambda numbers: _annotate(annotator, pieces[int(numbers["id"][0])], batch_size),
            batch_size=1,
            num_cpus=_TASK_CPUS,
            num_gpus=gpus or None,
            concurrency=concurrency,
            label_selector=here if bound else None,
        )
        batches = iter(data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
        with closing(cast(Generator[pa.Table, None, None], batches)):
            for batch in batches:
                for row in cast(pa.Table, batch).to_pylist():
                    if row["stop"] is not None:
                        raise JobStopped(row["stop"])
                    annotation = None if row["reply"] is None else Annotation(**json.loads(row["reply"]))
                    yield row["image_id"], annotation, row["reason"]


def _kept_here(home: Path, here: Mapping[str, str]) -> Opening:
    """Who has the replies under `home` open on the driver's machine. Raises JobStopped when that cannot be."""
    import ray

    Replies(home).close()
    return partial(_Remote, ray.remote(Replies).options(num_cpus=0, label_selector=dict(here)).remote(home))


@dataclass(frozen=True)
class _Remote:
    """Replies that an actor of Ray keeps. Raises JobStopped as `Replies` does, and when the actor cannot be reached."""

    actor: Any

    def read(self, image_id: str, key: str) -> Reply | None:
        return cast("Reply | None", self._asked("read", image_id, key))

    def write(self, reply: Reply) -> None:
        self._asked("write", reply)

    def close(self) -> None:
        """The actor ends with the job."""

    def _asked(self, method: str, *given: Any) -> Any:
        import ray

        try:
            return ray.get(getattr(self.actor, method).remote(*given))
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, JobStopped):
                raise cause from None
            raise JobStopped(f"the replies on the driver's machine are out of reach: {one_line(error)}") from None


def _pieces(faces: Table, batch_size: int) -> list[Piece]:
    """Row groups of all shards in row order, gathered until a piece fills a batch."""
    pieces: list[Piece] = []
    for shard in faces.manifest["shards"]:
        path = (faces.path / shard["name"]).resolve()
        metadata = pq.read_metadata(path)
        gathered: list[int] = []
        rows = 0
        for number in range(metadata.num_row_groups):
            gathered.append(number)
            rows += metadata.row_group(number).num_rows
            if rows >= batch_size or number + 1 == metadata.num_row_groups:
                pieces.append((str(path), tuple(gathered)))
                gathered, rows = [], 0
    return pieces


def _annotate(annotator: Annotator, piece: Piece, batch_size: int) -> pa.Table:
    """One piece, in a Ray worker: replies as JSON, so that any annotator's labels fit one column; a last row tells why
    the annotator stopped, if it did."""
    path, groups = piece
    columns = {"image_id", *annotator.columns, *(("image",) if annotator.needs_image else ())}
    made: list[dict[str, str]] = []
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=batch_size, row_groups=list(groups), columns=sorted(columns)):
            rows = batch.to_pylist()
            try:
                said = answers_one_by_one(annotator, rows)
            except JobStopped as stop:
                made.append({"image_id": rows[0]["image_id"], "reason": "", "stop": str(stop)})
                break
            made += [{"image_id": row["image_id"], **_written(one)} for row, one in zip(rows, said, strict=True)]
    return pa.Table.from_pylist(made, _ANSWERS)


def _written(said: Annotation | Exception) -> dict[str, str]:
    """The reply, or the reason why there is none."""
    if isinstance(said, Annotation):
        try:
            return {"reply": json.dumps(vars(checked(said))), "reason": ""}
        except (ValueError, TypeError) as error:
            said = error
    return {"reason": str(said) if isinstance(said, RowRefused) else f"{type(said).__name__}: {said}"}


@contextmanager
def _ray(concurrency: int) -> Iterator[None]:
    """Ray, quiet and order-preserving: the one already connected, the head at `RAY_ADDRESS`, or one of our own."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own of 15 lets any other process starve the tasks
    import ray
    import ray.data

    connected = ray.is_initialized()
    if not connected:
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if address := os.environ.get("RAY_ADDRESS"):
            try:
                ray.init(address=address, **quiet)
            except ConnectionError:  # an OSError, which a table writer would take for trouble with its disk
                raise UserError(
                    f"no Ray head lets us in at RAY_ADDRESS={address}; start it, give its token, or unset RAY_ADDRESS"
                ) from None
        else:
            cores = max(2, concurrency)
            ray.init(num_cpus=cores, include_dashboard=False, object_store_memory=_OBJECT_STORE, **quiet)
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    _learn_resources_soon()
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


def _learn_resources_soon() -> None:
    """Ray Data learns from an actor of its own what the cluster has, and asks it once a second: its first question
    mostly comes too early, and a second task then waits for a second although there is room for it."""
    with suppress(ImportError):
        from ray.data._internal.execution.resource_manager import ResourceManager

        ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S = 0.1  # type: ignore[assignment]
