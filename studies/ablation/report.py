"""What the cells say together, and to people: differences to the baseline, a page of Markdown and a plot of them.

A seed decides the initial weights and the order of the faces, so two variants of one seed share what luck the order
brings, and their difference varies less than they do. Intervals are 95 % t intervals over seeds.
"""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from facemllm import tasks
from facemllm.core.machine import cores
from facemllm.report.kit import code, render
from facemllm.scoring import stats
from facemllm.scoring.metrics import CLOSED_MEAN, METRICS, is_choice
from facemllm.scoring.paired import BETTER, SAME, WORSE
from studies.ablation.running import WITH_MAP, WITHOUT_MAP

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOWER_IS_BETTER = ("broken", *(metric.name for metric in METRICS.values() if not metric.higher_is_better))
HEADS = (
    CLOSED_MEAN,
    "attributes",
    "expression",
    "gender",
    "age",
    "head_pose.yaw",
    "relations",
    "scores",
    "scores_relations",
)
"""Figures of the table, in order; all others stand in the JSON."""

Record = Mapping[str, Any]
_NAMES = {
    CLOSED_MEAN: "all closed questions",
    "head_pose.yaw": "yaw",
    "relations": "relations broken by answers",
    "scores": "scores of characteristics",
    "scores_relations": "relations broken by scores",
}
_UNITS = {"age": "years", "head_pose.yaw": "degrees"}
_PACKAGES = ("torch", "transformers", "numpy")


def together(records: Iterable[Record], baseline: str, controls: Mapping[str, str] | None = None) -> dict[str, Any]:
    """By variant: seeds, seconds, and every figure's mean over seeds with its interval and its paired `difference` to
    the baseline with the verdict on it.

    `controls` names for some variants another one to hold them against as well: `to_control` has those figures.

    A variant that takes maps is there with its answers to faces with one; `without_map` holds the same for the faces
    alone. A verdict is `better` or `worse` where the interval leaves out zero; `held` tells whether it also stands
    Holm's correction for the number of variants.
    """
    by_variant: dict[str, dict[int, Record]] = {}
    for record in records:
        by_variant.setdefault(record["variant"], {})[record["seed"]] = record
    metrics = {
        name: kind for own in by_variant.values() for one in own.values() for name, kind in one["metrics"].items()
    }
    rivals = {seed: _shown(record, WITH_MAP) for seed, record in by_variant.get(baseline, {}).items()}
    found: dict[str, Any] = {}
    for name, own in by_variant.items():
        maps = any(WITH_MAP in record["figures"] for record in own.values())
        found[name] = {
            "seeds": sorted(own),
            **{
                kind: statistics.fmean(record[kind] for record in own.values())
                for kind in ("seconds", "processor_seconds")
            },
            "stages": {
                stage: {
                    kind: statistics.fmean(record["stages"][stage][kind] for record in own.values())
                    for kind, value in one.items()
                    if not isinstance(value, Mapping)
                }
                for stage, one in next(iter(own.values()))["stages"].items()
            },
            "figures": _figures(own, WITH_MAP, rivals if name != baseline else {}, metrics),
            "without_map": _figures(own, WITHOUT_MAP, rivals, metrics) if maps else None,
            "to_control": None,
        }
        if control := by_variant.get((controls or {}).get(name, "")):
            shown = {seed: _shown(record, WITH_MAP) for seed, record in control.items()}
            found[name]["to_control"] = _figures(own, WITH_MAP, shown, metrics)
    for kind in ("figures", "without_map", "to_control"):
        for figure in metrics:
            _correct([found[name][kind][figure] for name in found if figure in (found[name][kind] or {})])
    return found


def _shown(record: Record, kind: str) -> Mapping[str, float]:
    """Figures of a cell: those with maps where it has them and they are asked for."""
    figures: Mapping[str, Mapping[str, float]] = record["figures"]
    return figures.get(kind, figures[WITHOUT_MAP])


def _figures(
    own: Mapping[int, Record], kind: str, rivals: Mapping[int, Mapping[str, float]], metrics: Mapping[str, str]
) -> dict[str, Any]:
    values = {seed: _shown(record, kind) for seed, record in own.items()}
    found: dict[str, Any] = {}
    for name, metric in metrics.items():
        here = [one[name] for one in values.values() if name in one]
        both = [(one, rivals[seed]) for seed, one in values.items() if seed in rivals]
        pairs = [(one[name], rival[name]) for one, rival in both if name in one and name in rival]
        if here:
            found[name] = {"metric": metric, **mean(here)}
            if pairs:
                found[name]["difference"] = _difference(pairs, metric in LOWER_IS_BETTER)
    return found


def mean(values: Sequence[float]) -> dict[str, Any]:
    """Mean and 95 % t interval of independent values; no interval for one alone."""
    count = len(values)
    error = statistics.stdev(values) / math.sqrt(count) if count > 1 else math.nan
    return {**stats.t_interval(statistics.fmean(values), error, count - 1), "n": count}


def _difference(pairs: Sequence[tuple[float, float]], lower_is_better: bool) -> dict[str, Any]:
    gaps = [one - other for one, other in pairs]
    found = mean(gaps)
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    verdict = SAME
    if found["low"] is not None and (found["low"] > 0 or found["high"] < 0):
        verdict = WORSE if (found["value"] > 0) == lower_is_better else BETTER
    return {**found, "p": stats.plain(stats.p_value(found["value"], error, len(gaps) - 1)), "verdict": verdict}


def _correct(figures: Sequence[dict[str, Any]]) -> None:
    """Holm's correction of one figure's differences, over the variants."""
    gaps = [figure["difference"] for figure in figures if "difference" in figure]
    for gap, p in zip(gaps, stats.holm([math.nan if g["p"] is None else g["p"] for g in gaps]), strict=True):
        gap["held"] = gap["verdict"] != SAME and p < stats.SHOWN


def machine() -> dict[str, Any]:
    """Processor, cores and versions that the figures were made with."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": cores(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
    }


def page(results: Mapping[str, Any], picture: str | None) -> str:
    """The Markdown of an ablation as `ablate` returns it; `picture` is the plot's address, seen from the page."""
    variants, baseline = results["variants"], results["baseline"]
    budget = variants[baseline] if baseline in variants else next(iter(variants.values()))
    alone = {name: one for name, one in variants.items() if one["without_map"]}
    held = {name: one for name, one in variants.items() if one["to_control"]}
    return render(
        "ablation.md.jinja",
        results=results,
        picture=picture,
        seeds=sorted({seed for one in variants.values() for seed in one["seeds"]}),
        budget=budget,
        figures=_table(variants, "figures"),
        gaps=_gaps(variants, "figures", baseline),
        without_map=(_table(alone, "without_map"), _gaps(alone, "without_map", baseline)) if alone else None,
        held={name: results["controls"][name] for name in held},
        to_control=_gaps(held, "to_control", ""),
        words=[Markup(line) for line in words(variants, baseline, results["controls"])],
    )


def words(variants: Mapping[str, Any], baseline: str, controls: Mapping[str, str]) -> list[str]:
    """A sentence for every variant, and one for its control: what is shown of it, and what is not."""
    found = []
    for name, one in variants.items():
        if name != baseline:
            found.append(f"`{name}` against `{baseline}`: {_said(one['figures'])}.")
        if one["to_control"]:
            found.append(f"`{name}` against `{controls[name]}`: {_said(one['to_control'])}.")
    for head, chance in _guessed(variants).items():
        at = f"{head.capitalize()} is at chance ({100 * chance:.1f} %) in every variant"
        found.append(f"{at}: this budget says nothing of it.")
    return found


def _guessed(variants: Mapping[str, Any]) -> dict[str, float]:
    """Tasks of one choice whose interval clears guessing in no variant, and what guessing gives."""
    found = {}
    for head in HEADS:
        asked = tasks.get(head).questions() if head in tasks.all_names() else ()
        lows = [figure["low"] for one in variants.values() if (figure := one["figures"].get(head)) is not None]
        if len(asked) == 1 and is_choice(tasks.get(head), asked[0]) and lows and None not in lows:
            chance = 1 / len(asked[0].options)
            if max(lows) <= chance:
                found[head] = chance
    return found


def _said(figures: Mapping[str, Any]) -> str:
    gaps = {head: figures[head].get("difference") for head in HEADS if head in figures}
    known = {head: gap for head, gap in gaps.items() if gap is not None and gap["low"] is not None}
    if not known:
        return "too few seeds to tell"
    said = []
    for verdict in (BETTER, WORSE):
        shown = [(head, gap["held"]) for head, gap in known.items() if gap["verdict"] == verdict]
        each = [_NAMES.get(head, head) + ("" if held else " (not after correction)") for head, held in shown]
        said += [f"{verdict} in {', '.join(each)}"] if each else []
    silent = [_NAMES.get(head, head) for head, gap in known.items() if gap["verdict"] == SAME]
    return "; ".join([*said, *([f"{SAME} in {', '.join(silent)}"] if silent else [])])


def drawn(variants: Mapping[str, Any], baseline: str) -> Figure:
    """Differences to the baseline with their intervals, one panel a figure; right is better."""
    from matplotlib.figure import Figure

    names = [name for name in variants if name != baseline]
    heads = [head for head in HEADS if any("difference" in variants[n]["figures"].get(head, {}) for n in names)]
    figure = Figure(figsize=(2.1 * max(len(heads), 1) + 2, 0.36 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots(1, max(len(heads), 1), sharey=True, squeeze=False)[0]
    for axis, head in zip(axes, heads, strict=False):
        for y, name in enumerate(names):
            gap = variants[name]["figures"].get(head, {}).get("difference")
            if gap is None:
                continue
            color = {BETTER: "C2", WORSE: "C3", SAME: "0.5"}[gap["verdict"]]
            scale = _scale(head)
            if gap["low"] is not None:
                axis.plot([gap["low"] * scale, gap["high"] * scale], [y, y], color=color, linewidth=2)
            axis.scatter([gap["value"] * scale], [y], color=color, zorder=3, s=24)
            if variants[name]["figures"][head]["metric"] in LOWER_IS_BETTER and not axis.xaxis_inverted():
                axis.invert_xaxis()
        axis.axvline(0, color="0.3", linewidth=1)
        axis.set_title(_title(head), fontsize="small")
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(labelsize="small")
    axes[0].set_yticks(range(len(names)), names, fontsize="small")
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel(f"difference to {baseline}, same seed, 95 % interval; right is better", fontsize="small")
    return figure


def _scale(head: str) -> float:
    return 1.0 if head in ("age", "head_pose.yaw") else 100.0


def _title(head: str) -> str:
    return f"{_NAMES.get(head, head)}, {_UNITS.get(head, 'points')}"


def _table(variants: Mapping[str, Any], kind: str) -> list[list[Any]]:
    heads = [head for head in HEADS if any(head in one[kind] for one in variants.values())]
    titles = []
    for head in heads:
        less = any(one[kind].get(head, {}).get("metric") in LOWER_IS_BETTER for one in variants.values())
        unit = _UNITS.get(head, "%") + (", less is better" if less else "")
        titles.append(f"{_NAMES.get(head, head)} ({unit})")
    rows = [
        [code(name), len(one["seeds"]), *(_number(one[kind].get(head), head, "") for head in heads)]
        for name, one in variants.items()
    ]
    return [["variant", "seeds", *titles], *rows]


def _gaps(variants: Mapping[str, Any], kind: str, baseline: str) -> list[list[Any]]:
    heads = [head for head in HEADS if any("difference" in one[kind].get(head, {}) for one in variants.values())]
    rows = [
        [code(name), *(_gap(one[kind].get(head, {}).get("difference"), head) for head in heads)]
        for name, one in variants.items()
        if name != baseline
    ]
    return [["variant", *(_title(head) for head in heads)], *rows]


def _gap(gap: Mapping[str, Any] | None, head: str) -> Markup:
    """A difference, bold where it leaves out zero, with a star where it also stands the correction."""
    number = _number(gap, head, "+")
    if gap is None or gap["verdict"] == SAME:
        return number
    return Markup(f"**{number}**" + (r"\*" if gap["held"] else ""))


def _number(found: Mapping[str, Any] | None, head: str, sign: str) -> Markup:
    if found is None:
        return Markup("")
    scale, digits = _scale(head), 2 if "relations" in head else 1
    value, low, high = (
        None if found[k] is None else format(found[k] * scale, f"{sign}.{digits}f") for k in ("value", "low", "high")
    )
    return Markup(f"{value}" if low is None else f"{value} [{low}, {high}]")
