"""The step `version`: `record` two tables as one revision; `restore` it; `log` all; `has` asks for one.

The bytes are pushed to the remote before the commit is made, so a revision that exists can be restored, and an
interrupted recording leaves nothing that the next one does not put right. What was forgotten is neither recorded nor
restored (`facemllm.version.tombstones`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from facemllm.core.files import atomic_write, partial_folder, publish
from facemllm.errors import UserError
from facemllm.settings import Settings
from facemllm.tables import CONVERSATIONS, FACES, MANIFEST, QUARANTINE, Table, open_table
from facemllm.version import ledger
from facemllm.version.archive import Archive, archive, listing_of, opened
from facemllm.version.repository import REMOTE, TABLES, Repository, Revision
from facemllm.version.tombstones import Tombstones

SCHEMAS = {"faces": FACES, "conversations": CONVERSATIONS}


def record(settings: Settings, faces: Path, conversations: Path) -> Revision:
    """Record both tables as one revision in the data repository and its remote; both are made if absent.

    The same bytes give the same revision, and no new commit. Raises UserError if a table is damaged or holds rows that
    were forgotten, the repository is in use, or the remote cannot be written.
    """
    repository = Repository.of(settings)
    tables = {"faces": open_table(faces, FACES), "conversations": open_table(conversations, CONVERSATIONS)}
    ledger.require(settings, tables["faces"].sources)
    with repository.lock():
        forgotten = Tombstones.of(settings)
        for table in tables.values():
            forgotten.refuse(table, str(table.path))
        repository.make()
        repository.clear_leftovers()
        return keep(repository, tables)


def keep(repository: Repository, tables: Mapping[str, Table]) -> Revision:
    """Record tables as they are. Call with the lock held, the repository made and its leftovers cleared."""
    with opened(repository) as dvc:
        for name, table in tables.items():
            _place(table, repository.path / name)
        dvc.add([str(repository.path / name) for name in TABLES])
        dvc.push(remote=REMOTE)
        _complete(Archive.of(repository, dvc))
    for name, table in tables.items():
        manifest = repository.path / "manifests" / f"{name}.json"
        atomic_write(manifest, (table.path / MANIFEST).read_bytes())
    message = "\n".join(f"{name} {table.digest} ({table.rows} rows)" for name, table in tables.items())
    sha, new = repository.commit(f"data\n\n{message}")
    repository.clear_leftovers()
    return repository.revision(sha, new)


def _complete(objects: Archive) -> None:
    """Push what DVC left out: where a listing lies in the remote, it takes the listed files for granted."""
    cache, remote = objects.stores["cache"], objects.stores["remote"]
    for oid in sorted(objects.unsent(None)):
        remote.add(cache.oid_to_path(oid), cache.fs, oid)


def restore(settings: Settings, revision: str, out: Path) -> Revision:
    """Bring the very bytes of a revision back into `out/faces` and `out/conversations`, checked against manifests.

    Takes them from the local cache, or from the remote where the cache lacks them. Raises UserError if the revision is
    unknown, its bytes are nowhere or not what was recorded, or rows in it were forgotten.
    """
    repository = Repository.of(settings)
    found = repository.revision(repository.resolve(revision))
    forgotten = Tombstones.of(settings)
    if found.sha in forgotten.replaced:
        newest = forgotten.newest(found.sha)
        instead = f"restore {newest[:12]}, which replaces it" if newest else "nothing replaces it"
        raise UserError(f"revision {found.sha[:12]} held rows that were forgotten and is gone; {instead}")
    partial = partial_folder(out)
    try:
        fetch(repository, found, partial)
        for name, schema in SCHEMAS.items():
            forgotten.refuse(open_table(partial / name, schema), f"revision {found.sha[:12]}, {name}")
        publish(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return found


def log(settings: Settings) -> list[dict[str, Any]]:
    """All revisions, newest first: sha, digests and row counts of both tables, and what became of them.

    `replaced_by` names the revision that stands in for one with forgotten rows ("" if none can, None if it stands),
    `replaces` the ones that a revision stands in for.
    """
    repository, replaced = Repository.of(settings), Tombstones.of(settings).replaced
    entries = [asdict(repository.revision(sha)) for sha in repository.revisions()]
    for entry in entries:
        del entry["new"]
        entry["replaced_by"] = replaced.get(entry["sha"])
        entry["replaces"] = sorted(old for old, new in replaced.items() if new == entry["sha"])
    return entries


def render_log(entries: Sequence[Mapping[str, Any]]) -> str:
    """What `log` gives, as a line a revision."""
    lines = []
    for entry in entries:
        parts = [f"{name} {entry[name][:12]} ({entry[f'{name}_rows']:,} rows)" for name in TABLES]
        if entry["replaced_by"] is not None:
            parts.append(f"forgotten rows, replaced by {entry['replaced_by'][:12] or 'none'}")
        if entry["replaces"]:
            parts.append(f"replaces {', '.join(old[:12] for old in entry['replaces'])}")
        lines.append("  ".join([entry["sha"][:12], *parts]))
    return "\n".join(lines) or "nothing is recorded yet"


def has(settings: Settings, revision: str) -> bool:
    """Whether a revision is recorded, stands, and has all its bytes in the remote.

    A folder is looked into, any other remote is asked. Raises UserError when that one does not answer.
    """
    repository = Repository.of(settings)
    if revision not in repository.revisions() or revision in Tombstones.of(settings).replaced:
        return False
    if "://" in repository.remote:
        with archive(repository) as objects:
            return not objects.unsent(revision)
    stored = Path(repository.remote) / "files" / "md5"
    for name in TABLES:
        listed = listing_of(repository, revision, name)
        listing = stored / listed[:2] / listed[2:]
        if not listing.is_file():
            return False
        files = [entry["md5"] for entry in json.loads(listing.read_text("utf-8"))]
        if not all((stored / md5[:2] / md5[2:]).is_file() for md5 in files):
            return False
    return True


def fetch(repository: Repository, revision: Revision, folder: Path) -> None:
    """Bring a revision's tables into `folder` and check them."""
    short = f"revision {revision.sha[:12]}"
    try:
        with opened(repository, revision.sha) as dvc:
            for name in TABLES:
                dvc.dvcfs.get(f"/{name}", str(folder / name), recursive=True)
        for name, schema in SCHEMAS.items():
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
        link(table.path / name, target / name)


def link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
