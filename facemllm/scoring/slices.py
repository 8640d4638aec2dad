"""Robustness: figures on kinds of faces (how far turned, occluded), on disturbed pictures, and of free generation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from facemllm.scoring import stats
from facemllm.scoring.consistency import same, share
from facemllm.scoring.metrics import CLOSED_MEAN, Array, Parsed, numbers
from facemllm.scoring.sheet import Mask, Sheet, read_some
from facemllm.scoring.summary import heads, replicate
from facemllm.settings import Settings
from facemllm.tables import PREDICTIONS, open_table

FRONTAL, PROFILE = 15.0, 45.0
"""Degrees of yaw to either side: up to which a face counts as frontal, and from which as a profile."""
_OCCLUDING = {("Wearing_Hat", "yes"), ("eyewear", "Sunglasses"), ("Sunglasses", "yes")}


def measure(settings: Settings, sheet: Sheet, parsed: Parsed) -> dict[str, Any]:
    """Figures of the faces of each slice by the labels asked about: `people`, `n` questions, `closed_mean`, `tasks`.

    Slices are `frontal`, `turned`, `profile` (where yaw is known), `occluded` and `unoccluded` (by hat or sunglasses).
    One of fewer people than `evaluate.min_group` is `too_few` and has no figures; one without a face is left out.
    """
    found = {}
    for name, chosen in _slices(sheet).items():
        if not chosen.any():
            continue
        people = len(np.unique(sheet.people[chosen]))
        enough = people >= settings.evaluate.min_group
        only = chosen[sheet.faces]
        drawn = _own(settings, sheet, parsed, only) if enough else {}
        found[name] = {
            "people": people,
            "n": int(sum(only[rows].sum() for rows in sheet.rows.values())),
            "too_few": not enough,
            CLOSED_MEAN: stats.spread(drawn[CLOSED_MEAN], people) if CLOSED_MEAN in drawn else stats.NOTHING,
            "tasks": {task: stats.spread(drawn[task], people) for task, _ in sheet.rows if task in drawn},
        }
    return found


def disturbed(settings: Settings, sheet: Sheet, parsed: Parsed, folder: Path) -> dict[str, Any]:
    """What disturbing the pictures does, by kind: `closed_mean` of the same questions `before` and `after`, the paired
    `change`, and the same by task. `folder`, if it is there, holds a predictions table a kind."""
    found = {}
    for kind in sorted(path.name for path in folder.iterdir()) if folder.is_dir() else ():
        rows, said = read_some(open_table(folder / kind, PREDICTIONS), sheet)
        only = np.zeros(len(sheet.answers), dtype=bool)
        only[rows] = True
        before, after = (_own(settings, sheet, answers, only) for answers in (parsed, said))
        people = len(np.unique(sheet.subjects[rows]))
        changes = {name: _change(before[name], after[name], people) for name in before if "." not in name}
        found[kind] = {
            "faces": len(np.unique(sheet.faces[rows])),
            **changes.pop(CLOSED_MEAN, dict.fromkeys(("before", "after", "change"), stats.NOTHING)),
            "tasks": changes,
        }
    return found


def generation(settings: Settings, sheet: Sheet, parsed: Parsed, table: Path) -> dict[str, Any] | None:
    """How often free generation gives the answer that scoring the options gave: `agreement` with its interval, `n`
    questions, the same `by_task`, the `unreadable` share of generated answers, and `both_unreadable`, the share of
    questions to which both ways gave nothing to read: no agreement. None where there is no such table.

    Numbers agree within a step of the option grid.
    """
    if not table.is_dir():
        return None
    rows, said = read_some(open_table(table, PREDICTIONS), sheet)
    by_task: dict[str, list[bool]] = {}
    at: list[int] = []
    for key, own in sheet.rows.items():
        asked = own[np.isin(own, rows)]
        question = sheet.questions[key]
        agree = [same(question, said[r], parsed[r]) for r in asked]
        by_task.setdefault(key[0], []).extend(agree)
        at.extend(asked)
    agree = [hit for found in by_task.values() for hit in found]
    return {
        "agreement": share(settings, sheet, sheet.subjects[at], agree),
        "n": len(at),
        "by_task": {
            name: {"value": stats.plain(sum(found) / len(found)), "n": len(found)}
            for name, found in by_task.items()
            if found
        },
        "unreadable": stats.plain(sum(said[row] is None for row in at) / len(at)) if at else None,
        "both_unreadable": stats.plain(sum(said[row] is parsed[row] is None for row in at) / len(at)) if at else None,
    }


def _own(settings: Settings, sheet: Sheet, parsed: Parsed, only: Mask) -> dict[str, Array]:
    """Replicates of each figure's own metric, of some questions."""
    return heads(replicate(sheet, parsed, settings.evaluate.bootstrap, settings.seed, only))


def _change(before: Array, after: Array, people: int) -> dict[str, Any]:
    return {
        "before": stats.spread(before, people),
        "after": stats.spread(after, people),
        "change": stats.spread(after - before, people),
    }


def _slices(sheet: Sheet) -> Mapping[str, Mask]:
    found: dict[str, Mask] = {}
    turn = abs(numbers(sheet.said(("head_pose", "yaw"), sheet.answers)))
    found["frontal"] = turn <= FRONTAL
    found["turned"] = (turn > FRONTAL) & (turn <= PROFILE)
    found["profile"] = turn > PROFILE
    occluded, known = np.zeros(len(sheet.images), dtype=bool), np.zeros(len(sheet.images), dtype=bool)
    for key in sheet.rows:
        if values := [value for item, value in _OCCLUDING if item == key[1]]:
            said = sheet.said(key, sheet.answers)
            known |= [answer is not None for answer in said]
            occluded |= [answer in values for answer in said]
    found["occluded"], found["unoccluded"] = occluded, known & ~occluded
    return found
