"""The content store: results by digest, and which digest a step gave for given inputs.

`store/<digest>` holds a finished folder (table, model, report). `keys/<key>.json` remembers that a step with these
settings, inputs and code gave this digest, so running it again is a look-up, here and in a cluster alike.
`work/<key>` is where an unfinished step keeps what it can go on from, and builds its result under a name of its own.

Two processes do not work under one key at once (`facemllm.core.claims`). Where a network volume does not keep locks
between machines, both make the result, each in a folder of its own, and the first to finish is kept: a result is named
after its bytes, appears whole in one step, and is not replaced by its like.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facemllm.core.digests import of_bytes
from facemllm.core.files import atomic_write, read_json, settle
from facemllm.errors import UserError
from facemllm.settings import REPORTS

_ATTEMPT = re.compile(r"\.?result-([0-9a-f]{8})-.*")
_ABANDONED_S = 86_400.0
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

    @contextmanager
    def attempt(self, key: str) -> Iterator[Path]:
        """A name under `work` to build the result at, this process's own; what is not kept is gone afterwards.

        What killed processes of this machine left of theirs is removed first: hold the key's claim.
        """
        _remove(self.home / "work" / key[:32], lambda name: bool(_ATTEMPT.fullmatch(name)))
        out = (work := self.work(key)) / f"result-{_here()}-{secrets.token_hex(4)}"
        try:
            yield out
        finally:
            _remove(work, lambda name: out.name in name)

    def keep(self, key: str, result: Path, digest: str, facts: Mapping[str, Any]) -> Path:
        """Move a finished folder into the store, remember it under the key, and drop its unfinished work."""
        path = self.home / "store" / digest
        settle(result, path)
        with suppress(OSError):  # another user's
            os.utime(path)
        record = {"digest": digest, **facts}
        atomic_write(self.home / "keys" / f"{key}.json", json.dumps(record, indent=2, sort_keys=True).encode())
        _remove(self.home / "work" / key[:32], lambda name: True)
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


def _here() -> str:
    """Eight characters that stand for this machine (on a cluster, this pod)."""
    return of_bytes(socket.gethostname().encode())[:8]


def _remove(work: Path, wanted: Callable[[str], bool]) -> None:
    """Remove what is wanted of a folder of unfinished work, and the folder once it is empty. What another machine
    builds there is left for a day: it may not see our locks."""
    for path in work.glob("*"):
        with suppress(OSError):
            made = _ATTEMPT.fullmatch(path.name)
            elsewhere = made and made[1] != _here() and time.time() - path.stat().st_mtime < _ABANDONED_S
            if elsewhere or not wanted(path.name):
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with suppress(OSError):
        work.rmdir()
