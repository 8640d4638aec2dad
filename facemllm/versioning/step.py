"""The step `version`: `record` two tables as one revision; `restore` it; `log` all; `has` asks for one.

The bytes are pushed to the remote before the commit is made, so a revision that exists can be restored, and an
interrupted recording leaves nothing that the next one does not put right.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from facemllm.errors import UserError
from facemllm.records import (
    CONVERSATIONS,
    FACES,
    MANIFEST,
    QUARANTINE,
    Table,
    atomic_write,
    open_table,
    partial_folder,
    publish,
)
from facemllm.settings import Settings
from facemllm.versioning.repository import REMOTE, TABLES, Repository, Revision, git_settings

_SCHEMAS = {"faces": FACES, "conversations": CONVERSATIONS}


def record(settings: Settings, faces: Path, conversations: Path) -> Revision:
    """Record both tables as one revision in the data repository and its remote; both are made if absent.

    The same bytes give the same revision, and no new commit. Raises UserError if a table is damaged, the repository
    is in use, or the remote cannot be written.
    """
    repository = Repository.of(settings)
    tables = {"faces": open_table(faces, FACES), "conversations": open_table(conversations, CONVERSATIONS)}
    with repository.lock():
        repository.make()
        repository.clear_leftovers()
        with _dvc(repository) as dvc:
            for name, table in tables.items():
                _place(table, repository.path / name)
            dvc.add([str(repository.path / name) for name in TABLES])
            dvc.push(remote=REMOTE)
        for name, table in tables.items():
            manifest = repository.path / "manifests" / f"{name}.json"
            atomic_write(manifest, (table.path / MANIFEST).read_bytes())
        message = "\n".join(f"{name} {table.digest} ({table.rows} rows)" for name, table in tables.items())
        sha, new = repository.commit(f"data\n\n{message}")
        repository.clear_leftovers()
    return repository.revision(sha, new)


def restore(settings: Settings, revision: str, out: Path) -> Revision:
    """Bring the very bytes of a revision back into `out/faces` and `out/conversations`, checked against manifests.

    Takes them from the local cache, or from the remote where the cache lacks them. Raises UserError if the revision is
    unknown, its bytes are nowhere, or they are not what was recorded.
    """
    repository = Repository.of(settings)
    found = repository.revision(repository.resolve(revision))
    partial = partial_folder(out)
    try:
        _fetch(repository, found, partial)
        publish(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return found


def log(settings: Settings) -> list[dict[str, Any]]:
    """All revisions, newest first: sha, digests and row counts of both tables."""
    repository = Repository.of(settings)
    entries = [asdict(repository.revision(sha)) for sha in repository.revisions()]
    for entry in entries:
        del entry["new"]
    return entries


def has(settings: Settings, revision: str) -> bool:
    """Whether a revision is recorded and, where the remote is a folder, its bytes are there."""
    repository = Repository.of(settings)
    if revision not in repository.revisions():
        return False
    if "://" in repository.remote:
        return True
    objects = Path(repository.remote) / "files" / "md5"
    for name in TABLES:
        listed = yaml.safe_load(repository.show(revision, f"{name}.dvc"))["outs"][0]["md5"]
        listing = objects / listed[:2] / listed[2:]
        if not listing.is_file():
            return False
        files = [entry["md5"] for entry in json.loads(listing.read_text("utf-8"))]
        if not all((objects / md5[:2] / md5[2:]).is_file() for md5 in files):
            return False
    return True


def _fetch(repository: Repository, revision: Revision, folder: Path) -> None:
    """Bring a revision's tables into `folder` and check them."""
    short = f"revision {revision.sha[:12]}"
    try:
        with _dvc(repository, revision.sha) as dvc:
            for name in TABLES:
                dvc.dvcfs.get(f"/{name}", str(folder / name), recursive=True)
        for name, schema in _SCHEMAS.items():
            if open_table(folder / name, schema).digest != getattr(revision, name):
                raise UserError(f"{short}: restored '{name}' is not what was recorded")
    except UserError as error:
        cache = repository.path / ".dvc" / "cache"
        hint = f"remote {repository.remote}; delete {cache} to take everything from the remote"
        raise UserError(f"{str(error).replace(str(folder), short)} ({hint})") from None


def _place(table: Table, target: Path) -> None:
    """Give a table's files a second name under `target` for as long as DVC copies (or reflinks) them into its cache.

    A link costs nothing; its originals stay as they are, for these names are gone when the recording is done.
    Files that are no part of the table are left out, for they would change the revision's name.
    """
    target.mkdir()
    parts = [MANIFEST, *(shard["name"] for shard in table.manifest["shards"])]
    for name in parts + [QUARANTINE] * ("quarantine_sha256" in table.manifest):
        try:
            os.link(table.path / name, target / name)
        except OSError:
            shutil.copyfile(table.path / name, target / name)


@contextmanager
def _dvc(repository: Repository, revision: str | None = None) -> Iterator[Any]:
    """An open DVC repository, silent, that reads and writes no settings or caches outside its own folder.

    DVC's errors become UserError.
    """
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


def _explained(error: BaseException, repository: Repository) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, FileNotFoundError):
            return f"recorded bytes are in neither cache nor remote ({cause.filename or cause})"
        cause = cause.__cause__
    said = " ".join(str(error).split()) or type(error).__name__
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
