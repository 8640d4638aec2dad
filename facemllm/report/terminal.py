"""Results and comparisons for the terminal, and a comparison as a page, one HTML file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from facemllm.core.files import atomic_write
from facemllm.report.kit import decimals, detectable, number, p_value, percent, percent_decimals, render
from facemllm.scoring.figures import measure
from facemllm.scoring.metrics import CLOSED_MEAN, WITHOUT_NUMBERS, clears_constant
from facemllm.scoring.paired import BETTER, SAME, WORSE, by_group, by_task, by_verdict
from facemllm.tasks import ZERO_SHOT

ONE_RUN = (
    "One run each: what a second run with another seed or processor differs by is not in these intervals (the default "
    "recipe again, same seed, on another processor: closed questions by 0.0066, age by 0.3 years; docs/evaluation.md)."
)
_MARKS = {BETTER: ("▲ better", "green"), WORSE: ("▼ worse", "bold red"), SAME: ("· not shown", "dim")}


def head(task: str) -> str:
    """What the figure of a task is called."""
    return "all closed questions" if task == CLOSED_MEAN else task


def results_table(summary: Mapping[str, Any]) -> Table:
    """Tasks with their items beneath, from `summary.json` or `metrics.json`; dim where not better than constant."""
    table = _table("held-out results", "task", ("value", "95 %", "constant", "pixels", "unreadable", "n"))
    if closed := summary.get(CLOSED_MEAN):
        _add_figure(table, head(CLOSED_MEAN), closed)
    for name, entry in (summary.get("tasks") or {}).items():
        _add_figure(table, f"{name} (held out of training)" if name == ZERO_SHOT else name, entry)
        if further := (entry.get("also") or {}).get(WITHOUT_NUMBERS):
            same = {**entry, **further, "metric": WITHOUT_NUMBERS, "baselines": {}}
            _add_figure(table, "  also", same, learnt=clears_constant(entry))
        for item, figure in (entry.get("items") or {}).items():
            _add_figure(table, f"  {item}", figure)
    trust = summary.get("trust") or {}
    together = map(escape, combinations(trust.get("combinations") or {}))
    if said := [*_consistency(trust), *_below_blind(trust), *together, *_gaps(trust)]:
        table.caption = "\n".join(said)
        table.caption_justify = "left"
    return table


def shown(comparison: Mapping[str, Any]) -> Iterator[Table | Text]:
    """What to print of a comparison: tasks and items, then the groups of people in which a difference is shown."""
    first, second = (escape(name) for name in comparison["names"])
    columns = ("first", "second", "difference", "95 %", "p (Holm)", "minimum detectable\ndifference")
    table = _table(f"{second} (second) against {first} (first)", "", columns, verdicts=True)
    for task, item, entry in by_task(comparison["figures"]):
        _add_difference(table, f"  {item}" if item else head(task), entry)
    yield table
    yield Text("\n".join(["settings that differ:", *map("  {}".format, _settings(comparison))]))
    groups = list(by_group(comparison["groups"]))
    differing = [row for row in groups if row[3]["verdict"] != SAME]
    if differing:
        table = _table("groups of people in which a difference is shown", "", columns, verdicts=True)
        for task, kind, name, entry in differing:
            _add_difference(table, f"{task}  {kind}: {name}", entry)
        yield table
    facts = (
        f"{comparison['n_images']:,} images of {comparison['n_subjects']:,} people, split {comparison['split']}. A "
        "difference is shown where p, corrected (Holm) for all tasks, or all items, or all groups of people, is below "
        "0.05. The minimum detectable difference is shown four times in five on these people."
    )
    if groups:
        facts += f" {len(groups) - len(differing)} of {len(groups)} groups show none; all are in --html and --json."
    yield Text(facts, style="dim")
    if comparison["first"] != comparison["second"]:
        yield Text(ONE_RUN)


def _settings(comparison: Mapping[str, Any]) -> list[str]:
    changed = comparison["settings"]
    if changed is None:
        return ["not known: the store does not remember how both were made"]
    return [f"{name}: {first} → {second}" for name, (first, second) in changed.items()] or ["none"]


def write_page(out: Path, comparison: Mapping[str, Any]) -> None:
    """Write a comparison (`compare.compare`) as a page; whole or not at all."""
    atomic_write(out, page(comparison).encode())


def page(comparison: Mapping[str, Any]) -> str:
    """A comparison as HTML."""
    figures, groups = list(by_task(comparison["figures"])), list(by_group(comparison["groups"]))
    items = {task: [(item, e) for name, item, e in figures if item and name == task] for task, _, _ in figures}
    shown = [(f"{task}, {kind}: {name}", e) for task, kind, name, e in groups if e["verdict"] != SAME]
    every = {task: [(f"{kind}: {name}", e) for owner, kind, name, e in groups if owner == task] for task, *_ in groups}
    return render(
        "comparison.html.jinja",
        comparison=comparison,
        one_run=ONE_RUN if comparison["first"] != comparison["second"] else "",
        verdicts={verdict: names for verdict, names in by_verdict(comparison).items() if names},
        heads=_rows([(head(task), entry) for task, item, entry in figures if not item]),
        items={task: _rows(own) for task, own in items.items() if own},
        shown=_rows(shown),
        groups={task: _rows(own) for task, own in every.items()},
    )


def _rows(entries: list[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Rows on one scale a unit, so that bars beneath each other compare: `reach` is where it ends, either way."""
    reach: dict[str, float] = {}
    for _, entry in entries:
        ends = [abs(entry["difference"][end] or 0.0) for end in ("value", "low", "high")]
        reach[entry["unit"]] = max(reach.get(entry["unit"], 0.0), *ends)
    return [
        {"name": name, "entry": entry, "measure": measure(entry), "reach": reach[entry["unit"]] * 1.05}
        for name, entry in entries
    ]


def _table(title: str, first: str, numeric: tuple[str, ...], *, verdicts: bool = False) -> Table:
    table = Table(title=title, title_justify="left", pad_edge=False, box=None)
    table.add_column(first)
    table.add_column("metric", style="cyan")
    for name in numeric:
        table.add_column(name, justify="right", no_wrap=True)
    if verdicts:
        table.add_column("", no_wrap=True)
    return table


def _add_figure(table: Table, name: str, figure: Mapping[str, Any], learnt: bool | None = None) -> None:
    how = measure(figure)
    kept = decimals(figure, how.digits)
    rivals = (figure["baselines"].get(rival) for rival in ("constant", "pixels"))
    table.add_row(
        escape(name),
        escape(how.short),
        number(figure["value"], kept),
        f"{number(figure['low'], kept)} {number(figure['high'], kept)}",
        *(number(rival, how.digits) for rival in rivals),
        f"{figure.get('unreadable') or 0:.1%}",
        str(figure.get("n", "")),
        style=None if (clears_constant(figure) if learnt is None else learnt) else "dim",
    )


def _add_difference(table: Table, name: str, entry: Mapping[str, Any]) -> None:
    how, change = measure(entry), entry["difference"]
    kept = decimals(change, how.digits)
    ends = [change[end] for end in ("value", "low", "high")]
    value, low, high = ("–" if end is None else f"{end:+.{kept}f}" for end in ends)
    table.add_row(
        escape(name),
        escape(how.short),
        number(entry["first"], kept),
        number(entry["second"], kept),
        value,
        f"{low} {high}",
        p_value(entry["p_holm"]),
        number(entry["minimum_detectable_difference"], kept),
        Text(*_MARKS[entry["verdict"]]),
    )


def _consistency(trust: Mapping[str, Any]) -> Iterator[str]:
    shares = trust.get("consistency") or {}
    if (shares.get("model") or {}).get("value") is not None:
        truth = shares.get("truth") or {}
        labels = "" if truth.get("value") is None else f" (the labels {_percent(truth)})"
        yield f"broken logical relations: {_percent(shares['model'])}{labels}"
    captions = shares.get("captions") or {}
    if (captions.get("model") or {}).get("value") is not None:
        yield f"captions that contradict an answer: {_percent(captions['model'])}"


def _percent(figure: Mapping[str, Any]) -> str:
    return percent(figure["value"], percent_decimals(figure))


def _below_blind(trust: Mapping[str, Any]) -> Iterator[str]:
    for way, (right, blind) in (trust.get("below_blind") or {}).items():
        yield f"[bold red]worse than without the picture[/]: asked as {way}, {right:.1%} right against {blind:.1%}"


def combinations(found: Mapping[str, Any]) -> Iterator[str]:
    """A line for each combination held out of training (`combinations` of metrics.json)."""
    for name, body in found.items():
        line = f"combination held out of training, {name.replace('_', ' ')}: "
        if not body["faces"]:
            yield f"{line}no face shows it and is asked about it"
            continue
        constant = body["baselines"].get("constant")
        rival = "" if constant is None else f"; the constant answer {percent(constant)}"
        yield (
            f"{line}all right in {_between(body['all'])} of {body['faces']:,} faces of {body['people']:,} people, "
            f"{_between(body['expected'])} expected from faces that show one of them{rival}"
            f"{'; too few people to go by' if body['too_few'] else ''}"
        )


def _between(figure: Mapping[str, Any]) -> str:
    kept = percent_decimals(figure)
    low, high = (percent(figure[end], kept) for end in ("low", "high"))
    return percent(figure["value"], kept) + ("" if figure["low"] is None else f" [{low}, {high}]")


def _gaps(trust: Mapping[str, Any]) -> Iterator[str]:
    gaps = trust.get("gaps") or {}
    if gap := gaps.get("surest"):
        between = f"{gap['a']} – {gap['b']} {gap['value']:+.3f}"
        surest = escape(f"{gap['task']} by {gap['kind']}, {between} [{gap['low']:+.3f}, {gap['high']:+.3f}]")
        yield f"gaps between groups of people: shown in {gaps['shown']} of {gaps['compared']}; the surest: {surest}"
    elif gaps.get("compared"):
        yield f"gaps between groups of people: none shown in {gaps['compared']} comparisons"
    if sizes := gaps.get("minimum_detectable_difference"):
        yield f"minimum detectable difference: {escape(detectable(sizes))}"
