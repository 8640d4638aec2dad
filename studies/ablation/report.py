"""The ablation for people: a page of Markdown and a plot of the differences to the baseline."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    seeds = sorted({seed for one in variants.values() for seed in one["seeds"]})
    budget = variants[baseline] if baseline in variants else next(iter(variants.values()))
    stages = ", ".join(
        f"{name} {one['steps']:.0f} steps of {one['faces'] / one['steps']:.0f} faces"
        for name, one in budget["stages"].items()
    )
    source = ", ".join(results["sources"])
    parts = [
        "# What each part of the recipe is worth",
        f"Written by `{results['command']}`. {len(seeds)} seeds ({_spelt(seeds)}), {len(variants)} variants, "
        f"trained on {source} and asked about {results['images']} test faces of {results['people']} people. "
        f"The budget is small: {stages}, about {budget['processor_seconds']:.0f} processor seconds a model on one "
        "thread, so figures are lower than those of the default run.",
        "Every model of one seed sees the faces in the same order; a difference is to the baseline "
        f"`{baseline}` of the same seed. Brackets are 95 % t intervals over seeds: of what another seed would give on "
        "these same test faces. **Bold** differences leave out zero; a star stands where they also stand Holm's "
        "correction for the number of variants. Of all others *no difference is shown*: neither a gain nor a loss, nor "
        "that there is none.",
        "## Variants",
        _lines(
            ["variant", "is", "processor s", "wall s"],
            [
                [f"`{name}`", results["says"][name], f"{one['processor_seconds']:.0f}", f"{one['seconds']:.0f}"]
                for name, one in variants.items()
            ],
        ),
        "Wall seconds hold whatever else the machine did; processor seconds do not.",
        "## Figures",
        _table(variants, "figures"),
        "## Differences to the baseline",
        *([f"![Differences to the baseline]({picture})"] if picture else []),
        _gaps(variants, "figures", baseline),
    ]
    if any(one["without_map"] for one in variants.values()):
        alone = {name: one for name, one in variants.items() if one["without_map"]}
        parts += [
            "## Models that take maps, asked without one",
            "In the tables above they are given the map of every test face, as exact as its source has it; that of an "
            "expert is less exact than a renderer's. Without a map:",
            _table(alone, "without_map"),
            _gaps(alone, "without_map", baseline),
        ]
    held = {name: one for name, one in variants.items() if one["to_control"]}
    if held:
        named = ", ".join(f"`{name}` to `{results['controls'][name]}`" for name in held)
        parts += [
            "## Differences to a control",
            "The knowledge branch brings a label of every characteristic into the loss. What its graph and its "
            f"relations add beyond that is the difference of {named}.",
            _gaps(held, "to_control", ""),
        ]
    parts += [
        "## In words",
        "\n".join(f"- {line}" for line in words(variants, baseline, results["controls"])),
        "## Made with",
    ]
    made = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    parts.append(
        f"{made['processor']}, {made['cores']} cores, one thread a model; {versions}; commit {results['commit']}; "
        f"conversations {results['conversations'][:16]}."
    )
    return "\n\n".join(parts) + "\n"


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


def _table(variants: Mapping[str, Any], kind: str) -> str:
    heads = _heads(variants, kind)
    rows = [
        [f"`{name}`", str(len(one["seeds"])), *(_value(one[kind].get(head), head) for head in heads)]
        for name, one in variants.items()
    ]
    labels = [
        f"{_NAMES.get(head, head)} ({_UNITS.get(head, '%')}{', less is better' if _less(variants, kind, head) else ''})"
        for head in heads
    ]
    return _lines(["variant", "seeds", *labels], rows)


def _gaps(variants: Mapping[str, Any], kind: str, baseline: str) -> str:
    heads = [head for head in HEADS if any("difference" in one[kind].get(head, {}) for one in variants.values())]
    rows = [
        [f"`{name}`", *(_gap(one[kind].get(head, {}).get("difference"), head) for head in heads)]
        for name, one in variants.items()
        if name != baseline
    ]
    return _lines(["variant", *(_title(head) for head in heads)], rows)


def _heads(variants: Mapping[str, Any], kind: str) -> list[str]:
    return [head for head in HEADS if any(head in one[kind] for one in variants.values())]


def _less(variants: Mapping[str, Any], kind: str, head: str) -> bool:
    return any(one[kind].get(head, {}).get("metric") in LOWER_IS_BETTER for one in variants.values())


def _value(figure: Mapping[str, Any] | None, head: str) -> str:
    return "" if figure is None else _number(figure, head, "")


def _gap(gap: Mapping[str, Any] | None, head: str) -> str:
    if gap is None:
        return ""
    text = _number(gap, head, "+")
    return text if gap["verdict"] == SAME else f"**{text}**" + (r"\*" if gap["held"] else "")


def _number(found: Mapping[str, Any], head: str, sign: str) -> str:
    scale = _scale(head)
    digits = 2 if "relations" in head else 1
    value, low, high = (
        None if found[k] is None else format(found[k] * scale, f"{sign}.{digits}f") for k in ("value", "low", "high")
    )
    return f"{value}" if low is None else f"{value} [{low}, {high}]"


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _spelt(seeds: Sequence[int]) -> str:
    whole = len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1))
    return f"{seeds[0]} to {seeds[-1]}" if whole else ", ".join(map(str, seeds))
