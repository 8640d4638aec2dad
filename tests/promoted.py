"""A home as runs leave it: tables, stages, an evaluation, a gate, a version, and decisions signed by real keys."""

import os
from pathlib import Path
from typing import Any

from facemllm.core.digests import of_bytes
from facemllm.core.store import Store
from facemllm.settings import Settings, load
from facemllm.signing.policy import write_policy
from facemllm.tables import open_table
from tests import signed

COMMIT = "c0ffee" * 6 + "c0ff"
DIGESTS = {"ingest": "", "annotate": "", "reformat": "", "align": of_bytes(b"aligned"), "specialize": signed.MODEL}
DIGESTS |= {step: of_bytes(step.encode()) for step in ("gate", "register", "validate")}
DIGESTS |= {"evaluate": of_bytes(b"evaluation")}
INPUTS = {
    "ingest": {},
    "annotate": {"faces": "ingest"},
    "reformat": {"annotated": "annotate"},
    "validate": {"conversations": "reformat"},
    "align": {"conversations": "reformat"},
    "specialize": {"conversations": "reformat", "model": "align"},
    "evaluate": {"conversations": "reformat", "model": "specialize"},
    "gate": {"evaluation": "evaluate"},
    "register": {"model": "specialize", "evaluation": "evaluate"},
}
FIGURES = {"ingest": "40 faces", "align": "loss 2.1 after 9 steps", "evaluate": "mean balanced accuracy 0.879"}


def settings_of(home: Path, *sets: str) -> Settings:
    return load("laptop", [f"storage.home={home}", "tracking.uri=http://127.0.0.1:9", *sets])


def keep(home: Path, step: str, digest: str, inputs: dict[str, str], folder: Path | None = None, **facts: Any) -> None:
    """A result in the store with its record; `at` is its time, in seconds."""
    at = facts.pop("at", None)
    if folder is None:
        folder = home / "work" / f"new-{digest[:12]}"
        folder.mkdir(parents=True)
    key = of_bytes(f"{step} {digest} {inputs}".encode())
    facts = {"step": step, "inputs": inputs, "output": digest, "commit": COMMIT, "figure": "", **facts}
    Store(home).keep(key, folder, digest, facts)
    if at is not None:
        os.utime(home / "keys" / f"{key}.json", (at, at))


def fill(home: Path, tables: dict[str, Path]) -> dict[str, str]:
    """A run in a home, `tables` being those of its first steps; digests by step."""
    found = {**DIGESTS, **{step: open_table(path).digest for step, path in tables.items()}}
    for number, (step, inputs) in enumerate(INPUTS.items()):
        facts: dict[str, Any] = {"figure": FIGURES.get(step, ""), "at": 1_790_000_000 + 60 * number}
        facts |= {"name": "face-mllm", "version": 1, "output": "1"} if step == "register" else {}
        given = {name: found[source] for name, source in inputs.items()} | (
            {"gate": "passed"} if step == "register" else {}
        )
        keep(home, step, found[step], given, tables.get(step), **facts)
    return found


def decisions(home: Path) -> signed.Place:
    """The decisions repository of a home, with a bundle about version 1 and no decision yet."""
    (home / "signing").mkdir(parents=True)
    known = signed.usual()
    write_policy(home / "signing" / "policy.yaml", known)
    return signed.Place(home / "signing", known)
