"""Rows that a step refused, read back from the quarantine of its table: counted by reason, with a few files each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from facemllm.tables import Table

FILES = 3
_MOST = 200
_LONGEST = 300
_REST = "other reasons"
_VARIES = re.compile(r"\b[0-9a-f]{12,}\b|(?<![A-Za-z0-9_])[+-]?\d+(?:[.,]\d+)*")


@dataclass
class Reason:
    """One reason: how many rows, its first wording (numbers may differ between rows), and the first rows."""

    wording: str
    rows: int = 0
    varies: bool = False
    files: list[str] = field(default_factory=list)


def reasons(table: Table, parents: Mapping[str, str]) -> list[Reason]:
    """The reasons for which rows were refused, the most frequent first. Reasons that differ only by numbers or digests
    are one; beyond 200 kinds the rest are gathered, so memory stays flat. `parents` names tables by digest."""
    found: dict[str, Reason] = {}
    for refused in table.refused():
        wording = " ".join((refused["reason"] or "no reason given").split())[:_LONGEST]
        key = _VARIES.sub("#", wording)
        if key not in found and len(found) >= _MOST:
            key = wording = _REST
        reason = found.setdefault(key, Reason(wording))
        reason.rows += 1
        reason.varies |= wording != reason.wording
        if len(reason.files) < FILES:
            reason.files.append(_place(refused["file"] or "", refused["row"], parents))
    return sorted(found.values(), key=lambda reason: (-reason.rows, reason.wording))


def _place(file: str, row: int | None, parents: Mapping[str, str]) -> str:
    if file in parents:
        return f"row {row} of the {parents[file]}"
    return f"{file}, row {row}" if row else file
