"""Combinations of characteristics that training never showed together: whether both are answered where both are seen.

`together` are the faces that show all characteristics of a combination, `apart` those that show one of them and none of
the others; of both kinds only faces that are asked about all of them. Were seeing them together no harder, all would be
answered right as often as the shares `apart` multiply to: that product is `expected`.

Intervals are bootstraps over people. Where all answers are right, or all wrong, a bootstrap has no width: the end is
then that of Clopper and Pearson (1934) over people. A difference's interval adds those of its two sides in squares
(Newcombe 1998, Statistics in Medicine 17, method 10). Legend: F faces.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from facemllm.scoring import stats
from facemllm.scoring.metrics import ACCURACY, Array, Parsed
from facemllm.scoring.sheet import Key, Mask, Sheet
from facemllm.settings import Settings
from facemllm.tasks import ZERO_SHOT
from facemllm.tasks.characteristics import characteristic, members
from facemllm.tasks.combinations import JOINED


def measure(
    settings: Settings,
    sheet: Sheet,
    parsed: Parsed,
    rivals: Mapping[str, Parsed],
    combinations: Sequence[Sequence[str]],
) -> dict[str, Any]:
    """By combination: `faces` and `people` that show it, whether these are fewer people than `evaluate.min_group`
    (`too_few`); the share of these faces on which `all` is answered right, what is `expected`, their `difference`, and
    by characteristic its share `together` and `apart`, with their `difference` and how many faces and people they are
    of. `baselines` are the rivals' shares on the same faces. One that the split does not ask about has no faces."""
    return {JOINED.join(names): _measured(settings, sheet, parsed, rivals, names) for names in combinations}


def _measured(
    settings: Settings, sheet: Sheet, parsed: Parsed, rivals: Mapping[str, Parsed], names: Sequence[str]
) -> dict[str, Any]:
    found = [_asked(sheet, name) for name in names]
    pairs = [pair for pair in found if pair is not None]
    asked = len(pairs) == len(names)
    true_F = [_answers(sheet, key, value, sheet.answers) for key, value in pairs]
    known = [_known(sheet, key) for key, _ in pairs]
    everywhere = np.logical_and.reduce(known) if asked else np.zeros(len(sheet.images), dtype=bool)
    together = np.logical_and.reduce([everywhere, *true_F])
    apart = [
        np.logical_and.reduce([everywhere, own, *(~other for j, other in enumerate(true_F) if j != i)])
        for i, own in enumerate(true_F)
    ]
    right = [_answers(sheet, key, value, parsed) for key, value in pairs]
    all_right = np.logical_and.reduce([together, *right])
    sums: dict[Any, stats.Sums] = {"all": _sums(sheet, all_right, together)}
    for name, own, alone in zip(names, right, apart, strict=False):
        sums[name, "together"], sums[name, "apart"] = _sums(sheet, own, together), _sums(sheet, own, alone)
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = stats.replicate(sums, settings.evaluate.bootstrap, settings.seed)
    people, alone = _people(sheet, together), [_people(sheet, mask) for mask in apart]
    rest = {name: [_answers(sheet, key, value, said) for key, value in pairs] for name, said in rivals.items()}
    every = _spread(drawn["all"], people)
    by_name: dict[str, Any] = {}
    for place, name in enumerate(names if asked else ()):
        one, other = _spread(drawn[name, "together"], people), _spread(drawn[name, "apart"], alone[place])
        by_name[name] = {
            "together": one,
            "apart": other,
            "difference": _minus(one, other),
            "faces_apart": int(apart[place].sum()),
            "people_apart": alone[place],
            "baselines": {rival: stats.plain_mean(said[place][together]) for rival, said in rest.items()},
        }
    product = np.prod([drawn[name, "apart"] for name in names], axis=0) if asked else None
    expected = dict(stats.NOTHING) if product is None else _spread(product, min(alone))
    return {
        "faces": int(together.sum()),
        "people": people,
        "too_few": people < settings.evaluate.min_group,
        "all": every,
        "expected": expected,
        "difference": _minus(every, expected),
        "baselines": {
            rival: stats.plain_mean(np.logical_and.reduce(said)[together]) for rival, said in rest.items() if asked
        },
        "characteristics": by_name,
    }


def _asked(sheet: Sheet, name: str) -> tuple[Key, str] | None:
    """The question of the sheet, in its item's own form, that tells a characteristic, and the answer that affirms
    it."""
    for key in sheet.rows:
        if key[0] == ZERO_SHOT:
            continue
        item = next((item for item in members(key[0]) if item.name == key[1]), None)
        values = () if item is None else ("yes",) if item.form == "boolean" else [o.value for o in item.options]
        for value in values:
            if item is not None and characteristic(item, value) == name:
                return key, value
    return None


def _answers(sheet: Sheet, key: Key, value: str, said: Parsed) -> Mask:
    return np.array([answer == value for answer in sheet.said(key, said)], dtype=bool)


def _known(sheet: Sheet, key: Key) -> Mask:
    return np.isin(np.arange(len(sheet.images)), sheet.faces[sheet.rows[key]])


def _people(sheet: Sheet, chosen: Mask) -> int:
    return len(np.unique(sheet.people[chosen]))


def _sums(sheet: Sheet, right: Mask, of: Mask) -> stats.Sums:
    columns = np.stack([right & of, of], axis=1)
    return stats.Sums(ACCURACY, stats.by_subject(sheet.people, columns, sheet.people_count))


def _spread(drawn: Array, people: int) -> dict[str, float | None]:
    found = stats.spread(drawn, people)
    edge = (1 - stats.LEVEL) / 2
    if people > 1 and found["value"] == 1:
        found["low"] = stats.plain(edge ** (1 / people))
    if people > 1 and found["value"] == 0:
        found["high"] = stats.plain(1 - edge ** (1 / people))
    return found


def _minus(one: Mapping[str, float | None], other: Mapping[str, float | None]) -> dict[str, float | None]:
    ends = [figure[end] for figure in (one, other) for end in ("value", "low", "high")]
    known = [math.nan if end is None else end for end in ends]
    a, a_low, a_high, b, b_low, b_high = known
    low, high = math.hypot(a - a_low, b_high - b), math.hypot(a_high - a, b - b_low)
    return {"value": stats.plain(a - b), "low": stats.plain(a - b - low), "high": stats.plain(a - b + high)}
