"""The step `version`: `record` two tables as one revision; `restore` it; `log` all; `has` asks for one; `diff` two.

The bytes are pushed to the remote before the commit is made, so a revision that exists can be restored, and an
interrupted recording leaves nothing that the next one does not put right. What was forgotten is neither recorded nor
restored (`facemllm.version.tombstones`).

`diff` tells rows by `image_id`, which names the picture's bytes, so pictures are not read, let alone brought back: the
columns come out of the cache or the remote as they lie there. A conversation's own id follows from its content and is
left out of the comparison. Of every row a digest is kept, of one revision at a time; of changed rows a digest a column.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from facemllm.core import progress
from facemllm.core.files import atomic_write, building
from facemllm.errors import UserError
from facemllm.settings import Settings
from facemllm.tables import CONVERSATIONS, FACES, MANIFEST, QUARANTINE, Table, open_table
from facemllm.version import ledger
from facemllm.version.archive import Archive, archive, listing_of, opened
from facemllm.version.repository import REMOTE, TABLES, Repository, Revision
from facemllm.version.tombstones import Tombstones

SCHEMAS = {"faces": FACES, "conversations": CONVERSATIONS}
KEY = "image_id"
LISTED = 20
_UNREAD = {"image", "images", "conversation_id"}
_BYTES = 8  # of a column's digest


def record(settings: Settings, faces: Path, conversations: Path) -> Revision:
    """Record both tables as one revision in the data repository and its remote; both are made if absent.

    The same bytes give the same revision, and no new commit; another recording is waited for. Raises UserError if a
    table is damaged or holds rows that were forgotten, or the remote cannot be written.
    """
    repository = Repository.of(settings)
    tables = {"faces": open_table(faces, FACES), "conversations": open_table(conversations, CONVERSATIONS)}
    ledger.require(settings, tables["faces"].sources)
    with repository.lock(wait=True):
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
    _require_standing(forgotten, found.sha, "restore")
    with building(out) as partial:
        fetch(repository, found, partial)
        for name, schema in SCHEMAS.items():
            forgotten.refuse(open_table(partial / name, schema), f"revision {found.sha[:12]}, {name}")
    return found


def _require_standing(forgotten: Tombstones, sha: str, verb: str) -> None:
    if sha in forgotten.replaced:
        newest = forgotten.newest(sha)
        instead = f"{verb} {newest[:12]}, which replaces it" if newest else "nothing replaces it"
        raise UserError(f"revision {sha[:12]} held rows that were forgotten and is gone; {instead}")


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


def diff(settings: Settings, a: str, b: str, listed: int = LISTED) -> dict[str, Any]:
    """What changed from revision `a` to `b`, ready for JSON: counts a table, and the first `listed` rows of each kind.

    Raises UserError if a revision is unknown, its bytes are nowhere, or it is gone because rows in it were forgotten.
    """
    repository = Repository.of(settings)
    first, second = repository.resolve(a), repository.resolve(b)
    forgotten = Tombstones.of(settings)
    for revision in (first, second):
        _require_standing(forgotten, revision, "compare")
    with archive(repository) as objects, progress.bar("comparing", len(TABLES)) as bar:
        tables = {}
        for done, table in enumerate(TABLES, start=1):
            tables[table] = _table_diff(objects, table, first, second, listed)
            bar.update(done, table)
    return {"a": first, "b": second, "tables": tables}


def render_diff(found: Mapping[str, Any]) -> str:
    """What `diff` gives, as plain text: a line a table, then the rows."""
    lines = [f"{found['a'][:12]} -> {found['b'][:12]}"]
    head = ("table", "added", "removed", "changed", "same")
    counts = [(name, *(f"{part[kind]:,}" for kind in head[1:])) for name, part in found["tables"].items()]
    widths = [max(len(row[place]) for row in (head, *counts)) for place in range(len(head))]
    for row in (head, *counts):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells))
    for name, part in found["tables"].items():
        if part["columns"]:
            changed = ", ".join(f"{column} ({count:,})" for column, count in part["columns"].items())
            lines.append(f"{name}, columns changed: {changed}")
        for kind in ("added", "removed", "changed"):
            rows = part["rows"][kind]
            lines += [f"  {kind} {row[KEY]} {', '.join(row.get('columns', ()))}".rstrip() for row in rows]
            if part[kind] > len(rows):
                lines.append(f"  {kind}: {part[kind] - len(rows):,} more")
    return "\n".join(lines)


def _table_diff(objects: Archive, table: str, first: str, second: str, listed: int) -> dict[str, Any]:
    old_side, new_side = (_manifest(objects, revision, table) for revision in (first, second))
    shared = {shard["sha256"] for shard in old_side["shards"]} & {shard["sha256"] for shard in new_side["shards"]}
    old = _digests(objects, first, table, shared)
    new = _digests(objects, second, table, shared)
    same = sum(shard["rows"] for shard in old_side["shards"] if shard["sha256"] in shared)
    added = [key for key in new if key not in old]
    removed = [key for key in old if key not in new]
    changed = [key for key in new if key in old and new[key] != old[key]]
    same += len(new) - len(added) - len(changed)
    del old, new
    columns = _changed_columns(objects, table, first, second, shared, changed)
    counts = Counter(name for names in columns.values() for name in names)
    rows = {
        "added": [{KEY: key} for key in added[:listed]],
        "removed": [{KEY: key} for key in removed[:listed]],
        "changed": [{KEY: key, "columns": columns[key]} for key in changed[:listed]],
    }
    result = {"a": old_side["digest"], "b": new_side["digest"]}
    result |= {"added": len(added), "removed": len(removed), "changed": len(changed), "same": same}
    return result | {"columns": dict(sorted(counts.items())), "rows": rows}


def _manifest(objects: Archive, revision: str, table: str) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads(objects.repository.show(revision, f"manifests/{table}.json"))
    return manifest


def _rows(objects: Archive, revision: str, table: str, shared: set[str]) -> Iterator[dict[str, Any]]:
    """Rows without their pictures, of all shards but those that both revisions have."""
    files = objects.files(revision, table)
    for shard in _manifest(objects, revision, table)["shards"]:
        if shard["sha256"] in shared:
            continue
        with objects.parquet(files[shard["name"]]) as file:
            if file is None:
                raise UserError(f"revision {revision[:12]}, {table}: {shard['name']} is not a Parquet file")
            columns = [name for name in file.schema_arrow.names if name not in _UNREAD]
            for batch in file.iter_batches(batch_size=256, columns=columns):
                yield from batch.to_pylist()


def _digests(objects: Archive, revision: str, table: str, shared: set[str]) -> dict[str, bytes]:
    """Digest of every row by its key; of rows with one key (several conversations about a picture) of all together."""
    found: dict[str, bytes] = {}
    for row in _rows(objects, revision, table, shared):
        key = row.pop(KEY)
        found[key] = hashlib.blake2b(found.get(key, b"") + _bytes(row), digest_size=16).digest()
    return found


def _changed_columns(
    objects: Archive, table: str, first: str, second: str, shared: set[str], keys: list[str]
) -> dict[str, list[str]]:
    """Names of the columns that changed, by key."""
    if not keys:
        return {}
    names = [name for name in SCHEMAS[table].names if name not in {KEY, *_UNREAD}]
    old, new = (dict.fromkeys(keys, b"") for _ in range(2))
    for revision, packed in ((first, old), (second, new)):
        for row in _rows(objects, revision, table, shared):
            if (key := row[KEY]) in packed:
                before = _split(packed[key]) or [b""] * len(names)
                packed[key] = b"".join(
                    hashlib.blake2b(state + _bytes(row.get(name)), digest_size=_BYTES).digest()
                    for state, name in zip(before, names, strict=True)
                )
    return {
        key: [n for n, a, b in zip(names, _split(old[key]), _split(new[key]), strict=True) if a != b] for key in keys
    }


def _split(packed: bytes) -> list[bytes]:
    return [packed[start : start + _BYTES] for start in range(0, len(packed), _BYTES)]


def _bytes(value: Any) -> bytes:
    if isinstance(value, dict):  # an absent column and an empty one are the same, in whatever order they come
        value = sorted((name, part) for name, part in value.items() if part is not None)
    return repr(value).encode()
