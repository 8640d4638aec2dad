"""The content store: results by digest, and which digest a step gave for given inputs.

`store/<digest>` holds a finished folder (table, model, report). `keys/<key>.json` remembers that a step with these
settings, inputs and code gave this digest, so running it again is a look-up, here and in a cluster alike.
`work/<key>` is where an unfinished step keeps what it can go on from.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facemllm.core import digests
from facemllm.core.files import atomic_write, locked, publish, read_json
from facemllm.errors import UserError
from facemllm.settings import REPORTS

FACE = "face.jpg"  # in a run's folder: one held-out face to ask about


@dataclass(frozen=True)
class Store:
    """Results under one home folder."""

    home: Path

    def path(self, digest: str) -> Path:
        """Folder of a finished result. Raises UserError if the store does not hold it."""
        path = self.home / "store" / digest
        if not path.is_dir():
            why = f"it was deleted {at} to forget a picture; " if (at := self.forgotten(digest).get("at")) else ""
            raise UserError(f"the store has no result {digest[:12]} ({path}); {why}run the pipeline again to make it")
        return path

    def forgotten(self, digest: str) -> dict[str, Any]:
        """Of a result that was deleted so that a picture or person is forgotten: when (`at`), and the `manifest` of a
        table, which holds no picture. Empty for any other."""
        for file in sorted((self.home / REPORTS).glob("*.json")):
            report = read_json(file)
            if digest in (results := report.get("results", {})):
                return {"at": report["at"], "manifest": results[digest]}
        return {}

    def recall(self, key: str) -> dict[str, Any] | None:
        """What was remembered under a key, if its result is still there."""
        record = read_json(self.home / "keys" / f"{key}.json")
        return record if record and (self.home / "store" / record["digest"]).is_dir() else None

    def work(self, key: str) -> Path:
        """Folder where unfinished work under this key is kept; made if absent."""
        path = self.home / "work" / key[:32]
        path.mkdir(parents=True, exist_ok=True)
        return path

    def working(self, key: str) -> AbstractContextManager[None]:
        """Hold the work under a key; while another run holds it, wait. It ends with its holder, even killed."""
        return locked(self.lock(key))

    def lock(self, key: str) -> Path:
        """The file by which the work under a key, or a result's folder, is held."""
        return self.home / "locks" / f"{key[:32]}.lock"

    def used(self, key: str) -> None:
        """Note that what is remembered under a key was recalled: what is in use counts as young (`facemllm gc`)."""
        with suppress(OSError):  # a home that may only be read
            os.utime(self.home / "keys" / f"{key}.json")

    def keep(self, key: str, result: Path, digest: str, facts: Mapping[str, Any]) -> Path:
        """Move a finished folder into the store, remember it under the key, and drop its unfinished work.

        A folder that lies there whole stays as it is, for a server or another run may read it now; a damaged one makes
        room.
        """
        path, damaged = self.home / "store" / digest, self.home / "work" / f"{digest}.damaged"
        with self.working(digest):
            if path.is_dir() and digests.of_tree(path, fresh=True) == digests.of_tree(result):
                shutil.rmtree(result)
            else:
                if path.is_dir():
                    shutil.rmtree(damaged, ignore_errors=True)
                    damaged.parent.mkdir(exist_ok=True)
                    path.rename(damaged)
                publish(result, path)
                shutil.rmtree(damaged, ignore_errors=True)
        record = {"digest": digest, **facts}
        atomic_write(self.home / "keys" / f"{key}.json", json.dumps(record, indent=2, sort_keys=True).encode())
        shutil.rmtree(self.home / "work" / key[:32], ignore_errors=True)
        return path

    def records(self) -> dict[str, dict[str, Any]]:
        """What is remembered, by digest of the result; of several records of the same bytes, the newest."""
        found: dict[str, dict[str, Any]] = {}
        for path in sorted((self.home / "keys").glob("*.json"), key=lambda p: p.stat().st_mtime):
            if "digest" in (record := read_json(path)):
                found.pop(str(record["digest"]), None)  # the newest stands last
                found[str(record["digest"])] = record
        return found

    def behind(self, digest: str) -> dict[str, dict[str, Any]]:
        """Records of all steps behind a result, by step, as far as they are remembered; the result's own included."""
        records = self.records()
        found: dict[str, dict[str, Any]] = {}
        todo = [digest]
        while todo:
            record = records.get(todo.pop(), {})
            if (step := record.get("step")) and step not in found:
                found[step] = record
                todo += [str(value) for value in record.get("inputs", {}).values()]
        return found

    def find(self, prefix: str) -> Path:
        """The result whose digest begins with `prefix`. Raises UserError if none or several do."""
        found = sorted(p for p in (self.home / "store").glob(f"{prefix}*") if p.is_dir())
        if len(found) != 1:
            raise UserError(f"{len(found)} results begin with '{prefix}' in {self.home / 'store'}; give more digits")
        return found[0]
