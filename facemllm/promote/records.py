"""What a home remembers of its results, as an index: which record made a digest, and which records took it.

One pass over `keys/`, with what `store/` holds of results that no record names (a model fetched from elsewhere, a
restored table). 10,000 records take half a second, so nothing is kept on disk that would have to be forgotten later.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from stat import S_ISREG
from typing import Any

from facemllm.core.files import read_json
from facemllm.errors import one_line
from facemllm.settings import REPORTS
from facemllm.tables import MANIFEST

DIGEST = re.compile(r"[0-9a-f]{64}")
LARGEST = 4 << 20
"""Bytes of a record."""
_MODEL = "lineage.json"
_KEPT = ("figure", "seconds", "cost", "gate", "resumed_from", "output", "run_id", "commit", "name", "version")


@dataclass(frozen=True)
class Record:
    """How a result came about: step, inputs by name, when it was recorded (UTC), and what the step said of it."""

    digest: str
    step: str
    inputs: Mapping[str, str]
    at: datetime | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def materials(self) -> dict[str, str]:
        """Those of the inputs that are results."""
        return {name: value for name, value in self.inputs.items() if DIGEST.fullmatch(value)}


class Records:
    """All records under a home. `damaged` has a line for each that cannot be read; they are left out."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.newest: dict[str, Record] = {}
        self.uses: dict[str, list[Record]] = {}
        self.damaged: list[str] = []
        stored = _entries(home / "store", suffix="")
        self.here = {entry.name for entry in stored}
        """Digests of the results that lie in the store."""
        found = [record for entry in _entries(home / "keys") if (record := self._read(entry))]
        found += self._unrecorded(stored, {record.digest for record in found})
        for record in sorted(found, key=lambda one: one.at or datetime.min.replace(tzinfo=UTC)):
            self.newest[record.digest] = record
            for value in dict.fromkeys(record.materials.values()):
                self.uses.setdefault(value, []).append(record)

    @property
    def all(self) -> list[Record]:
        """The newest record of every result."""
        return list(self.newest.values())

    def folder(self, digest: str) -> Path:
        """Where a result lies, if it does."""
        return self.home / "store" / digest

    def manifest(self, digest: str) -> dict[str, Any]:
        """A table's manifest, of one that was deleted to forget a picture, too; empty for anything else."""
        if digest in self.here:
            return read_json(self.folder(digest) / MANIFEST)
        report = self.forgotten.get(digest)
        return dict(report["results"].get(digest) or {}) if report else {}

    @cached_property
    def reports(self) -> list[dict[str, Any]]:
        """What was forgotten, oldest first."""
        found = [read_json(file) for file in sorted((self.home / REPORTS).glob("*.json"))]
        whole = [one for one in found if isinstance(one.get("results"), dict) and isinstance(one.get("at"), str)]
        return sorted(whole, key=lambda report: str(report["at"]))

    @cached_property
    def forgotten(self) -> dict[str, dict[str, Any]]:
        """The report on every result that was deleted so that a picture or person is forgotten, by digest."""
        return {digest: report for report in self.reports for digest in report["results"]}

    def _read(self, entry: os.DirEntry[str]) -> Record | None:
        """A record; None, and a line in `damaged`, for what is none."""
        try:
            about = entry.stat(follow_symlinks=False)
            if not S_ISREG(about.st_mode) or about.st_size > LARGEST:
                raise ValueError(f"no file of at most {LARGEST >> 20} MiB")
            with open(entry.path, "rb") as file:
                data = json.loads(file.read())
            return _record(data, datetime.fromtimestamp(about.st_mtime, UTC))
        except FileNotFoundError:  # replaced meanwhile
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            self.damaged.append(f"{entry.path}: damaged record, left out ({one_line(error, 80)})")
            return None

    def _unrecorded(self, stored: list[os.DirEntry[str]], recorded: set[str]) -> list[Record]:
        """Results that lie in the store and say themselves what they were made from."""
        found = []
        for entry in stored:
            if entry.name in recorded or not DIGEST.fullmatch(entry.name):
                continue
            lineage, manifest = read_json(Path(entry.path) / _MODEL), read_json(Path(entry.path) / MANIFEST)
            inputs = lineage.get("inputs") or {f"parent {one[:12]}": one for one in manifest.get("parents", ())}
            at = datetime.fromtimestamp(entry.stat().st_mtime, UTC)
            step = str(lineage.get("stage") or str(manifest.get("schema", "result")).partition("/")[0])
            found.append(Record(entry.name, step, {str(k): str(v) for k, v in inputs.items()}, at))
        return found


def _entries(folder: Path, suffix: str = ".json") -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [one for one in entries if one.name.endswith(suffix) and not one.name.startswith(".")]
    except OSError:
        return []


def _record(data: Any, at: datetime) -> Record:
    digest, inputs = data["digest"], data.get("inputs") or {}
    if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
        raise ValueError("its digest is none")
    named = {str(name): str(value) for name, value in inputs.items()}
    return Record(digest, str(data.get("step") or "result"), named, at, {k: data[k] for k in _KEPT if k in data})
