"""The ablation for people: a page of Markdown and a plot of the differences to the baseline."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from facemllm.report.kit import code, render
from facemllm.scoring.metrics import CLOSED_MEAN
from studies.ablation.comparing import BETTER, HEADS, LOWER_IS_BETTER, SAME, WORSE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMES = {
    CLOSED_MEAN: "all closed questions",
    "head_pose.yaw": "yaw",
    "relations": "relations broken by answers",
    "scores": "scores of characteristics",
    "scores_relations": "relations broken by scores",
}
_UNITS = {"age": "years", "head_pose.yaw": "degrees"}
_PACKAGES = ("torch", "transformers", "numpy")


def machine() -> dict[str, Any]:
    """Processor, cores and versions that the figures were made with."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
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
