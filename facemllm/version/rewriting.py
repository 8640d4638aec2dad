"""Revisions without what was forgotten: each that holds such rows gets a successor, and its own bytes are deleted.

Only the columns that tell rows apart are read to search, once a shard however many revisions share it. Shards without
such rows keep their bytes in the successor. Objects that a standing revision needs are kept; every other object that
holds such rows goes, from the cache and from the remote, also one that an interrupted recording left behind. Git's
history stays: manifests hold no pictures. Everything here can be stopped at any point and called again.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facemllm.core import digests, progress
from facemllm.core.files import building
from facemllm.errors import UserError
from facemllm.settings import Settings
from facemllm.tables import MANIFEST, QUARANTINE, Table, open_table
from facemllm.version.archive import Archive, archive
from facemllm.version.record import SCHEMAS, fetch, keep, link
from facemllm.version.repository import TABLES, Repository
from facemllm.version.tombstones import Marks, Mask, Tombstones, covered_rows

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Held:
    """What a revision's tables hold of what is looked for: the rows, as the columns that tell them, by table."""

    revision: str
    digests: Mapping[str, str]
    rows: Mapping[str, Rows]
    missing: tuple[str, ...] = ()


@dataclass
class Search:
    """Rows with certain marks among the objects of an archive; no object is read twice."""

    objects: Archive
    marks: Mask
    _cache: dict[str, Rows] = field(default_factory=dict)

    def rows(self, oid: str) -> Rows:
        """The rows of one object; none if it is no Parquet file."""
        if oid not in self._cache:
            with self.objects.parquet(oid) as file:
                self._cache[oid] = list(covered_rows(file, self.marks)) if file is not None else []
        return self._cache[oid]

    def revision(self, sha: str) -> Held:
        """What a revision holds. Objects that are nowhere are named in `missing`."""
        found: dict[str, Rows] = {}
        missing: list[str] = []
        named: dict[str, str] = {}
        for table in TABLES:
            named[table] = json.loads(self.objects.repository.show(sha, f"manifests/{table}.json"))["digest"]
            try:
                files = self.objects.files(sha, table)
            except UserError:
                missing.append(table)
                continue
            missing += [f"{table}/{name}" for name, oid in files.items() if not self.objects.holds(oid)]
            shards = [oid for name, oid in files.items() if name.startswith("part-") and self.objects.holds(oid)]
            if rows := [row for oid in shards for row in self.rows(oid)]:
                found[table] = rows
        return Held(sha, named, found, tuple(missing))


def held(settings: Settings, marks: Mask) -> list[Held]:
    """What every standing revision holds of rows with these marks, oldest first; revisions without such rows too."""
    repository = Repository.of(settings)
    replaced = Tombstones.of(settings).replaced
    standing = [sha for sha in reversed(repository.revisions()) if sha not in replaced]
    if not standing:
        return []
    with archive(repository) as objects, progress.bar("searching revisions", len(standing)) as bar:
        search, found = Search(objects, marks), []
        for done, sha in enumerate(standing, start=1):
            found.append(search.revision(sha))
            bar.update(done, sha[:12])
    return found


def rewrite(settings: Settings) -> Iterator[dict[str, Any]]:
    """Give every revision with forgotten rows a successor without them; what is done, a dictionary a revision.

    It is yielded before it is noted as done, so that a caller's record misses nothing. Keys: `revision`, `successor`
    ("" when bytes were missing, so that none could be made), `digests` of its tables, `rows` removed and `shards`
    rewritten, by table. Raises UserError when the repository is in use, or bytes are damaged.
    """
    repository = Repository.of(settings)
    if not repository.exists():
        return
    with repository.lock():
        forgotten = Tombstones.of(settings)
        repository.make()
        repository.clear_leftovers()
        scratch = repository.path / ".dvc" / "tmp" / "rewriting"
        shutil.rmtree(scratch, ignore_errors=True)  # a call that was killed may have left pictures there
        for found in held(settings, forgotten.marks):
            if not found.rows:
                continue
            try:
                successor, shards = "", dict.fromkeys(TABLES, 0)
                if not found.missing:
                    successor, shards = _successor(repository, found, forgotten.marks, scratch)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            rows = {table: len(found.rows.get(table, ())) for table in TABLES}
            facts = {"revision": found.revision, "successor": successor, "digests": dict(found.digests)}
            yield {**facts, "rows": rows, "shards": shards}
            forgotten = forgotten.replace(found.revision, successor)


def purge(settings: Settings) -> dict[str, int]:
    """Delete the objects of replaced revisions and any other that holds forgotten rows; how many, and copies of them.

    Objects that a standing revision needs are kept. Raises UserError when the repository is in use.
    """
    repository = Repository.of(settings)
    if not repository.exists():
        return {"objects": 0, "copies": 0}
    with repository.lock():
        repository.clear_leftovers()
        forgotten = Tombstones.of(settings)
        with archive(repository) as objects:
            needed, had = set[str](), set[str]()
            for sha in repository.revisions():
                (had if sha in forgotten.replaced else needed).update(objects.objects(sha))
            present = objects.everything()
            search = Search(objects, forgotten.marks)
            stray = {oid for oid in present - needed - had if _suspect(search, oid)}
            # listings last: a call that was stopped finds by them what else it has to delete
            doomed = sorted(((had - needed) | stray) & present, key=lambda oid: (oid.endswith(".dir"), oid))
            with progress.bar("deleting recorded bytes", len(doomed)) as bar:
                copies = 0
                for number, oid in enumerate(doomed, start=1):
                    copies += objects.delete(oid)
                    bar.update(number)
    return {"objects": len(doomed), "copies": copies}


def remaining(settings: Settings) -> list[str]:
    """Objects, in cache or remote, that still hold forgotten rows. Every object is looked at."""
    repository = Repository.of(settings)
    if not repository.exists():
        return []
    with archive(repository) as objects:
        search = Search(objects, Tombstones.of(settings).marks)
        return [f"{repository.path.name}: object {oid}" for oid in sorted(objects.everything()) if search.rows(oid)]


def _suspect(search: Search, oid: str) -> bool:
    """Whether an object that no revision needs holds forgotten rows, or is cut short so that nobody can tell."""
    try:
        return bool(search.rows(oid))
    except UserError:
        return True


def _successor(repository: Repository, found: Held, marks: Marks, scratch: Path) -> tuple[str, dict[str, int]]:
    """Record a revision's tables without the rows; its name, and the number of shards rewritten by table."""
    fetch(repository, repository.revision(found.revision), scratch / "old")
    tables: dict[str, Table] = {}
    shards: dict[str, int] = {}
    renamed: dict[str, str] = {}
    for name in TABLES:  # faces first: conversations name them as their parent
        old = open_table(scratch / "old" / name, SCHEMAS[name])
        shards[name] = without(old, scratch / "new" / name, marks, renamed)
        tables[name] = open_table(scratch / "new" / name, SCHEMAS[name])
        renamed[old.digest] = tables[name].digest
    return keep(repository, tables).sha, shards


def without(table: Table, out: Path, marks: Marks, renamed: Mapping[str, str]) -> int:
    """Write a table to `out` without the rows that the marks cover; how many shards had to be rewritten.

    A table without such rows and without a renamed parent stays as it is, to the bit. Shards without such rows keep
    their bytes. Memory is that of a row group.
    """
    with building(out) as partial:
        shards, rewritten, gone = [], 0, []
        for shard in table.manifest["shards"]:
            source, target = table.path / shard["name"], partial / shard["name"]
            with pq.ParquetFile(source) as file:
                covered = list(covered_rows(file, marks))
                if not covered:
                    link(source, target)
                    shards.append(shard)
                    continue
                gone += covered
                rewritten += 1
                if rows := _copy_rest(file, target, marks):
                    shards.append({**shard, "rows": rows, "sha256": digests.of_file(target)})
        manifest = {name: value for name, value in table.manifest.items() if name != "digest"}
        parents = [renamed.get(parent, parent) for parent in manifest["parents"]]
        notes = _copy_notes(table, partial, gone) if "quarantine_sha256" in manifest else {}
        if gone or notes or parents != manifest["parents"]:
            manifest |= {"shards": shards, "rows": sum(shard["rows"] for shard in shards), "parents": parents, **notes}
            kept = {name: value for name, value in manifest["about"].items() if name != "groups"}  # no longer true
            manifest["about"] = {**kept, "rewritten_from": table.digest}
        manifest["digest"] = digests.of_json(manifest)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", "utf-8")
    return rewritten


def _copy_rest(file: pq.ParquetFile, target: Path, marks: Marks) -> int:
    """Write a shard's other rows, row group by row group; their number. No file is written when none is left."""
    rows = 0
    writer: pq.ParquetWriter | None = None
    try:
        for number in range(file.num_row_groups):
            group = file.read_row_group(number).combine_chunks()
            for batch in group.to_batches():
                kept = batch.filter(pc.invert(marks.mask(batch)))
                if kept.num_rows:
                    writer = writer or pq.ParquetWriter(target, file.schema_arrow, compression="zstd")
                    writer.write_table(pa.Table.from_batches([kept]))
                    rows += kept.num_rows
    finally:
        if writer is not None:
            writer.close()
    return rows


def _copy_notes(table: Table, partial: Path, gone: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Copy the quarantine without notes that name a forgotten picture; what changes in the manifest by it."""
    names = tuple({f"/{row['source_id']}" for row in gone if row.get("source_id")})
    ids = {row["image_id"] for row in gone}
    notes = pq.read_table(table.path / QUARANTINE)
    kept = []
    for note in notes.to_pylist():
        file = f"/{note['file'] or ''}"  # by a reader with its ending and folders, by a filter as source/source_id
        named = file.endswith(names) or str(PurePosixPath(file).with_suffix("")).endswith(names)
        kept.append(not named and not ids & set(re.findall(r"[0-9a-f]{64}", str(note))))
    if all(kept):
        link(table.path / QUARANTINE, partial / QUARANTINE)
        return {}
    pq.write_table(notes.filter(pa.array(kept)), partial / QUARANTINE)
    return {"quarantined": sum(kept), "quarantine_sha256": digests.of_file(partial / QUARANTINE)}
