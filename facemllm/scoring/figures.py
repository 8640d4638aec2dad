"""An evaluation as MLflow shows it: metric names, tables of results, some answers to look at.

Pure functions of `metrics.json` (or of the `tasks` of a summary) and of the predictions table. Metric names are stable,
so that runs compare:

    <task>/<metric>  .../<metric>_low  _high        figure and its 95 % interval: age/mae, age/mae_low, age/mae_high
    <task>/n .../unreadable .../refused             questions asked, shares of answers unreadable and refused
    <task>/minimum_detectable_difference            between two models, on this test set
    <task>/baseline_constant  .../baseline_pixels   what needs no model, or a small one
    <task>/also/<metric> ...                        a further metric of the task: attributes/also/accuracy
    <task>/<item>/<metric> ...                      the same for an item of a task: head_pose/yaw/mae
    fairness/<task>/<kind>/<group>                  figure of a group of people; kinds: gender, age_band, skin_tone
    fairness/<task>/<kind>/largest_gap/value ...    between two groups; kinds also by pairs: gender x age_band
    fairness/gaps/compared  fairness/gaps/shown     kinds of groups over all tasks, and those in which a gap is shown
    fairness/gaps/minimum_detectable_difference/<task>/low ...  high         of its pairs of groups
    consistency/...                                 shares of broken relations; ways to ask, beside asking outright
    calibration/<task>/ece  .../expected            expected calibration error, and that of a calibrated model
    slices/<name>/...  disturbed/<kind>/...         figures of kinds of faces, and of pictures made worse
    combinations/<a with b>/all/value ...           faces of a combination held out of training: all of it right
    generation/...  characteristics/...             free generation, and the knowledge branch, beside the answers

The figures are in `plots.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from facemllm.scoring.metrics import METRICS, label
from facemllm.scoring.stats import SHOWN

SAMPLES, RELATIONS = "training/samples", "training/relations"
"""Tables on a training stage's run: what the model says of a few fixed faces, and the audit of logical relations."""
FIGURES = ("value", "low", "high", "n", "unreadable", "refused", "minimum_detectable_difference")
HEAD = ("task", "item", "metric", "unit")
ANSWERS = ("task", "question", "answer", "parsed", "raw", "sample_id", "image_id")


@dataclass(frozen=True)
class Measure:
    """How figures of a metric are written. `answers` is what it judges: a class, a number or facts."""

    name: str
    label: str
    unit: str
    higher_is_better: bool
    digits: int
    answers: str

    @property
    def arrow(self) -> str:
        """Which way is better."""
        return "↑" if self.higher_is_better else "↓"

    @property
    def long(self) -> str:
        """The metric in words, with its unit."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    @property
    def short(self) -> str:
        """The metric's own name, with its unit."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


def measure(figure: Mapping[str, Any], metric: str | None = None) -> Measure:
    """How a figure is written, or another metric's figure of the same task."""
    name, unit = metric or str(figure.get("metric") or ""), str(figure.get("unit") or "")
    known = METRICS.get(name)
    if known is None:
        return Measure(name, label(name), "", True, 3, "class")
    # a share of answers within so many units has the unit in its words
    words = f"{known.label} {unit}".rstrip() if known.units else known.label
    in_unit = unit if known.in_unit else ""
    return Measure(name, words, in_unit, known.higher_is_better, known.digits, known.answers)


def task_metrics(
    tasks: Mapping[str, Any], prefix: str = "", *, items: bool = True, metric: str = "value"
) -> dict[str, float]:
    """Figures of tasks under their stable metric names; `items=False` leaves out the items of tasks. `metric` names the
    figures that do not name their own."""
    flat: dict[str, float] = {}
    for name, figures in tasks.items():
        base = f"{prefix}{name}"
        own = figures.get("metric") or metric
        flat |= numbers(_named(own, figures), f"{base}/")
        flat |= numbers({field: figures.get(field) for field in FIGURES[3:]}, f"{base}/")
        flat |= numbers(baselines(figures), f"{base}/baseline_")
        for further, found in (figures.get("also") or {}).items():
            flat |= numbers(_named(further, found), f"{base}/also/")
        if items:
            flat |= task_metrics(figures.get("items") or {}, f"{base}/", metric=own)
    return flat


def _named(metric: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """A figure and its interval under the name of its metric."""
    return {metric: found.get("value"), f"{metric}_low": found.get("low"), f"{metric}_high": found.get("high")}


def evaluation_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Every number of `metrics.json` that runs are compared by, under its stable name."""
    consistency, generation = metrics.get("consistency") or {}, metrics.get("generation") or {}
    relations = {**_who(consistency.get("relations")), "captions": _who(consistency.get("captions"))}
    parts = {
        "fairness": {task: _fairness(kinds) for task, kinds in (metrics.get("fairness") or {}).items()},
        "consistency": {**relations, **(consistency.get("ways") or {})},
        "calibration": metrics.get("calibration") or {},
        "slices": metrics.get("slices") or {},
        "disturbed": metrics.get("disturbed") or {},
        "combinations": metrics.get("combinations") or {},
        "generation": generation,
        "characteristics": metrics.get("characteristics") or {},
    }
    tasks = {**(metrics.get("tasks") or {}), "closed_mean": metrics.get("closed_mean") or {}}
    flat = task_metrics(tasks) | numbers(parts) | trust_metrics(trust(metrics))
    return {re.sub(r"[^\w./ :-]", "_", name): value for name, value in flat.items()}


def _fairness(kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Largest gap of every kind; figures of groups where a kind is no crossing of two others, whose groups are many."""
    found: dict[str, Any] = {}
    for kind, body in kinds.items():
        groups = body.get("groups") or {}
        values = {} if " x " in kind else {name: group.get("value") for name, group in groups.items()}
        found[kind] = {**values, "largest_gap": body.get("largest")}
    return found


def fairness_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a task, kind and group of people: figure, interval, people, unreadable share."""
    return [
        {"task": task, "kind": kind, "group": name, **group}
        for task, kinds in (metrics.get("fairness") or {}).items()
        for kind, body in kinds.items()
        for name, group in (body.get("groups") or {}).items()
    ]


def gap_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a task, kind and pair of groups: the gap with its interval and p values."""
    return [
        {"task": task, "kind": kind, **gap}
        for task, kinds in (metrics.get("fairness") or {}).items()
        for kind, body in kinds.items()
        for gap in body.get("gaps") or ()
    ]


def shown_gaps(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The largest of the gaps that are shown, for every task and kind of group that has one: corrected p below 5 %."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for gap in sorted(gap_rows(metrics), key=lambda gap: -abs(gap["value"])):
        if gap.get("p_holm") is not None and gap["p_holm"] < SHOWN:
            found.setdefault((gap["task"], gap["kind"]), gap)
    return [found[key] for key in sorted(found)]


def trust(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's summary says beside the figures of tasks: consistency, and gaps between groups of people.

    `consistency`: `model` and `truth`, the shares of broken relations, and the same two of `captions` that contradict
    the answers. `below_blind`: ways to ask in which fewer answers are right than without the picture, each with both
    shares. `combinations`: those held out of training, with how often `all` is answered right, and what is `expected`.
    `gaps`: in how many of the `compared` kinds of groups, over all
    tasks, a gap is `shown`, the `surest` of these, and by task the least and the largest
    `minimum_detectable_difference` of its pairs of groups.
    """
    consistency = metrics.get("consistency") or {}
    captions = _who(consistency.get("captions"))
    compared = {(gap["task"], gap["kind"]) for gap in gap_rows(metrics)}
    blind = {way: body for way, body in (consistency.get("ways") or {}).items() if body.get("blind") is not None}
    ways = {way: (body["accuracy"]["value"], body["blind"]) for way, body in blind.items()}
    ways = {way: (right, by_chance) for way, (right, by_chance) in ways.items() if right is not None}
    shown = shown_gaps(metrics)
    surest = min(shown, key=lambda gap: (gap["p_holm"], -abs(gap["value"])), default=None)
    return {
        "consistency": {**_who(consistency.get("relations")), **({"captions": captions} if captions else {})},
        "below_blind": {way: pair for way, pair in ways.items() if pair[0] < pair[1]},
        "combinations": {
            name: {key: body[key] for key in ("faces", "people", "too_few", "all", "expected", "baselines")}
            for name, body in (metrics.get("combinations") or {}).items()
        },
        "gaps": {
            "compared": len(compared),
            "shown": len(shown),
            "surest": surest,
            "minimum_detectable_difference": _detectable(metrics),
        },
    }


def _detectable(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    found: dict[str, list[float]] = {}
    for gap in gap_rows(metrics):
        if gap.get("minimum_detectable_difference") is not None:
            found.setdefault(gap["task"], []).append(gap["minimum_detectable_difference"])
    return {task: {"low": min(sizes), "high": max(sizes)} for task, sizes in found.items()}


def _who(found: Mapping[str, Any] | None) -> dict[str, Any]:
    return {who: share for who in ("model", "truth") if (share := (found or {}).get(who))}


def trust_metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of `trust` under their stable metric names."""
    gaps = {name: value for name, value in (found.get("gaps") or {}).items() if name != "surest"}
    return numbers({"consistency": found.get("consistency") or {}, "fairness": {"gaps": gaps}})


def baselines(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Value of each baseline of a task or item, whether it is stored as a number or with its interval."""
    stored = figures.get("baselines") or {}
    return {name: b.get("value") if isinstance(b, Mapping) else b for name, b in stored.items()}


def numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a nested mapping, by names joined with `/`; everything else is left out."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            flat[f"{prefix}{name}"] = float(value)
    return flat


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values under dotted names, as text: strings as they are, anything else as JSON."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[str | None, str | None]]:
    """Values that are not the same in two nested mappings, by dotted name; None where one has no such name."""
    ours, theirs = (flatten(json.loads(json.dumps(one, sort_keys=True, default=str))) for one in (first, second))
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return {name: (ours.get(name), theirs.get(name)) for name in names}


def results(tasks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a task, one a further metric and one an item of it: figure, interval, counts, baselines."""
    rows = []
    for task, figures in tasks.items():
        for item, part in [("", figures), *(figures.get("items") or {}).items()]:
            kind = {name: part.get(name) or figures.get(name) or "" for name in ("metric", "unit")}
            row = {"task": task, "item": item, **kind}
            rows.append(row | {field: part.get(field) for field in FIGURES} | baselines(part))
            for metric, found in ({} if item else figures.get("also") or {}).items():
                row = {"task": task, "item": "", "metric": metric, "unit": ""}
                rows.append(row | {field: found.get(field) for field in FIGURES})
    return rows


def tables(metrics: Mapping[str, Any], answers: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of the tables kept of an evaluation, by name: `results`, `answers`, `fairness` and `fairness_gaps`."""
    found = {
        "results": results(metrics["tasks"]),
        "fairness": fairness_rows(metrics),
        "fairness_gaps": gap_rows(metrics),
        "answers": sample_answers(answers),
    }
    return {name: rows for name, rows in found.items() if rows}


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows as columns; a value that a row lacks is None."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def sample_answers(predictions: Iterable[Mapping[str, Any]], per_task: int = 60) -> list[dict[str, Any]]:
    """Some answers of every task: those with the smallest sample ids, which are digests, so a fair and stable draw."""
    kept: dict[str, list[Mapping[str, Any]]] = {}
    for row in predictions:
        rows = kept.setdefault(row["task"], [])
        rows.append(row)
        if len(rows) >= 8 * per_task:
            kept[row["task"]] = sorted(rows, key=lambda r: r["sample_id"])[:per_task]
    return [
        {name: row[name] for name in ANSWERS}
        for task in sorted(kept)
        for row in sorted(kept[task], key=lambda r: r["sample_id"])[:per_task]
    ]
