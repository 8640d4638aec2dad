"""The measured half of a model card: results, groups of people, what can be relied on, limits, cost. In Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from facemllm.report import figures
from facemllm.scoring.metrics import clears_majority
from facemllm.scoring.summary import BY_LIKELIHOOD
from facemllm.tasks import ZERO_SHOT

_FIXED = {*figures.HEAD, *figures.FIGURES}
_COST = (
    "device",
    "seconds",
    "samples",
    "tokens",
    "flops",
    "peak_memory_bytes",
    "energy_cpu_joules",
    "energy_gpu_joules",
)


def results(evaluation: Mapping[str, Any]) -> str:
    """Every task and item with its interval beside its baselines."""
    rows = figures.results(_tasks(evaluation))
    names = list(dict.fromkeys(name for row in rows for name in row if name not in _FIXED))
    head = ["task", "metric", "value", "95 % interval", "n", "unparsed", *names]
    lines = []
    for row in rows:
        name = f"{row['task']} · {row['item']}" if row["item"] else f"**{row['task']}**"
        metric = f"{row['metric']} {row['unit']}".strip()
        counts = ["" if row["n"] is None else str(row["n"]), number(row["unparsed"])]
        lines.append([name, metric, number(row["value"]), _between(row), *counts, *(number(row.get(n)) for n in names)])
    return _table(head, lines)


def zero_shot(evaluation: Mapping[str, Any]) -> str:
    """The figure on attributes held out of training; empty if none was asked."""
    part = (evaluation.get("tasks") or {}).get(ZERO_SHOT)
    if not part:
        return ""
    names = ", ".join(part.get("items") or ()) or "one attribute"
    chance = number(figures.baselines(part).get("majority"))
    told = (
        f"Attributes in no training conversation ({names}), asked all the same: {part['metric']} {estimate(part)}, "
        f"chance {chance}, {part['n']} questions."
    )
    likely = (part.get("also") or {}).get(BY_LIKELIHOOD)
    return f"{told} Of the likeliest option, whatever the model writes: {estimate(likely)}." if likely else told


def fairness(evaluation: Mapping[str, Any]) -> str:
    """Figures by groups of people and the gaps that are shown; empty if no group is known."""
    groups = [
        [row["task"], escaped(row["kind"]), escaped(row["group"]), str(row.get("people", "")), _group(row)]
        for row in figures.fairness_rows(evaluation)
        if " x " not in row["kind"]
    ]
    if not groups:
        return ""
    gaps = [
        [gap["task"], escaped(gap["kind"]), escaped(f"{gap['a']} – {gap['b']}"), estimate(gap), number(gap["p_holm"])]
        for gap in figures.shown_gaps(evaluation)
    ]
    compared = figures.trust(evaluation)["gaps"]["compared"]
    told = f"A gap is shown in {len(gaps)} of {compared} comparisons (a task by a kind of group)."
    shown = f"\n\n{_table(['task', 'by', 'groups', 'largest gap', 'p (Holm)'], gaps)}" if gaps else ""
    return f"{_table(['task', 'by', 'group', 'people', 'figure'], groups)}\n\n{told}{shown}"


def reliance(evaluation: Mapping[str, Any]) -> str:
    """Consistency, calibration, robustness and scores in a line each; empty if none was measured."""
    consistency = evaluation.get("consistency") or {}
    relations, lines = consistency.get("relations") or {}, []
    if relations.get("model"):
        labels = estimate(relations.get("truth") or {})
        lines.append(
            f"Logical relations broken by the answers: {estimate(relations['model'])}; by the labels: {labels}."
        )
    captions = consistency.get("captions") or {}
    if (captions.get("model") or {}).get("value") is not None:
        labels = estimate(captions.get("truth") or {})
        lines.append(f"Captions that contradict an answer: {estimate(captions['model'])}; by the labels: {labels}.")
    for way, body in (consistency.get("ways") or {}).items():
        if body.get("agreement"):
            lines.append(f"Same answer when asked another way ({way}): {estimate(body['agreement'])}.")
    errors = {task: body for task, body in (evaluation.get("calibration") or {}).items() if body.get("ece")}
    if errors:
        told = ", ".join(
            f"{task} {number(body['ece'])} ({number(body.get('expected'))})" for task, body in errors.items()
        )
        lines.append(f"Expected calibration error (in brackets what chance gives a calibrated model): {told}.")
    for kind, body in (evaluation.get("disturbed") or {}).items():
        if body.get("change"):
            shown = "without the map of face parts" if kind == "no_map" else f"on {kind} pictures"
            lines.append(f"Change of mean balanced accuracy {shown}: {estimate(body['change'])}.")
    if scores := evaluation.get("characteristics"):
        lines.append(
            f"Scores of characteristics, read beside the text: {estimate(scores['scores'])} right, the text "
            f"{estimate(scores['text'])}; the same in {estimate(scores['agreement'])}. Expected calibration error "
            f"{number(scores['ece'])}; relations broken by the scores {estimate(scores['relations']['scores'])}, by "
            f"the text {estimate(scores['relations']['text'])}."
        )
    return "\n".join(f"- {line}" for line in lines)


def weaknesses(evaluation: Mapping[str, Any]) -> list[str]:
    """What the figures themselves warn of: things not learnt, gaps shown, answers that cannot be read."""
    tasks, lines = _tasks(evaluation), []
    if unlearnt := [f"{row['task']} {row['item']}".strip() for row in figures.results(tasks) if _unlearnt(row, tasks)]:
        lines.append(f"Not shown to be better than a constant answer: {', '.join(unlearnt)}.")
    if gap := figures.trust(evaluation)["gaps"]["surest"]:
        where = escaped(f"{gap['task']} by {gap['kind']}, {gap['a']} – {gap['b']}")
        lines.append(f"Groups of people are served unequally; the surest gap: {where}: {estimate(gap)}.")
    unread = {name: part["unparsed"] for name, part in tasks.items() if (part.get("unparsed") or 0) >= 0.01}
    if unread:
        told = ", ".join(f"{name} {share:.1%}" for name, share in unread.items())
        lines.append(f"Answers that cannot be read, counted as wrong: {told}.")
    return lines


def cost(found: Mapping[str, Mapping[str, Any]]) -> str:
    """What each step behind the model cost; empty if nothing was recorded."""
    known = {name for body in found.values() for name, value in body.items() if value is not None}
    names = [name for name in (*_COST, "price") if name in known]
    if not names:
        return ""
    rows = [[step, *(_amount(body.get(name)) for name in names)] for step, body in found.items()]
    return _table(["step", *(name.replace("_", " ") for name in names)], rows)


def estimate(part: Mapping[str, Any]) -> str:
    """A figure with its interval, where it has one."""
    if part.get("low") is None:
        return number(part.get("value"))
    return f"{number(part.get('value'))} ({number(part['low'])}–{number(part['high'])})"


def number(value: Any) -> str:
    """A figure with three digits; nothing for None."""
    return f"{value:.3g}" if isinstance(value, int | float) else ""


def _amount(value: Any) -> str:
    if isinstance(value, int) and value < 10**10:
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, int | float) else str(value or "")


def _tasks(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in (evaluation.get("tasks") or {}).items() if name != ZERO_SHOT}


def _between(row: Mapping[str, Any]) -> str:
    return "" if row["low"] is None else f"{number(row['low'])} – {number(row['high'])}"


def _group(row: Mapping[str, Any]) -> str:
    return "too few people" if row.get("too_few") or row.get("value") is None else estimate(row)


def _unlearnt(row: Mapping[str, Any], tasks: Mapping[str, Any]) -> bool:
    """Whether a row's interval does not clear the constant answer. Rows without that baseline say nothing."""
    if row.get("majority") is None or row["low"] is None:
        return False
    head = tasks[row["task"]]
    better = (head.get("items") or {}).get(row["item"], head).get("higher_is_better", True)
    return not clears_majority({**row, "baselines": {"majority": row["majority"]}, "higher_is_better": better})


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def escaped(name: str) -> str:
    """A name from outside as plain words of one line: no mark-up, no cell of its own."""
    return re.sub(r"([\\`*\[\]<>#|])", r"\\\1", " ".join(name.split()))
