"""`version diff`: the rows that two revisions do not share, and the columns in which the others changed.

Rows are told by `image_id`, which names the picture's bytes, so pictures are not read, let alone brought back: the
columns come out of the cache or the remote as they lie there. A conversation's own id follows from its content and is
left out of the comparison. Of every row a digest is kept, of one revision at a time; of changed rows a digest a column.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from facemllm.core import progress
from facemllm.errors import UserError
from facemllm.settings import Settings
from facemllm.version.archive import Archive, archive
from facemllm.version.record import SCHEMAS
from facemllm.version.repository import TABLES, Repository
from facemllm.version.tombstones import Tombstones

KEY = "image_id"
LISTED = 20
_UNREAD = {"image", "images", "conversation_id"}
_BYTES = 8  # of a column's digest


def diff(settings: Settings, a: str, b: str, listed: int = LISTED) -> dict[str, Any]:
    """What changed from revision `a` to `b`, ready for JSON: counts a table, and the first `listed` rows of each kind.

    Raises UserError if a revision is unknown, its bytes are nowhere, or it is gone because rows in it were forgotten.
    """
    repository = Repository.of(settings)
    first, second = repository.resolve(a), repository.resolve(b)
    forgotten = Tombstones.of(settings)
    for revision in (first, second):
        if revision in forgotten.replaced:
            newest = forgotten.newest(revision)[:12]
            raise UserError(
                f"revision {revision[:12]} held rows that were forgotten and is gone"
                + (f"; compare {newest}, which replaces it" if newest else "")
            )
    with archive(repository) as objects, progress.bar("comparing", len(TABLES)) as bar:
        tables = {}
        for done, table in enumerate(TABLES, start=1):
            tables[table] = _table_diff(objects, table, first, second, listed)
            bar.update(done, table)
    return {"a": first, "b": second, "tables": tables}


def render(found: Mapping[str, Any]) -> str:
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
        "added": [{KEY: _text(key)} for key in added[:listed]],
        "removed": [{KEY: _text(key)} for key in removed[:listed]],
        "changed": [{KEY: _text(key), "columns": columns[key]} for key in changed[:listed]],
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


def _digests(objects: Archive, revision: str, table: str, shared: set[str]) -> dict[bytes, bytes]:
    """Digest of every row by its key; of rows with one key (several conversations about a picture) of all together."""
    found: dict[bytes, bytes] = {}
    for row in _rows(objects, revision, table, shared):
        key = _key(row.pop(KEY))
        found[key] = hashlib.blake2b(found.get(key, b"") + _bytes(row), digest_size=16).digest()
    return found


def _changed_columns(
    objects: Archive, table: str, first: str, second: str, shared: set[str], keys: list[bytes]
) -> dict[bytes, list[str]]:
    """Names of the columns that changed, by key."""
    if not keys:
        return {}
    names = [name for name in SCHEMAS[table].names if name not in {KEY, *_UNREAD}]
    old, new = (dict.fromkeys(keys, b"") for _ in range(2))
    for revision, packed in ((first, old), (second, new)):
        for row in _rows(objects, revision, table, shared):
            if (key := _key(row[KEY])) in packed:
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


def _key(image_id: str) -> bytes:
    """An id in half the bytes; one that is no digest keeps all."""
    try:
        key = bytes.fromhex(image_id)
    except ValueError:
        key = b""
    return b"h" + key if len(key) == 32 and key.hex() == image_id else b"t" + image_id.encode()


def _text(key: bytes) -> str:
    return key[1:].hex() if key[:1] == b"h" else key[1:].decode()
