"""The gate's rules about figures of an evaluation. Each fails on a figure that is missing or undefined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from facemllm import tasks
from facemllm.errors import UserError
from facemllm.promote.checks import Check, check, number
from facemllm.scoring import stats
from facemllm.scoring.metrics import BALANCED, CLOSED_MEAN, clears_constant, of
from facemllm.settings import Settings
from facemllm.settings.operations import Threshold

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """A figure of two models on the same questions; `worse` is how much worse the candidate is, with its interval."""

    candidate: float
    champion: float
    worse: stats.Interval


def known_rules(settings: Settings) -> dict[str, Threshold]:
    """The thresholds that are asked for. Raises UserError when one, or a fairness rule, names no task or item there is,
    or when a figure is bounded on its wrong side."""
    asked = {key: bound for key, bound in settings.promote.thresholds.items() if bound is not None}
    for key, bound in asked.items():
        threshold(key, bound, find({"tasks": {}}, key))
    if unknown := sorted(set(settings.promote.fairness_gap) - set(tasks.all_names())):
        known = ", ".join(tasks.all_names())
        raise UserError(f"promote.fairness_gap.{unknown[0]}: no task '{unknown[0]}'; choose from {known}")
    return asked


def higher_is_better(key: str) -> bool:
    """Of a figure by its name in metrics.json."""
    return key == CLOSED_MEAN or of(tasks.get(key.partition(".")[0])).higher_is_better


def find(metrics: Figures, key: str) -> Figures | None:
    """The figure a threshold names; None when it was not measured. Raises UserError when there is no such thing."""
    name, _, item = key.partition(".")
    if key == CLOSED_MEAN:
        found: Figures | None = metrics.get(CLOSED_MEAN)
        return found
    if name not in tasks.all_names():
        raise UserError(f"promote.thresholds.{key}: no task '{name}'; choose from {', '.join(tasks.all_names())}")
    known = [question.item for question in tasks.get(name).questions()] + [BALANCED]
    if item and item not in known:
        raise UserError(f"promote.thresholds.{key}: {name} has no item '{item}'; choose from {', '.join(known)}")
    entry = metrics["tasks"].get(name)
    return entry["items"].get(item) if entry is not None and item else entry


def threshold(key: str, bound: Threshold, entry: Figures | None) -> Check:
    """A figure reaches its bound."""
    higher, setting = higher_is_better(key), f"promote.thresholds.{key}"
    if (bound.min is not None) != higher:
        word, side = ("more", "min") if higher else ("less", "max")
        raise UserError(f"{setting}: {word} is better here, so give {side}")
    limit = bound.min if bound.min is not None else bound.max
    assert limit is not None
    value = number(entry["value"]) if entry else None
    if entry is None or value is None:
        reason = f"{key} has no figure to hold against the threshold {limit:g}"
        return check("threshold", key, False, reason, setting=setting, limit=limit)
    passed = value >= limit if higher else value <= limit
    words = ("reaches" if higher else "is within") if passed else ("is below" if higher else "is above")
    reason = f"{key} {value:.4g} {words} the threshold {limit:g}"
    ends = {end: number(entry.get(end)) for end in ("low", "high")}
    return check("threshold", key, passed, reason, setting=setting, value=value, limit=limit, **ends)


def above_constant(name: str, entry: Figures) -> Check:
    """The 95 % interval of a task lies wholly on the good side of what a constant answer scores."""
    low, high = number(entry["low"]), number(entry["high"])
    rival, setting = number(entry["baselines"].get("constant")), "promote.above_constant"
    if low is None or high is None or rival is None:
        missing = "95 % interval" if rival is not None else "constant answer"
        reason = f"{name} has no {missing}, so it is not shown to have been learnt"
        return check("constant", name, False, reason, setting=setting)
    passed = clears_constant(entry)
    words = "clears" if passed else "does not clear"
    reason = f"{name} {entry['value']:.4g} [{low:.4g}, {high:.4g}] {words} the constant answer {rival:.4g}"
    figures = {"value": entry["value"], "limit": rival, "low": low, "high": high}
    return check("constant", name, passed, reason, setting=setting, **figures)


def unreadable(name: str, entry: Figures, limit: float) -> Check:
    """Few of a task's answers cannot be read."""
    value = number(entry.get("unreadable"))
    if value is None:
        reason = f"{name} has no share of unreadable answers to hold against {limit:g}"
    else:
        words = "at most" if value <= limit else "more than"
        reason = f"{name}: a share of {value:.3g} of the answers cannot be read, {words} {limit:g}"
    passed = value is not None and value <= limit
    return check("unreadable", name, passed, reason, setting="promote.unreadable", value=value, limit=limit)


def no_worse(name: str, difference: Difference | None, margin: float, entry: Figures) -> Check:
    """A task is not shown to be worse than the champion by more than the margin."""
    setting = "promote.champion_margin"
    if difference is None or number(difference.worse.low) is None:
        return check("champion", name, False, f"{name} cannot be compared with the champion", setting=setting)
    allowed = margin if entry["higher_is_better"] else margin * difference.champion
    worse = difference.worse
    passed = worse.low <= allowed
    words = "not shown to be worse than" if passed else "worse than"
    reason = (
        f"{name} {difference.candidate:.4g} is {words} the champion's {difference.champion:.4g} by more than "
        f"{allowed:.3g} (worse by {worse.value:.3g}, 95 % [{worse.low:.3g}, {worse.high:.3g}])"
    )
    figures = {"value": worse.value, "limit": allowed, "low": worse.low, "high": worse.high}
    return check("champion", name, passed, reason, setting=setting, champion=difference.champion, **figures)


def consistent(settings: Settings, metrics: Figures) -> list[Check]:
    """The answers about one face seldom break a logical relation, nor captions an answer."""
    found = []
    for name, limit in settings.promote.contradictions.model_dump().items():
        if limit is None:
            continue
        figure = ((metrics.get("consistency") or {}).get(name) or {}).get("model") or {}
        what = {"relations": "relations between answers", "captions": "what captions and answers both say"}[name]
        reason = f"of {what}, a share of {{}} is broken"
        found.append(_share("contradictions", name, f"promote.contradictions.{name}", figure, limit, reason))
    return found


def robust(settings: Settings, metrics: Figures) -> list[Check]:
    """Mean balanced accuracy does not fall too far on pictures made worse."""
    found = []
    for name, limit in settings.promote.robustness.model_dump().items():
        if limit is None:
            continue
        change = ((metrics.get("disturbed") or {}).get(name) or {}).get("change") or {}
        value, low, high = (number(change.get(end)) for end in ("value", "low", "high"))
        fall = {"value": _minus(value), "low": _minus(high), "high": _minus(low)}
        condition = "without the map" if name == "no_map" else f"on {name} pictures"
        reason = f"mean balanced accuracy falls by {{}} {condition}"
        found.append(_share("robustness", name, f"promote.robustness.{name}", fall, limit, reason))
    return found


def _share(kind: str, name: str, setting: str, figure: Figures, limit: float, reason: str) -> Check:
    value, low, high = (number(figure.get(end)) for end in ("value", "low", "high"))
    if value is None:
        message = f"{name} has no figure for {setting}; set it to null where the data have none"
        return check(kind, name, False, message, setting=setting, limit=limit)
    passed = value <= limit
    message = f"{reason.format(f'{value:.3g}')}, {'at most' if passed else 'more than'} {limit:g}"
    return check(kind, name, passed, message, setting=setting, value=value, limit=limit, low=low, high=high)


def _minus(value: float | None) -> float | None:
    return None if value is None else 0.0 - value
