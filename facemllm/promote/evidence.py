"""What the gate judges: evaluation folders whose bytes have the digest they go by, and figures that follow from them.

A folder is copied to a private place while nobody else can write there, the copy's digest is taken, and only the copy
is read: what changes in the store afterwards changes no verdict.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from facemllm.core import digests
from facemllm.errors import UserError, one_line
from facemllm.scoring import stats, summary
from facemllm.scoring.metrics import CLOSED_MEAN
from facemllm.scoring.sheet import Mask, read_parsed, read_sheet, read_some
from facemllm.tables import CONVERSATIONS, MANIFEST, PREDICTIONS, open_table

METRICS, PREDICTED, DISTURBED = "metrics.json", "predictions", "disturbed"
_CLOSE = 1e-9
_AGAIN = "evaluate again"


@dataclass(frozen=True)
class Evidence:
    """A checked copy of an evaluation `folder`, and the SHA-256 of its files by name."""

    path: Path
    folder: Path
    files: Mapping[str, str]


@contextmanager
def verified(folder: Path, digest: str, files: Mapping[str, str] | None = None) -> Iterator[Evidence]:
    """A private copy of an evaluation folder, checked to have this digest; removed afterwards.

    `files` (SHA-256 by name, as recorded when it was made) serves to name what does not fit; it is believed only if it
    has the digest itself. Raises UserError naming the first file that was changed, added, or is missing, and for what
    is neither a file nor a folder.
    """
    with tempfile.TemporaryDirectory(prefix="facemllm-evidence-") as scratch:
        copy = Path(scratch) / "evaluation"
        copy.mkdir()
        for name in names(folder):
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy(folder / name, target)
        found = digests.of_each(copy, fresh=True)
        if digests.of_listing(found) != digest:
            raise UserError(f"{folder}: {_misfit(copy, found, digest, files or {})}; evaluate again")
        yield Evidence(copy, folder, found)


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """What is amiss in the shape of the figures of `folder`, as a UserError."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, RecursionError, ValueError) as error:
        what = f"{type(error).__name__}: {one_line(error, 120)}"
        raise UserError(
            f"{folder}: {METRICS} is not of the shape that evaluation gives it ({what}); {_AGAIN}"
        ) from None


def names(folder: Path) -> list[str]:
    """Names of all files below a folder, sorted. Raises UserError for a link, a FIFO, or a name that is not UTF-8."""
    found = []

    def broken(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None

    for place, folders, files in os.walk(folder, onerror=broken):
        for name in (*folders, *files):
            path = Path(place, name)
            kind = path.lstat().st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                odd = _plain(path.relative_to(folder))
                raise UserError(f"{folder}: {odd} is neither a file nor a folder; remove it")
        found += [Path(place, name).relative_to(folder) for name in files]
    for path in found:
        if _plain(path) != str(path):
            raise UserError(f"{folder}: the name {_plain(path)} is not UTF-8; remove that file")
    return sorted(path.as_posix() for path in found)


@contextmanager
def read_once(path: Path, sha256: str) -> Iterator[Path]:
    """A private folder with a copy of one file alone. Raises UserError when it does not have this digest."""
    with tempfile.TemporaryDirectory(prefix="facemllm-evidence-") as scratch:
        copy = Path(scratch, path.name)
        _copy(path, copy)
        if digests.of_file(copy, fresh=True) != sha256:
            raise UserError(f"{path}: it changed while it was read; run again")
        yield copy.parent


def recount(metrics: Mapping[str, Any], conversations: Path, evidence: Evidence) -> None:
    """Check the figures of `metrics.json` that need no resampling against the answers beside it.

    Raises UserError naming the first figure that does not follow from them, a table with answers of another model, or
    when they are about another table of conversations.
    """
    folder, where = evidence.path, evidence.folder
    table = open_table(conversations, CONVERSATIONS)
    if table.digest != metrics["conversations_digest"]:
        raise UserError(
            f"{where}: the evaluation is of conversations {metrics['conversations_digest'][:12]}, not of "
            f"{table.digest[:12]}; evaluate on the same conversations"
        )
    for manifest in sorted(folder.rglob(MANIFEST)):
        for batch in open_table(manifest.parent).batches(["model_digest"]):
            for name in set(batch.column(0).to_pylist()) - {metrics["model_digest"]}:
                part = manifest.parent.relative_to(folder).as_posix()
                raise UserError(f"{where}: {part} holds answers of model {str(name)[:12]}; {_AGAIN}")
    sheet = read_sheet(table, metrics["split"])
    predictions = open_table(folder / PREDICTED, PREDICTIONS)
    parsed = read_parsed(predictions, sheet)
    counted = summary.heads(summary.replicate(sheet, parsed, 0, 0))
    for name, values in counted.items():
        entry = metrics.get(CLOSED_MEAN) if name == CLOSED_MEAN else metrics["tasks"].get(name)
        if "." not in name:
            _same(where, f"{METRICS}: {name}", (entry or {}).get("value"), values[0])
    for name in metrics["tasks"]:
        if name not in counted:
            raise UserError(f"{where}: {METRICS}: {name} is no task of the predictions beside it; {_AGAIN}")
    for kind, entry in (metrics.get("disturbed") or {}).items():
        if CLOSED_MEAN in counted and (folder / DISTURBED / str(kind)).is_dir():
            rows, said = read_some(open_table(folder / DISTURBED / str(kind), PREDICTIONS), sheet)
            only: Mask = np.zeros(len(sheet.answers), dtype=bool)
            only[rows] = True
            after = summary.heads(summary.replicate(sheet, said, 0, 0, only)).get(CLOSED_MEAN)
            if after is not None:
                _same(where, f"{METRICS}: disturbed.{kind}", entry["after"]["value"], after[0])


def _same(folder: Path, name: str, stated: Any, counted: Any) -> None:
    value = stats.plain(counted)
    if (value is None) != (stated is None) or (value is not None and abs(value - stated) > _CLOSE * max(1, abs(value))):
        raise UserError(f"{folder}: {name} is {stated}, but the answers beside it give {value}; {_AGAIN}")


def _copy(path: Path, target: Path) -> None:
    """Copy a file without following a link that has taken its place."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    with open(descriptor, "rb") as source, target.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)


def _misfit(copy: Path, found: Mapping[str, str], digest: str, files: Mapping[str, str]) -> str:
    """The first file that is not as it was when the evaluation was made, in words."""
    if digests.of_listing(files) == digest:
        for name in sorted({**files, **found}):
            if found.get(name) != files.get(name):
                how = "is missing" if name not in found else "was added" if name not in files else "was changed"
                return f"{name} {how} after evaluation"
    for manifest in sorted(copy.rglob(MANIFEST)):
        try:
            open_table(manifest.parent)
        except UserError as error:
            return str(error).replace(f"{copy}{os.sep}", "").rpartition("; ")[0]
    named = f"{METRICS}, or another file beside the tables,"
    return f"{named} is not as it was after evaluation: digest {digests.of_listing(found)[:12]}, not {digest[:12]}"


def _plain(path: Path) -> str:
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
