"""Where a run's checkpoints are kept, a folder or S3, and how they get there: in the background, one at a time.

A file appears under its name only with all its bytes, and the file that names the others comes last, so that a kill at
any moment leaves the checkpoints before it whole. Every attempt writes under names of its own.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
from torch import Tensor

from facemllm.core.objects import filesystem, reached
from facemllm.train import checkpoint

KEPT = 2
_NAME = re.compile(r"checkpoint-(\d{8})-(\d{4})")
_SCRATCH = ".writing-"


def location(storage: str | None, work: Path, run: str) -> str:
    """Where the checkpoints of a run are: under `storage`, a folder or s3://bucket/prefix, else in its work folder."""
    if storage is None:
        return str(work / run)
    return f"{storage.rstrip('/')}/{run}" if "://" in storage else str(Path(storage).expanduser().resolve() / run)


class CheckpointStore:
    """The checkpoints of one run at `place`; `work` is a folder of this machine for what is on its way."""

    def __init__(self, place: str, work: Path) -> None:
        self.place = place
        self._fs, self._path = filesystem(place)
        self._here = isinstance(self._fs, pafs.LocalFileSystem)
        self._scratch = Path(place) if self._here else work

    def names(self) -> list[str]:
        """Names of the checkpoints, whole or not, newest first. Folders without files are none: some S3 servers still
        list those that were emptied."""
        with self._reached():
            found = self._fs.get_file_info(pafs.FileSelector(self._path, allow_not_found=True, recursive=True))
        holding = {Path(entry.path).parent.name for entry in found if entry.is_file}
        return sorted(filter(_NAME.fullmatch, holding), reverse=True)

    @contextmanager
    def newest(
        self, first: bool = True, broadcast: Callable[[Any], Any] = lambda value: value
    ) -> Iterator[tuple[Path | None, int]]:
        """Folder of the newest whole checkpoint, None without one, and the number of this attempt. The `first` rank
        finds it; `broadcast` gives the others what that one has, so that all go on from the same."""
        chosen, attempt = None, 1
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as fetched:
            if first:
                for left in self._scratch.glob(f"{_SCRATCH}*"):  # what an attempt that was killed had not finished
                    shutil.rmtree(left, ignore_errors=True)
                names = self.names()
                attempt = 1 + max((int(_NAME.fullmatch(name)[2]) for name in names), default=0)  # type: ignore[index]
                chosen = next((name for name in names if checkpoint.is_whole(self._fetch(name, fetched))), None)
            chosen, attempt = broadcast((chosen, attempt))
            yield (self._fetch(chosen, fetched) if chosen is not None else None), attempt

    def put(self, step: int, attempt: int, write: Callable[[Path], list[Path]]) -> None:
        """Write the files of a checkpoint of this rank. Raises UserError when they find no room."""
        self._scratch.mkdir(parents=True, exist_ok=True)
        name = f"checkpoint-{step:08d}-{attempt:04d}"
        with self._reached(), tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=self._scratch) as scratch:
            for file in write(Path(scratch)):
                if self._here:
                    (Path(self.place) / name).mkdir(exist_ok=True)
                    file.replace(Path(self.place) / name / file.name)
                else:
                    self._send(file, f"{self._path}/{name}/{file.name}")

    def prune(self, keep: int) -> None:
        """Delete all but the `keep` newest whole checkpoints and what is newer than the oldest of those."""
        names, whole = self.names(), 0
        for place, name in enumerate(names):
            whole += self._listed(name)
            if whole == keep:
                for old in names[place + 1 :]:
                    with self._reached():
                        self._fs.delete_dir(f"{self._path}/{old}")
                return

    def clear(self) -> None:
        """Delete the run's checkpoints: its model is written."""
        with self._reached():
            if self._fs.get_file_info(self._path).type != pafs.FileType.NotFound:
                self._fs.delete_dir(self._path)

    def _listed(self, name: str) -> bool:
        """Whether all files that a checkpoint names are there; they arrive with all their bytes."""
        found = self._fs.get_file_info(pafs.FileSelector(f"{self._path}/{name}", allow_not_found=True))
        there = {entry.base_name for entry in found}
        if checkpoint.STATE not in there:
            return False
        with self._fs.open_input_stream(f"{self._path}/{name}/{checkpoint.STATE}") as stream:
            return set(json.loads(stream.read())["files"]) <= there

    def _fetch(self, name: str, folder: str) -> Path:
        if self._here:
            return Path(self.place) / name
        local = Path(folder) / name
        if not local.exists():
            local.mkdir()
            with self._reached():
                pafs.copy_files(f"{self._path}/{name}", str(local), source_filesystem=self._fs)
        return local

    def _send(self, file: Path, path: str) -> None:
        # threads of pyarrow's own can hang on S3 (apache/arrow#32372)
        pafs.copy_files(
            str(file),
            path,
            source_filesystem=pafs.LocalFileSystem(),
            destination_filesystem=self._fs,
            use_threads=False,
        )

    def _reached(self) -> AbstractContextManager[None]:
        return reached(f"checkpoints at {self.place}", "is there room, and may you write there?")


@contextmanager
def saving(
    store: CheckpointStore, attempt: int, *, prunes: bool = True
) -> Iterator[Callable[[int, checkpoint.Checkpoint], None]]:
    """Saves checkpoints while training goes on: `save(step, checkpoint)` copies the tensors and returns. One is on its
    way at a time; the next waits for it. Leaving the block waits for the last. Raises what went wrong."""
    pending: Future[None] | None = None
    buffers: Mapping[str, Tensor] | None = None

    def write(step: int, clone: checkpoint.Checkpoint) -> None:
        store.put(step, attempt, clone.write)
        if prunes:
            store.prune(KEPT)

    def save(step: int, live: checkpoint.Checkpoint) -> None:
        nonlocal pending, buffers
        if pending is not None:
            pending.result()
        clone = live.clone(buffers)
        buffers, pending = clone.tensors, pool.submit(write, step, clone)

    with ThreadPoolExecutor(1, thread_name_prefix="checkpoint") as pool:
        yield save
    if pending is not None:
        pending.result()
