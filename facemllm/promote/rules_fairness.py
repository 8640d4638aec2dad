"""The gate's rule about groups of people: no gap between two of them is shown to exceed what is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from facemllm.errors import UserError
from facemllm.promote.checks import Check, check
from facemllm.scoring import fairness
from facemllm.scoring.sheet import BETWEEN
from facemllm.settings import Settings


def fair(settings: Settings, name: str, allowed: float, metrics: Mapping[str, Any]) -> Check:
    """No gap of a task is shown to exceed `allowed`, corrected for all its pairs; with `fairness_power: required`, the
    people are also enough to show one. More than a check's usual: the `groups` that the gap is between, people by kind
    and group that are `too_few` to be judged, and of the pairs of groups the largest
    `minimum_detectable_difference` and `minimum_refused_gap`, where people differ at all."""
    kinds = (metrics.get("fairness") or {}).get(name) or {}
    setting = f"promote.fairness_gap.{name}"
    gaps = [{**gap, "kind": kind} for kind, entry in kinds.items() for gap in entry["gaps"] if gap["p"] is not None]
    if any("minimum_detectable_difference" not in gap for gap in gaps):
        raise UserError(f"the gaps of {name} were tested by an earlier version of this project; evaluate again")
    enough, mend = settings.evaluate.min_group, f"or set {setting} to null"
    unseen = [
        f"by {kind} ({_people({group: body['people'] for group, body in entry['groups'].items()})})"
        for kind, entry in kinds.items()
        if BETWEEN not in kind and len(entry["groups"]) > 1 and not any(gap["kind"] == kind for gap in gaps)
    ]
    if unseen or not gaps:
        reason = (
            f"{name} cannot be compared {' and '.join(unseen) or 'between groups'}: no two groups have {enough} people "
            f"whose answers can be read; evaluate more people with known groups, lower evaluate.min_group {mend}"
        )
        return check("fairness", name, False, reason, setting=setting, limit=allowed)
    few = {}
    for kind in (kind for kind in kinds if BETWEEN not in kind):
        if rare := {name: body["people"] for name, body in kinds[kind]["groups"].items() if body["too_few"]}:
            few[kind] = rare
    held = fairness.judged(kinds, allowed)
    shown = fairness.beyond(held)
    least = max(held, key=lambda gap: gap["minimum_detectable_difference"] or 0.0)
    gap = shown[0] if shown else max(gaps, key=lambda gap: abs(gap["value"]))
    words = "is shown to exceed" if shown else "is not shown to exceed"
    reason = (
        f"{name} differs by {abs(gap['value']):.3g} between {gap['a']} and {gap['b']} "
        f"(95 % [{gap['low']:.3g}, {gap['high']:.3g}]), which {words} {allowed:g}, corrected for {len(gaps)} pairs"
    )
    size = least["minimum_detectable_difference"]
    refused = max((gap["minimum_refused_gap"] for gap in held if gap["minimum_refused_gap"] is not None), default=None)
    if refused is not None:
        reason += f"; a gap of {refused:.3g} or more is refused four times in five"
    blind = size is not None and size > allowed
    if blind:
        reason += (
            f"; too few people to tell a gap of {allowed:g} from none: the minimum detectable difference of "
            f"{least['a']} and {least['b']} is {size:.3g} (evaluate more people, raise evaluate.min_group or {setting})"
        )
    reason += f"; {unjudged([few])}" if few else ""
    figures = {name: gap[name] for name in ("value", "low", "high")}
    passed = not shown and not (blind and settings.promote.fairness_power == "required")
    return check(
        "fairness",
        name,
        passed,
        reason,
        setting=setting,
        limit=allowed,
        groups=[gap["a"], gap["b"]],
        too_few=few,
        minimum_detectable_difference=size,
        minimum_refused_gap=refused,
        **figures,
    )


def unjudged(few: Sequence[Mapping[str, Mapping[str, int]]]) -> str:
    """Groups that are too few to be judged, of one check or several, in words."""
    each = ["; ".join(f"{kind} {_people(groups)}" for kind, groups in kinds.items()) for kinds in few]
    return f"too few people to judge: {'; '.join(dict.fromkeys(each))}"


def _people(groups: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count} people" for name, count in groups.items())
