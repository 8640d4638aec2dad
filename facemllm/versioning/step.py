"""The step `version`: `record` two tables as one revision; `restore` it; `log` all; `has` asks for one.

The bytes are pushed to the remote before the commit is made, so a revision that exists can be restored, and an
interrupted recording leaves nothing that the next one does not put right.
"""

from __future__ import annotations

import json
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
    Table,
    atomic_write,
    open_table,
    partial_folder,
    publish,
)
from facemllm.settings import Settings
from facemllm.versioning.repository import REMOTE, TABLES, Repository, Revision, clean_environment

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
                _place(table, repository.path / name, linked=table.path.resolve().is_relative_to(settings.home))
            dvc.add([str(repository.path / name) for name in TABLES])
            dvc.push(remote=REMOTE)
        for name, table in tables.items():
            manifest = repository.path / "manifests" / f"{name}.json"
            atomic_write(manifest, (table.path / MANIFEST).read_bytes())
        message = "\n".join(f"{name} {table.digest} ({table.rows} rows)" for name, table in tables.items())
        sha, new = repository.commit(f"data\n\n{message}")
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
        with _dvc(repository, found.sha) as dvc:
            for name in TABLES:
                dvc.dvcfs.get(f"/{name}", str(partial / name), recursive=True)
        for name in TABLES:
            table = open_table(partial / name, _SCHEMAS[name])
            if table.digest != getattr(found, name):
                raise UserError(f"revision {found.sha[:12]}: restored '{name}' is not what was recorded")
        publish(partial, out)
    except UserError as error:
        text = str(error).replace(str(partial), f"revision {found.sha[:12]}")
        raise UserError(f"{text} (cache {repository.path / '.dvc' / 'cache'}, remote {repository.remote})") from None
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


def _place(table: Table, target: Path, linked: bool) -> None:
    """Put a table's files under `target`. Results of our own store are never written again and so may be linked;
    DVC then takes the write permission off both names. Other folders are copied, for they stay their owner's."""
    target.mkdir()
    for file in sorted(p for p in table.path.iterdir() if p.is_file()):
        try:
            if not linked:
                raise OSError("copy")
            os.link(file, target / file.name)
        except OSError:
            shutil.copyfile(file, target / file.name)


@contextmanager
def _dvc(repository: Repository, revision: str | None = None) -> Iterator[Any]:
    """An open DVC repository; its errors become UserError, and it reads and writes nothing outside the repository."""
    private = repository.path / ".dvc" / "tmp"
    overlay = {
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(private / "site"),
        "DVC_GLOBAL_CONFIG_DIR": str(private / "no-config"),
        "DVC_SYSTEM_CONFIG_DIR": str(private / "no-config"),
    }
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(clean_environment() | overlay)
    try:
        from dvc.exceptions import DvcException
        from dvc.repo import Repo

        try:
            with Repo(str(repository.path), rev=revision, config=repository.dvc_config()) as dvc:
                yield dvc
        except (DvcException, OSError, ImportError) as error:
            raise UserError(_explained(error, repository)) from error
    finally:
        os.environ.clear()
        os.environ.update(before)


def _explained(error: Exception, repository: Repository) -> str:
    if isinstance(error, FileNotFoundError):
        return f"recorded bytes are missing from the DVC cache and remote ({error})"
    said = " ".join(str(error).split()) or type(error).__name__
    return f"DVC failed in {repository.path} (remote {repository.remote}): {said}"
