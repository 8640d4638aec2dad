"""What `repeats.py` says: the figures of a record, and tables of all records for a terminal and for Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from facemllm.report.kit import p_value, table
from facemllm.scoring import stats
from facemllm.scoring.metrics import ACCURACY, CLOSED_MEAN, METRICS
from studies.ablation.report import LOWER_IS_BETTER, together
from studies.ablation.running import WITHOUT_MAP

HARD = ("attributes.eye_color", "attributes.hair_style", "attributes.beard")
"""Items that have a row of their own; all items are in the records."""
BROKEN = "broken"

Record = Mapping[str, Any]
Row = list[str]


def figures_of(metrics: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Figures of a `metrics.json` by name, and the metric of each: `closed_mean`, `task`, `task.item`, and shares."""
    found: dict[str, tuple[Any, str]] = {}
    closed = metrics.get(CLOSED_MEAN)
    if closed:
        found[CLOSED_MEAN] = closed["value"], closed["metric"]
    for task, body in metrics["tasks"].items():
        found[task] = body["value"], body["metric"]
        found |= {f"{task}.{item}": (part["value"], part["metric"]) for item, part in body["items"].items()}
    consistency = metrics.get("consistency") or {}
    for way, body in (consistency.get("ways") or {}).items():
        name = {"statement": "statements", "unseen": "rewording"}.get(way, f"asked as {way}")
        found[name] = body[ACCURACY.name]["value"], ACCURACY.name
        found[f"{name}, answered alike"] = body["agreement"]["value"], ACCURACY.name
    for kind, body in (metrics.get("disturbed") or {}).items():
        kept_out = ", kept out of training" if body.get("trained") is False else ""
        found[f"disturbed: {kind}{kept_out}"] = body["after"]["value"], ACCURACY.name
    for name, body in (metrics.get("combinations") or {}).items():
        found[f"combination: {name}"] = body["all"]["value"], ACCURACY.name
        found[f"combination: {name}, less expected"] = body["difference"]["value"], ACCURACY.name
    for name in ("relations", "captions"):
        model = (consistency.get(name) or {}).get("model") or {}
        found[f"{name} broken"] = model.get("value"), BROKEN
    known = {name: pair for name, pair in found.items() if pair[0] is not None}
    return {name: value for name, (value, _) in known.items()}, {name: metric for name, (_, metric) in known.items()}


def compared(records: Sequence[Record], baseline: str) -> dict[str, Any]:
    """`together` of the ablation, with p values corrected (Holm) over all figures that are shown and all recipes."""
    found = together(records, baseline)
    gaps = [
        figure["difference"]
        for one in found.values()
        for name, figure in one["figures"].items()
        if is_shown(name) and "difference" in figure
    ]
    for gap, p in zip(gaps, stats.holm([math.nan if gap["p"] is None else gap["p"] for gap in gaps]), strict=True):
        gap["p_holm"] = None if math.isnan(p) else p
    return found


def is_shown(name: str) -> bool:
    """Whether a figure has a row of its own."""
    return "." not in name or name in HARD


def rows(records: Sequence[Record], baseline: str) -> list[Row]:
    """The head, then a row a figure and recipe: each seed's value, mean, standard deviation, difference, p (Holm)."""
    found = compared(records, baseline)
    seeds = sorted({record["seed"] for record in records})
    values = {(one["variant"], one["seed"]): one["figures"][WITHOUT_MAP] for one in records}
    kinds = {name: metric for one in records for name, metric in one["metrics"].items()}
    head = ["figure", "recipe", *(f"seed {seed}" for seed in seeds), "mean", "sd", f"against {baseline}", "p (Holm)"]
    made = [head]
    order = [baseline, *(name for name in found if name != baseline)]
    for name in filter(is_shown, kinds):
        digits = METRICS[kinds[name]].digits if kinds[name] in METRICS else 3
        less = " (less is better)" if kinds[name] in LOWER_IS_BETTER else ""
        for recipe in order:
            if name not in found[recipe]["figures"]:
                continue
            each = [values.get((recipe, seed), {}).get(name) for seed in seeds]
            known = [value for value in each if value is not None]
            gap = found[recipe]["figures"][name].get("difference")
            made.append(
                [
                    f"{name}{less}",
                    recipe,
                    *(_number(value, digits) for value in each),
                    _number(statistics.fmean(known), digits),
                    _number(statistics.stdev(known), digits + 1) if len(known) > 1 else "–",
                    "" if gap is None else _difference(gap, digits),
                    "" if gap is None else p_value(gap.get("p_holm")),
                ]
            )
    return made


def costs(records: Sequence[Record]) -> list[Row]:
    """The head, then a row a recipe and stage, means over seeds, and the sum of each recipe's stages."""
    made = [["recipe", "stage", "seconds", "start-up (s)", "faces", "operations (TFLOP)"]]
    for recipe, group in groupby(records, key=lambda record: record["variant"]):
        own = list(group)
        parts = [(stage, [one["stages"][stage] for one in own]) for stage in own[0]["stages"]]
        whole = [_sum(list(one["stages"].values())) for one in own]
        for stage, each in [*parts, ("together", whole)] if len(parts) > 1 else parts:
            flops = [one.get("operations") for one in each]
            made.append(
                [
                    recipe,
                    stage,
                    _spread([one["seconds"] for one in each]),
                    _spread([one["start"] for one in each]),
                    f"{statistics.fmean(one['faces'] for one in each):,.0f}",
                    "–" if None in flops else f"{statistics.fmean(flops) / 1e12:,.1f}",
                ]
            )
        if spent := [one["evaluation_seconds"] for one in own if "evaluation_seconds" in one]:
            made.append([recipe, "evaluation", _spread(spent), "", "", ""])
    return made


def facts(records: Sequence[Record], baseline: str, looks: int | None) -> list[str]:
    """Sentences: data, recipes, machines, how the recipe was chosen, and what cannot be compared."""
    first = records[0]
    said = [
        f"Split {first['split']}: {first['images']:,} images of {first['people']:,} people.",
        "A difference is that of runs of the same seed, its interval a 95 % t interval over seeds; p by a paired t "
        "test, corrected (Holm) over all figures and recipes here. What other people would change is not in it.",
        "The specialist has, from the start of its process, as many seconds as the recipe of the same seed.",
    ]
    if looks is None:
        said.append("How often validation was looked at to choose the recipe is not stated (--looks).")
    else:
        said.append(f"Validation was looked at {looks:,} times to choose the recipe.")
    for recipe, group in groupby(records, key=lambda record: record["variant"]):
        own = list(group)
        made = sorted({_place(one) for one in own})
        with_what = " ".join([f"profile {own[0]['profile']}", *own[0]["overrides"]])
        said.append(f"{recipe}: {with_what}; {len(own)} seeds on {'; '.join(made)}.")
        if again := [str(one["seed"]) for one in own if one["resumed"]]:
            said.append(f"{recipe}: seeds {', '.join(again)} were interrupted, so their seconds do not compare.")
    if len({one["machine"]["processor"] for one in records}) > 1:
        said.append("Not all runs are of one processor: seconds do not compare, and figures differ by that, too.")
    few = [recipe for recipe, group in groupby(records, key=lambda r: r["variant"]) if len(list(group)) < 3]
    if few:
        said.append(f"Fewer than three seeds, so no better or worse is said: {', '.join(few)}.")
    return said


def terminal(records: Sequence[Record], baseline: str, looks: int | None) -> str:
    """A table a figure, the costs, and the facts, in plain text."""
    head, *body = rows(records, baseline)
    parts = [
        "\n".join([name, _columns([[*head[1:]], *([*row[1:]] for row in group)])])
        for name, group in groupby(body, key=lambda row: row[0])
    ]
    return "\n\n".join([*parts, _columns(costs(records)), "\n".join(facts(records, baseline, looks))])


def markdown(records: Sequence[Record], baseline: str, looks: int | None) -> str:
    """The same as Markdown, one table of all figures."""
    said = "\n".join(f"- {_plain(line)}" for line in facts(records, baseline, looks))
    return f"{table(rows(records, baseline))}\n\n{table(costs(records))}\n\n{said}\n"


def _plain(line: str) -> str:
    from facemllm.report.kit import plain_markdown

    return str(plain_markdown(line))


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _difference(gap: Mapping[str, Any], digits: int) -> str:
    value, low, high = (None if gap[end] is None else f"{gap[end]:+.{digits}f}" for end in ("value", "low", "high"))
    return f"{value}" if low is None else f"{value} [{low}, {high}]"


def _spread(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    between = f" ({low:,.0f} to {high:,.0f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):,.0f}{between}"


def _sum(stages: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    names = set.intersection(*(set(one) for one in stages))
    return {name: sum(one[name] for one in stages) for name in names}


def _place(record: Record) -> str:
    where = record["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return f"{where['processor']}, {where['cores']} cores, commit {(record['commit'] or 'unknown')[:12]}, {packages}"


def _columns(lines: Sequence[Row]) -> str:
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)
