"""The DVC side of the data repository: an open one, and the objects (files by MD5) in its cache and its remote.

`opened(repository)` gives DVC itself, silent and kept to its folder. `Archive` reads objects where they lie: one file
of a revision, or a few of its columns, without restoring the rest.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from facemllm.errors import UserError, one_line
from facemllm.version.repository import REMOTE, TABLES, Repository, git_settings

PARQUET = b"PAR1"


@dataclass(frozen=True)
class Archive:
    """The objects of an open DVC repository: `stores` are its cache and its remote, by name, the nearest first."""

    repository: Repository
    stores: dict[str, Any]
    _listings: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, repository: Repository, dvc: Any) -> Archive:
        """The objects of a repository that `opened` gave."""
        remote = dvc.cloud.get_remote_odb(REMOTE)
        if forget_listings := getattr(remote.fs.fs, "invalidate_cache", None):
            forget_listings()  # S3's client remembers what it listed, for as long as the process lives
        return cls(repository, {"cache": dvc.cache.local, "remote": remote})

    def files(self, revision: str | None, table: str) -> dict[str, str]:
        """MD5 of every file of a table by its name; None is what is about to be recorded.

        Raises UserError if the listing itself is nowhere.
        """
        listing = listing_of(self.repository, revision, table)
        if listing not in self._listings:
            with self.open(listing) as file:
                self._listings[listing] = {entry["relpath"]: entry["md5"] for entry in json.loads(file.read())}
        return self._listings[listing]

    def objects(self, revision: str | None) -> set[str]:
        """Names of all objects of a revision, listings included; of a table whose listing is nowhere, that name.

        None is what is about to be recorded.
        """
        found: set[str] = set()
        for table in TABLES:
            found.add(listing_of(self.repository, revision, table))
            try:
                found |= set(self.files(revision, table).values())
            except UserError:
                continue
        return found

    def unsent(self, revision: str | None) -> set[str]:
        """Names of the objects of a revision that the remote lacks."""
        remote, named = self.stores["remote"], self.objects(revision)
        if "://" in self.repository.remote:
            return named - set(remote.oids_exist(sorted(named)))
        return {oid for oid in named if not remote.exists(oid)}  # a folder's `oids_exist` reads every byte

    def holds(self, oid: str) -> bool:
        """Whether an object is in the cache or in the remote."""
        return any(store.exists(oid) for store in self.stores.values())

    def open(self, oid: str) -> Any:
        """An object as a binary file to read from. Raises UserError if it is nowhere."""
        for store in self.stores.values():
            if store.exists(oid):
                return store.fs.open(store.oid_to_path(oid), "rb")
        raise UserError(f"recorded bytes are in neither cache nor remote (object {oid}, {self.repository.remote})")

    @contextmanager
    def parquet(self, oid: str) -> Iterator[pq.ParquetFile | None]:
        """An object as a Parquet file; None when it is something else. Raises UserError when it is damaged."""
        with self.open(oid) as file:
            if file.read(len(PARQUET)) != PARQUET:
                yield None
                return
            file.seek(0)
            try:
                yield pq.ParquetFile(file)
            except (pa.ArrowInvalid, OSError) as error:
                if type(error) not in (pa.ArrowInvalid, OSError):  # a remote out of reach, and the like
                    raise
                said = one_line(error)
                raise UserError(
                    f"object {oid} in {self.repository.path} or its remote is damaged ({said}); "
                    f"delete {self.repository.path / '.dvc' / 'cache'} to take everything from the remote"
                ) from None

    def delete(self, oid: str) -> int:
        """Delete an object from cache and remote; how many copies there were."""
        held = [store for store in self.stores.values() if store.exists(oid)]
        for store in held:
            store.delete(oid)
        return len(held)

    def everything(self) -> set[str]:
        """Names of all objects in cache and remote, those of no revision included."""
        return {oid for store in self.stores.values() for oid in store.all()}


def listing_of(repository: Repository, revision: str | None, table: str) -> str:
    """Name of the object that lists a table's files; None is what is about to be recorded."""
    name = f"{table}.dvc"
    text = (repository.path / name).read_text("utf-8") if revision is None else repository.show(revision, name)
    return str(yaml.safe_load(text)["outs"][0]["md5"])


@contextmanager
def opened(repository: Repository, revision: str | None = None) -> Iterator[Any]:
    """An open DVC repository, silent, that reads and writes no settings or caches outside its own folder.

    DVC's errors become UserError.
    """
    if repository.remote.startswith("s3://") and find_spec("dvc_s3") is None:
        raise UserError(f"version.remote: {repository.remote} needs a package that is not here: pip install dvc-s3")
    private = repository.path / ".dvc" / "tmp"
    private_settings = {
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(private / "site"),
        "DVC_GLOBAL_CONFIG_DIR": str(private / "no-config"),
        "DVC_SYSTEM_CONFIG_DIR": str(private / "no-config"),
    }
    with _environment(private_settings):
        try:
            from dvc.repo import Repo
        except ImportError as error:
            raise UserError(f"DVC cannot be imported ({error}); install the project again") from error
        logger = logging.getLogger("dvc")
        level = logger.level
        logger.setLevel(logging.CRITICAL)
        try:
            with Repo(str(repository.path), rev=revision, config=repository.dvc_config()) as dvc:
                yield dvc
        except UserError:
            raise
        except Exception as error:  # DVC's own, its index's, and those of whatever library speaks to the remote
            raise UserError(_explained(error, repository)) from error
        finally:
            logger.setLevel(level)


@contextmanager
def archive(repository: Repository) -> Iterator[Archive]:
    """The objects of a repository; errors on the way to the remote become UserError."""
    with opened(repository) as dvc:
        yield Archive.of(repository, dvc)


def _explained(error: BaseException, repository: Repository) -> str:
    cause: BaseException | None = error
    while cause is not None:
        # S3's client gives the same error for an object and for a bucket that is not there
        if isinstance(cause, FileNotFoundError) and "bucket does not exist" not in str(cause):
            return f"recorded bytes are in neither cache nor remote ({cause.filename or cause})"
        cause = cause.__cause__
    said = one_line(error)
    return f"DVC failed in {repository.path} (remote {repository.remote}): {said}"


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """The process's environment with these values and without the caller's git settings, put back afterwards."""
    before = {key: os.environ.get(key) for key in (*values, *(k for k in os.environ if k.startswith("GIT_")))}
    for key in before:
        os.environ.pop(key, None)
    os.environ.update(git_settings() | values)
    try:
        yield
    finally:
        for key in git_settings() | values:
            os.environ.pop(key, None)
        os.environ.update({key: value for key, value in before.items() if value is not None})
