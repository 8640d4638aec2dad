"""Group balance: what every filter on the way from sources to conversations does to the groups in the data.

A filter that drops rows drops some groups more than others, and says nothing. For every filter and group the rows
before and after are counted. A group is named when it loses more than `validate.group_loss` beyond the filter's average
loss, and chance alone would hardly do that: one-sided Fisher's exact test of the group against all others, corrected by
Holm over all filters and groups together, at 5 %. (Pictures of one person are not independent, so a filter that drops
whole people is named a little too easily: a name is a reason to look, and never stops the workflow.) Rows that a step
refused are read back from the quarantine of its table and counted by reason, with the first of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from facemllm.tables import Table
from facemllm.validate.memory import Count
from facemllm.validate.suites import FILTERS

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.05

_FILES = 3
_MOST = 200
_LONGEST = 300
_REST = "other reasons"
_VARIES = re.compile(r"\b[0-9a-f]{12,}\b|(?<![A-Za-z0-9_])[+-]?\d+(?:[.,]\d+)*")


@dataclass(frozen=True)
class Share:
    """One group at one filter: rows before and after, and whether it lost significantly more than the average."""

    filter: str
    group: str
    value: str
    before: int
    after: int
    probability: float
    thinned: bool

    @property
    def lost(self) -> float:
        """Share of the group's rows that the filter dropped."""
        return 1 - self.after / self.before


def of_manifest(about: Mapping[str, Any]) -> Count | None:
    """What the search for duplicates did to the groups, as `ingest` noted it in the manifest; None if it did not."""
    try:
        sides = [
            {(name, value): int(n) for name, values in about["groups"][side].items() for value, n in values.items()}
            for side in ("read", "kept")
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    # every row has a source, so its values add up to all rows
    rows = [sum(n for (name, _), n in side.items() if name == "source") for side in sides]
    return Count(sides[0], sides[1], rows[0], rows[1])


def shares(counts: Mapping[str, Count], group_loss: float) -> list[Share]:
    """Every group at every filter, in the order of the filters, then by group and value."""
    keys = [(name, key) for name, count in counts.items() for key in sorted(count.before) if count.before[key]]
    chances = _holm([_chance(counts[name], key) for name, key in keys])
    found = []
    for (name, key), chance in zip(keys, chances, strict=True):
        count = counts[name]
        before, after = count.before[key], count.after.get(key, 0)
        beyond = (1 - after / before) - (1 - count.rows_after / count.rows_before)
        found.append(Share(name, *key, before, after, chance, beyond > group_loss and chance < LEVEL))
    return found


def sentence(share: Share, count: Count) -> str:
    """What happened to a group, in plain words."""
    named = {
        "source": f"of the faces of source '{share.value}'",
        "split": f"of the {share.value} split",
        "age_band": f"of the faces of age band '{share.value}'",
    }.get(share.group, f"of the faces labelled '{share.value}' ({share.group.replace('_', ' ')})")
    average = 1 - count.rows_after / count.rows_before
    return f"{FILTERS[share.filter][0]} dropped {100 * share.lost:.1f} % {named}, {100 * average:.1f} % of all"


def balance_frame(found: Sequence[Share], counts: Mapping[str, Count]) -> pd.DataFrame:
    """One row a group at a filter, with a column of its own for every filter: true where the group kept its share."""
    import pandas as pd

    rows = [
        {
            "row": number,
            "image_id": "",
            **{f"{name}_keeps_groups": not share.thinned if name == share.filter else None for name in counts},
            "says": sentence(share, counts[share.filter]),
        }
        for number, share in enumerate(found)
    ]
    return pd.DataFrame(rows)


def _chance(count: Count, key: tuple[str, str]) -> float:
    """Probability that a filter blind to groups drops at least as many of this one."""
    from scipy.stats import hypergeom

    dropped = count.rows_before - count.rows_after
    lost = count.before[key] - count.after.get(key, 0)
    if dropped <= 0 or lost <= 0:
        return 1.0
    return float(hypergeom.sf(lost - 1, count.rows_before, dropped, count.before[key]))


def _holm(chances: Sequence[float]) -> list[float]:
    """Probabilities corrected for their number (Holm 1979, A simple sequentially rejective multiple test procedure)."""
    corrected = [1.0] * len(chances)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        highest = max(highest, min(1.0, chances[place] * (len(chances) - rank)))
        corrected[place] = highest
    return corrected


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
        if len(reason.files) < _FILES:
            reason.files.append(_place(refused["file"] or "", refused["row"], parents))
    return sorted(found.values(), key=lambda reason: (-reason.rows, reason.wording))


def _place(file: str, row: int | None, parents: Mapping[str, str]) -> str:
    if file in parents:
        return f"row {row} of the {parents[file]}"
    return f"{file}, row {row}" if row else file
