"""The gate: whether a model may be put before a person. It fails on everything it cannot see.

Four kinds of checks. Thresholds: every figure named in `promote.thresholds` reaches its bound. Constant answer: the
95 % interval of every task lies wholly on the good side of what that scores. Fairness: no gap between two
groups of people is shown to exceed `promote.fairness_gap` of its task, corrected for all pairs of the task; with
`promote.fairness_power: required`, the people are also enough to show a gap of that size in any pair. Champion:
both models have answered the same questions; a task fails where the whole 95 % interval of the paired difference is
worse than the champion by more than `champion_margin` (a share of the champion's error for errors, points of the figure
otherwise), uncorrected: here a false alarm costs less than a loss let through. A figure that is missing or undefined,
and a kind of group that a fairness rule knows but that has no two groups of enough people, fails its check.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from facemllm import tasks
from facemllm.errors import UserError
from facemllm.scoring import fairness, paired, stats
from facemllm.scoring.figures import shown_gaps
from facemllm.scoring.metrics import BALANCED, CLOSED_MEAN, clears_constant, of
from facemllm.scoring.sheet import BETWEEN
from facemllm.settings import Settings
from facemllm.settings.operations import Threshold


@dataclass(frozen=True)
class Decision:
    """The gate's answer: why it refuses (or what it found in order), and every check.

    A check has its kind (`check`), `key`, whether it `passed` and the `reason` in words, and of what these are made:
    `value`, its `bound` and interval (`low`, `high`); of fairness the `groups` that the gap is between, people by
    kind and group that are `too_few` to be judged, and the largest `minimum_detectable_difference`.
    """

    passed: bool
    reasons: list[str]
    checks: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Difference:
    """A figure of two models on the same questions; `worse` is how much worse the candidate is, with its interval."""

    candidate: float
    champion: float
    worse: stats.Interval


def decide(settings: Settings, conversations: Path, candidate: Path, champion: Path | None = None) -> Decision:
    """Judge the evaluation folder of a candidate, against that of the champion if there is one.

    Raises UserError for a threshold that names nothing, for metrics that do not belong to the predictions beside them,
    and when the two models have not answered the same questions.
    """
    metrics = paired.read_metrics(candidate)
    if not isinstance(metrics.get("tasks"), dict):
        raise UserError(f"{candidate} is not an evaluation: metrics.json does not state tasks; evaluate again")
    if champion is None or paired.read_metrics(champion)["model_digest"] == metrics["model_digest"]:
        return judge(settings, metrics)
    return judge(settings, metrics, differences(settings, conversations, candidate, champion))


def judge(settings: Settings, metrics: Mapping[str, Any], against: Mapping[str, Difference] | None = None) -> Decision:
    """Judge figures alone: `metrics` as in metrics.json, `against` the champion by task."""
    rules, asked = settings.promote, known_rules(settings)
    checks = [_threshold(key, bound, _find(metrics, key)) for key, bound in asked.items()]
    for name in settings.reformat.tasks:
        entry = metrics["tasks"].get(name)
        if entry is None and not rules.every_task:
            continue
        if entry is None or _number(entry["value"]) is None:
            checks.append(_check("present", name, False, f"{name} has no figure; every task must be evaluated"))
        elif rules.above_constant:
            checks.append(_above_constant(name, entry))
        if against is not None and entry is not None:
            checks.append(_no_worse(name, against.get(name), rules.champion_margin, entry))
    gaps = {name: gap for name, gap in rules.fairness_gap.items() if gap is not None}
    checks += [_fair(settings, name, gap, metrics) for name, gap in gaps.items()]
    failed = [check["reason"] for check in checks if not check["passed"]]
    return Decision(not failed, failed or [_in_order(settings, metrics, checks, against)], checks)


def known_rules(settings: Settings) -> dict[str, Threshold]:
    """The thresholds that are asked for. Raises UserError when one, or a fairness rule, names no task or item there is,
    or when a figure is bounded on its wrong side."""
    asked = {key: bound for key, bound in settings.promote.thresholds.items() if bound is not None}
    for key, bound in asked.items():
        _threshold(key, bound, _find({"tasks": {}}, key))
    if unknown := sorted(set(settings.promote.fairness_gap) - set(tasks.all_names())):
        known = ", ".join(tasks.all_names())
        raise UserError(f"promote.fairness_gap.{unknown[0]}: no task '{unknown[0]}'; choose from {known}")
    return asked


def differences(settings: Settings, conversations: Path, candidate: Path, champion: Path) -> dict[str, Difference]:
    """Every figure of two evaluations, paired: the same resampled people for both. By name as in metrics.json.

    Raises UserError unless both have answered the same questions of these conversations.
    """
    mine, yours = paired.replicates(settings, paired.read_pair(conversations, candidate, champion))
    found = {}
    for name, values in mine.items():
        gap = yours[name] - values if _higher_is_better(name) else values - yours[name]
        found[name] = Difference(float(values[0]), float(yours[name][0]), stats.interval(gap))
    return found


def _higher_is_better(key: str) -> bool:
    return key == CLOSED_MEAN or of(tasks.get(key.partition(".")[0])).higher_is_better


def _find(metrics: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """The figure a threshold names; None when it was not measured. Raises UserError when there is no such thing."""
    name, _, item = key.partition(".")
    if key == CLOSED_MEAN:
        found: Mapping[str, Any] | None = metrics.get(CLOSED_MEAN)
        return found
    if name not in tasks.all_names():
        raise UserError(f"promote.thresholds.{key}: no task '{name}'; choose from {', '.join(tasks.all_names())}")
    known = [question.item for question in tasks.get(name).questions()] + [BALANCED]
    if item and item not in known:
        raise UserError(f"promote.thresholds.{key}: {name} has no item '{item}'; choose from {', '.join(known)}")
    entry = metrics["tasks"].get(name)
    return entry["items"].get(item) if entry is not None and item else entry


def _threshold(key: str, bound: Threshold, entry: Mapping[str, Any] | None) -> dict[str, Any]:
    higher = _higher_is_better(key)
    if (bound.min is not None) != higher:
        word, side = ("more", "min") if higher else ("less", "max")
        raise UserError(f"promote.thresholds.{key}: {word} is better here, so give {side}")
    limit = bound.min if bound.min is not None else bound.max
    assert limit is not None
    value = _number(entry["value"]) if entry else None
    if value is None:
        return _check("threshold", key, False, f"{key} has no figure to hold against the threshold {limit:g}")
    passed = value >= limit if higher else value <= limit
    words = ("reaches" if higher else "is within") if passed else ("is below" if higher else "is above")
    reason = f"{key} {value:.4g} {words} the threshold {limit:g}"
    return _check("threshold", key, passed, reason, value=value, bound=limit)


def _above_constant(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    low, high = _number(entry["low"]), _number(entry["high"])
    rival = _number(entry["baselines"].get("constant"))
    if low is None or high is None or rival is None:
        missing = "95 % interval" if rival is not None else "constant answer"
        return _check("constant", name, False, f"{name} has no {missing}, so it is not shown to have been learnt")
    passed = clears_constant(entry)
    words = "clears" if passed else "does not clear"
    reason = f"{name} {entry['value']:.4g} [{low:.4g}, {high:.4g}] {words} the constant answer {rival:.4g}"
    return _check("constant", name, passed, reason, value=entry["value"], bound=rival, low=low, high=high)


def _no_worse(name: str, difference: Difference | None, margin: float, entry: Mapping[str, Any]) -> dict[str, Any]:
    if difference is None or _number(difference.worse.low) is None:
        return _check("champion", name, False, f"{name} cannot be compared with the champion")
    allowed = margin if entry["higher_is_better"] else margin * difference.champion
    worse = difference.worse
    passed = worse.low <= allowed
    words = "not shown to be worse than" if passed else "worse than"
    reason = (
        f"{name} {difference.candidate:.4g} is {words} the champion's {difference.champion:.4g} by more than "
        f"{allowed:.3g} (worse by {worse.value:.3g}, 95 % [{worse.low:.3g}, {worse.high:.3g}])"
    )
    figures = {"value": worse.value, "bound": allowed, "low": worse.low, "high": worse.high}
    return _check("champion", name, passed, reason, **figures)


def _fair(settings: Settings, name: str, allowed: float, metrics: Mapping[str, Any]) -> dict[str, Any]:
    kinds = (metrics.get("fairness") or {}).get(name) or {}
    gaps = [{**gap, "kind": kind} for kind, entry in kinds.items() for gap in entry["gaps"] if gap["p"] is not None]
    if any("minimum_detectable_difference" not in gap for gap in gaps):
        raise UserError(f"the gaps of {name} were tested by an earlier version of this project; evaluate again")
    enough, mend = settings.evaluate.min_group, f"or set promote.fairness_gap.{name} to null"
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
        return _check("fairness", name, False, reason, bound=allowed)
    few = {}
    for kind in (kind for kind in kinds if BETWEEN not in kind):
        if rare := {name: body["people"] for name, body in kinds[kind]["groups"].items() if body["too_few"]}:
            few[kind] = rare
    shown = fairness.beyond(kinds, allowed)
    least = max(fairness.judged(kinds, allowed), key=lambda gap: gap["minimum_detectable_difference"] or 0.0)
    gap = shown[0] if shown else max(gaps, key=lambda gap: abs(gap["value"]))
    words = "is shown to exceed" if shown else "is not shown to exceed"
    reason = (
        f"{name} differs by {abs(gap['value']):.3g} between {gap['a']} and {gap['b']} "
        f"(95 % [{gap['low']:.3g}, {gap['high']:.3g}]), which {words} {allowed:g}, corrected for {len(gaps)} pairs"
    )
    size = least["minimum_detectable_difference"]
    blind = size is not None and size > allowed
    if blind:
        reason += (
            f"; too few people to see that: the minimum detectable difference of {least['a']} and {least['b']} is "
            f"{size:.3g} (evaluate more people, raise evaluate.min_group or promote.fairness_gap.{name})"
        )
    reason += f"; {_unjudged([few])}" if few else ""
    figures = {name: gap[name] for name in ("value", "low", "high")}
    figures |= {
        "bound": allowed,
        "groups": [gap["a"], gap["b"]],
        "too_few": few,
        "minimum_detectable_difference": size,
    }
    passed = not shown and not (blind and settings.promote.fairness_power == "required")
    return _check("fairness", name, passed, reason, **figures)


def _people(groups: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count} people" for name, count in groups.items())


def _unjudged(few: Sequence[Mapping[str, Mapping[str, int]]]) -> str:
    """Groups that are too few to be judged, of one check or several, in words."""
    each = ["; ".join(f"{kind} {_people(groups)}" for kind, groups in kinds.items()) for kinds in few]
    return f"too few people to judge: {'; '.join(dict.fromkeys(each))}"


def _in_order(
    settings: Settings,
    metrics: Mapping[str, Any],
    checks: list[dict[str, Any]],
    against: Mapping[str, Difference] | None,
) -> str:
    kinds = [check["check"] for check in checks]
    parts = [f"{kinds.count('threshold')} thresholds are met"]
    if settings.promote.above_constant:
        parts.append(f"all {kinds.count('constant')} tasks are better than a constant answer")
    if "fairness" in kinds:
        few = [check["too_few"] for check in checks if check.get("too_few")]
        unjudged = f" ({_unjudged(few)})" if few else ""
        seen = [
            f"{check['key']} {check['minimum_detectable_difference']:.3g}"
            for check in checks
            if check.get("minimum_detectable_difference")
        ]
        power = f"; minimum detectable difference at most: {', '.join(seen)}" if seen else ""
        parts.append(f"no gap between groups is shown to exceed what is allowed{unjudged}{power}")
    limits = settings.promote.fairness_gap
    free = [f"{g['task']} by {g['kind']}" for g in shown_gaps(metrics) if limits.get(g["task"]) is None]
    if free:
        parts.append(f"gaps shown that promote.fairness_gap sets no limit to: {', '.join(free)}")
    champion = "there is no other champion to compare with" if against is None else "no task is worse than the champion"
    return "; ".join([*parts, champion])


def _check(kind: str, key: str, passed: bool, reason: str, **figures: Any) -> dict[str, Any]:
    return {"check": kind, "key": key, "passed": passed, "reason": reason, **figures}


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
