"""What `repeats.py` says: the figures of a record, and tables of all records for a terminal and for Markdown.

Markdown has a row a figure and a column a recipe, means and then differences; the values of single seeds are folded.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from markupsafe import Markup

from facemllm.report.kit import p_value, plain_markdown, table
from facemllm.scoring import stats
from facemllm.scoring.metrics import ACCURACY, BALANCED_ACCURACY, CLOSED_MEAN, METRICS
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
        found[f"{name}, asked outright"] = body["outright"]["value"], ACCURACY.name
    for kind, body in (metrics.get("disturbed") or {}).items():
        kept_out = ", kept out of training" if body.get("trained") is False else ""
        found[f"disturbed: {kind}{kept_out}"] = body["after"]["value"], BALANCED_ACCURACY.name
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
    found, order = _ordered(records, baseline)
    seeds = sorted({record["seed"] for record in records})
    values = {(one["variant"], one["seed"]): one["figures"][WITHOUT_MAP] for one in records}
    head = ["figure", "recipe", *(f"seed {seed}" for seed in seeds), "mean", "sd", f"against {baseline}", "p (Holm)"]
    made = [head]
    for name, label, digits in _shown(records):
        for recipe in order:
            if name not in found[recipe]["figures"]:
                continue
            each = [values.get((recipe, seed), {}).get(name) for seed in seeds]
            gap = found[recipe]["figures"][name].get("difference")
            made.append(
                [
                    label,
                    recipe,
                    *(_number(value, digits) for value in each),
                    *_spelled(_values(records, recipe, name), digits),
                    "" if gap is None else _difference(gap, digits),
                    "" if gap is None else p_value(gap.get("p_holm")),
                ]
            )
    return made


def means(records: Sequence[Record], baseline: str) -> list[Row]:
    """The head, then a row a figure: mean and, in brackets, standard deviation over the seeds of each recipe."""
    _, order = _ordered(records, baseline)
    made = [["figure", *order]]
    for name, label, digits in _shown(records):
        made.append([label, *(_mean(_values(records, recipe, name), digits) for recipe in order)])
    return made


def differences(records: Sequence[Record], baseline: str) -> list[Row]:
    """The head, then a row a figure: difference of each recipe to `baseline` with its interval, bold where p (Holm) is
    below .05; the head alone where there is no other recipe."""
    found, order = _ordered(records, baseline)
    made = [["figure", *order[1:]]]
    for name, label, digits in _shown(records):
        gaps = [found[recipe]["figures"].get(name, {}).get("difference") for recipe in order[1:]]
        if any(gaps):
            made.append([label, *("–" if gap is None else _marked(gap, digits) for gap in gaps)])
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
    ]
    if looks is None:
        said.append("How often validation was looked at to choose the recipe is not stated (--looks).")
    else:
        said.append(f"Validation was looked at {looks:,} times to choose the recipe.")
    by_recipe = {recipe: list(group) for recipe, group in groupby(records, key=lambda record: record["variant"])}
    if any(recipe.startswith("specialist to ") for recipe in by_recipe):
        said.append("A specialist has as many seconds as the recipe of the same seed, from the start of its process.")
    shared = [one for one in first["overrides"] if all(one in record["overrides"] for record in records)]
    if shared and len(by_recipe) > 1:
        said.append(f"Every recipe: {' '.join(shared)}.")
    places = {recipe: "; ".join(sorted({_place(one) for one in own})) for recipe, own in by_recipe.items()}
    alike = len(set(places.values())) == 1
    if alike:
        said.append(f"All on {places[first['variant']]}.")
    for recipe, own in by_recipe.items():
        differs = [one for one in own[0]["overrides"] if one not in shared or len(by_recipe) == 1]
        with_what = " ".join([f"profile {own[0]['profile']}", *differs])
        said.append(f"{recipe}: {with_what}; {len(own)} seeds{'' if alike else f' on {places[recipe]}'}.")
        if again := [str(one["seed"]) for one in own if one["resumed"]]:
            said.append(f"{recipe}: seeds {', '.join(again)} went on from what was there; seconds do not compare.")
    if len({one["machine"]["processor"] for one in records}) > 1:
        said.append("Not all runs are of one processor: seconds do not compare, and figures differ by that, too.")
    few = [recipe for recipe, own in by_recipe.items() if len(own) < 3]
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
    """The same as Markdown: means, differences, facts; costs and the values of every seed are folded."""
    said = "\n".join(f"- {plain_markdown(line)}" for line in facts(records, baseline, looks))
    gaps = differences(records, baseline)
    parts = [f"Mean over seeds (standard deviation).\n\n{table(means(records, baseline))}"]
    if len(gaps) > 1:
        parts.append(f"Differences to {plain_markdown(baseline)}; bold: p (Holm) below .05.\n\n{table(gaps)}")
    parts += [
        said,
        _folded("Seconds, faces and operations of every stage", costs(records)),
        _folded("Every seed", rows(records, baseline)),
    ]
    return "\n\n".join(parts) + "\n"


def _folded(title: str, lines: Sequence[Row]) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{table(lines)}\n\n</details>"


def _ordered(records: Sequence[Record], baseline: str) -> tuple[dict[str, Any], list[str]]:
    """`compared`, and its recipes, the baseline first."""
    found = compared(records, baseline)
    return found, [baseline, *(name for name in found if name != baseline)]


def _shown(records: Sequence[Record]) -> Iterator[tuple[str, str, int]]:
    """Every figure that has a row: its name, how it is called there, and its digits."""
    kinds = {name: metric for one in records for name, metric in one["metrics"].items()}
    for name in filter(is_shown, kinds):
        less = " (less is better)" if kinds[name] in LOWER_IS_BETTER else ""
        yield name, f"{name}{less}", METRICS[kinds[name]].digits if kinds[name] in METRICS else 3


def _values(records: Sequence[Record], recipe: str, name: str) -> list[float]:
    own = (one["figures"][WITHOUT_MAP] for one in records if one["variant"] == recipe)
    return [figures[name] for figures in own if name in figures]


def _spelled(values: Sequence[float], digits: int) -> tuple[str, str]:
    """Mean and standard deviation."""
    deviation = f"{statistics.stdev(values):.{digits + 1}f}" if len(values) > 1 else "–"
    return f"{statistics.fmean(values):.{digits}f}", deviation


def _mean(values: Sequence[float], digits: int) -> str:
    if not values:
        return "–"
    mean, deviation = _spelled(values, digits)
    return f"{mean} ({deviation})"


def _marked(gap: Mapping[str, Any], digits: int) -> Markup:
    said, p = _difference(gap, digits), gap.get("p_holm")
    return Markup("**{}**").format(said) if p is not None and p < stats.SHOWN else said


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _difference(gap: Mapping[str, Any], digits: int) -> Markup:
    value, low, high = (None if gap[end] is None else f"{gap[end]:+.{digits}f}" for end in ("value", "low", "high"))
    return Markup(value if low is None else f"{value} [{low}, {high}]")


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
    cores = f"{where['cores']} core{'s' * (where['cores'] > 1)}"
    return f"{where['processor']}, {cores}, commit {(record['commit'] or 'unknown')[:12]}, {packages}"


def _columns(lines: Sequence[Row]) -> str:
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)
