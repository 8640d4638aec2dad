"""The list of what was forgotten: which pictures and people no table may hold again, who said so, and why.

It is the one file of the branch `tombstones` in the data repository, so it exists before any revision does, travels
with a clone, and leaves the names of data revisions alone:

    git -C <repository> show tombstones:tombstones.json

Every entry carries the digest of the one before it, and every commit adds one entry: an entry that was changed or taken
away shows. Keys are hashes: SHA-256 of a picture as stored and of its original file, keyed hashes of its name in its
source and of its subject, and a perceptual hash, by which a copy of another size is known. Entries of kind `replaced`
name the revision that stands in for one that held such rows.

`Tombstones.of(settings).covers(row)` is what every maker of a table asks; it costs a microsecond.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facemllm.core import digests
from facemllm.errors import UserError
from facemllm.settings import REPORTS, Settings
from facemllm.tables import Table
from facemllm.version.repository import Repository

Kind = Literal["image", "subject"]
BRANCH, FILE = "tombstones", "tombstones.json"
ID = 16
"""Digits of an entry's digest that name its report."""
KEYS = ("image_id", "original_id", "source", "source_id", "subject_id")
"""The columns that tell whether a row is covered; a table may lack some."""
FORGOTTEN = "forgotten"
"""The reason in quarantine for a row that was left out because of this list."""
LONGEST = 2000  # characters of a reason


def name_id(source: str, source_id: str) -> str:
    """Keyed hash of a picture's name in its source: tells it apart from others, and gives no name away."""
    text = f"{source}\0{source_id}".encode()
    return hashlib.blake2b(text, key=b"facemllm", person=b"source_id", digest_size=16).hexdigest()


class Mask(Protocol):
    """Something that picks rows."""

    def mask(self, batch: pa.RecordBatch) -> pa.BooleanArray:
        """True for every row of a batch that is picked. The batch has some of the columns `KEYS`."""


@dataclass(frozen=True)
class Marks:
    """What rows are matched by: `image` and `original` are SHA-256, `name` is a `name_id`, `subject` a `subject_id`.

    `look` holds perceptual hashes (hex): an import drops what looks like them; it tells no row of a table.
    """

    image: frozenset[str] = frozenset()
    original: frozenset[str] = frozenset()
    name: frozenset[str] = frozenset()
    subject: frozenset[str] = frozenset()
    look: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.image or self.original or self.name or self.subject)

    def __or__(self, other: Marks) -> Marks:
        return Marks(*(getattr(self, name) | getattr(other, name) for name in self.__dataclass_fields__))

    def __le__(self, other: Marks) -> bool:
        return all(getattr(self, name) <= getattr(other, name) for name in self.__dataclass_fields__)

    def covers(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has one of these marks. It may lack any of the columns `KEYS`."""
        if row.get("image_id") in self.image or row.get("subject_id") in self.subject:
            return True
        if row.get("original_id") in self.original:
            return True
        source, own = row.get("source"), row.get("source_id")
        return bool(self.name) and source is not None and own is not None and name_id(source, own) in self.name

    def mask(self, batch: pa.RecordBatch) -> pa.BooleanArray:
        """`covers` for every row of a batch that has some of the columns `KEYS`."""
        found = pa.array([False] * batch.num_rows)
        for column, wanted in (("image_id", self.image), ("original_id", self.original), ("subject_id", self.subject)):
            if wanted and column in batch.schema.names:
                found = pc.or_(found, pc.is_in(batch.column(column), value_set=pa.array(sorted(wanted), pa.string())))
        if self.name and {"source", "source_id"} <= set(batch.schema.names):
            both = zip(batch.column("source").to_pylist(), batch.column("source_id").to_pylist(), strict=True)
            named = [None not in pair and name_id(*pair) in self.name for pair in both]
            found = pc.or_(found, pa.array(named, pa.bool_()))
        return found

    def as_json(self) -> dict[str, list[str]]:
        """The marks as sorted lists, empty kinds left out."""
        return {name: sorted(getattr(self, name)) for name in self.__dataclass_fields__ if getattr(self, name)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Iterable[str]]) -> Marks:
        """The marks that `as_json` wrote."""
        return cls(**{name: frozenset(values) for name, values in stored.items()})


@dataclass(frozen=True)
class Tombstone:
    """One entry: what is forgotten, why, and who said so. `affected` is the digest of the list of pictures found then.

    `at` is UTC, ISO 8601; `digest` names the entry, and with it all entries before.
    """

    kind: Kind
    marks: Marks
    reason: str
    by: str
    at: str
    affected: str
    digest: str

    @property
    def id(self) -> str:
        """Name of the entry's report."""
        return self.digest[:ID]


@dataclass(frozen=True)
class Tombstones:
    """The list of one data repository. `replaced` maps a revision to the one that stands in for it ("" if none can).

    `digest` names what is covered, for the keys of steps that ask; "" when nothing is.
    """

    home: Path
    repository: Repository
    entries: tuple[Tombstone, ...] = ()
    replaced: Mapping[str, str] = field(default_factory=dict)
    marks: Marks = Marks()
    digest: str = ""

    @classmethod
    def of(cls, settings: Settings) -> Tombstones:
        """The list as it stands, with what clones brought from elsewhere. Empty when nothing was ever forgotten.

        Raises UserError when an entry was changed or is missing.
        """
        return cls._read(settings.home, Repository.of(settings))

    def covers(self, row: Mapping[str, Any]) -> bool:
        """Whether a row (any of the columns `KEYS`) was forgotten and must not enter a table."""
        return self.marks.covers(row)

    def refuse(self, table: Table, name: str) -> None:
        """Raise UserError if a table holds a row that was forgotten. Reads the columns `KEYS` alone."""
        rows = 0
        for shard in table.manifest["shards"] if self.marks else ():
            with pq.ParquetFile(table.path / shard["name"]) as file:
                rows += sum(1 for _ in covered_rows(file, self.marks))
        if rows:
            raise UserError(
                f"{name}: {rows} of {table.rows} rows were forgotten and must not come back; make the table again "
                "(they are left out then), or run `facemllm forget` again to remove them where they are left"
            )

    def add(self, kind: Kind, marks: Marks, *, reason: str, by: str, affected: Iterable[str] = ()) -> Tombstones:
        """Sign an entry off and give the list with it at its end; the data repository is made if it is absent.

        `affected` names the pictures that are found now. Raises UserError without a name, a reason or a mark.
        """
        who, why = plain_line(by), plain_line(reason)
        if not who:
            raise UserError('nobody is named as the one who decides; give the name of a person: --by "Ada Lovelace"')
        if not why or len(why) > LONGEST:
            raise UserError(f'forgetting needs a reason of at most {LONGEST} characters: --reason "..."')
        if not marks:
            raise UserError("there is nothing to forget: no picture and no subject is named")
        body = {
            "kind": kind,
            "keys": marks.as_json(),
            "reason": why,
            "by": who,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "affected": digests.of_json(sorted(affected)),
        }
        with self.repository.lock():
            self.repository.make()
            return self._extended(body, f"forget {kind}, by {who}: {why}")

    def replace(self, revision: str, successor: str) -> Tombstones:
        """Note that one revision stands in for another. Call with the repository's lock held."""
        body = {"kind": "replaced", "revision": revision, "successor": successor}
        return self._extended(body, f"revision {revision[:12]} is replaced by {successor[:12] or 'none'}")

    def newest(self, revision: str) -> str:
        """The revision that stands in for one at the end of all replacements; itself if it stands. "" if none does."""
        while revision in self.replaced:
            revision = self.replaced[revision]
        return revision

    def _extended(self, body: Mapping[str, Any], message: str) -> Tombstones:
        branches = self.repository.branches(BRANCH)
        lists = {branch: _entries(self.repository, branch) for branch in branches}
        own = next((entries for branch, entries in lists.items() if branch.startswith("refs/heads/")), [])
        # a longer list from elsewhere is built on only where it goes on from our own: else ours would be lost
        parent = max((b for b in lists if lists[b][: len(own)] == own), key=lambda b: len(lists[b]), default="")
        stored = lists.get(parent, [])
        entry = {**body, "previous": stored[-1]["digest"] if stored else ""}
        entry["digest"] = digests.of_json(entry)
        text = json.dumps({"entries": [*stored, entry]}, indent=1, ensure_ascii=False) + "\n"
        self.repository.extend(BRANCH, FILE, text, message, parent)
        return self._read(self.home, self.repository)

    @classmethod
    def _read(cls, home: Path, repository: Repository) -> Tombstones:
        stored: dict[str, dict[str, Any]] = {}
        for branch in repository.branches(BRANCH):
            stored |= {entry["digest"]: entry for entry in _entries(repository, branch)}
        entries, replaced = [], {}
        for body in stored.values():
            if body["kind"] == "replaced":
                replaced[body["revision"]] = body["successor"]
                continue
            facts = {name: body[name] for name in ("kind", "reason", "by", "at", "affected", "digest")}
            entries.append(Tombstone(marks=Marks.from_json(body["keys"]), **facts))
        marks = Marks()
        for entry in entries:
            marks |= entry.marks
        digest = digests.of_json(marks.as_json()) if marks else ""
        return cls(home, repository, tuple(entries), replaced, marks, digest)._checked()

    def _checked(self) -> Tombstones:
        """Reports outlive the list: one whose entry is gone shows that the list was cut, or that it is another one."""
        known = {entry.id for entry in self.entries}
        for report in sorted((self.home / REPORTS).glob("*.json")):
            if report.stem not in known:
                raise UserError(
                    f"{self.repository.path}: the list of what was forgotten lacks entry {report.stem}, on which "
                    f"{report} reports; bring the branch '{BRANCH}' back (git fetch from a clone, or a backup)"
                )
        return self


def covered_rows(file: pq.ParquetFile, marks: Mask) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file that are picked, as their `KEYS` and split. No other column is read."""
    names = [name for name in (*KEYS, "split") if name in file.schema_arrow.names]
    if not {"image_id", "original_id", "subject_id"} & set(names):
        return
    for batch in file.iter_batches(batch_size=8192, columns=names):
        yield from batch.filter(marks.mask(batch)).to_pylist()


def _entries(repository: Repository, branch: str) -> list[dict[str, Any]]:
    """The entries of a branch, every link of their chain checked."""
    where = f"{repository.path}: {FILE} of branch '{branch.removeprefix('refs/')}'"
    mend = "bring the branch back as it was (git reflog, a clone or a backup)"
    try:
        entries = json.loads(repository.show(branch, FILE))["entries"]
        previous = ""
        for number, entry in enumerate(entries, start=1):
            body = {name: value for name, value in entry.items() if name != "digest"}
            if body["previous"] != previous or digests.of_json(body) != entry["digest"]:
                raise UserError(f"{where}: entry {number} was changed, or one before it is missing; {mend}")
            previous = entry["digest"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where} is damaged ({error}); {mend}") from None
    if len(entries) != repository.length(branch):
        raise UserError(f"{where} has {len(entries)} entries, its history {repository.length(branch)}; {mend}")
    return entries


def plain_line(text: str) -> str:
    """Text in one line, without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
