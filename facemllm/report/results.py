"""The figures of tasks and items beside their baselines, and those of attributes that training never saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from facemllm.report import html
from facemllm.report.charts import interval_bar
from facemllm.scoring.metrics import CLOSED_MEAN, clears_majority, get, label
from facemllm.scoring.summary import BY_LIKELIHOOD
from facemllm.tasks import ZERO_SHOT

_LEARNT = (("bad", "not learnt"), ("fair", "below pixels"), ("good", "learnt"))
_ABOVE_CHANCE = (("quiet", "not shown"), ("good", "above chance"), ("good", "above chance"))
_HEAD = ("", "metric", "value [95 %]", "against baselines", "majority", "pixels", "", "asked", "unread")
_LEGEND = (
    '<p class="legend">'
    '<span><svg viewBox="0 0 22 14"><rect class="interval" x="1" y="2" width="20" height="10" rx="3"/>'
    '<circle class="value" cx="11" cy="7" r="3.5"/></svg>value and 95 % interval over people</span>'
    '<span><svg viewBox="0 0 22 14"><line class="majority" x1="11" y1="0" x2="11" y2="14"/></svg>'
    "constant answer (majority, median)</span>"
    '<span><svg viewBox="0 0 22 14"><path class="pixels" d="M11 1 l6 6 -6 6 -6 -6z"/></svg>linear model on small pixels'
    "</span><span>↑ more is better, ↓ less is better</span></p>"
)


def results(summary: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Every task with its items beneath; below them further metrics, refusals and what the test set can show."""
    found = {name: entry for name, entry in _tasks(summary, metrics).items() if name != ZERO_SHOT}
    if not found:
        return ""
    rows = []
    if closed := metrics.get(CLOSED_MEAN) or summary.get(CLOSED_MEAN):
        rows.append(_result("all closed questions", closed, "task"))
    unlearnt = []
    for name, entry in found.items():
        rows.append(_result(name, entry, "task"))
        rows += [_result(item, figure, "item") for item, figure in entry["items"].items()]
        unlearnt += [f"{name} {item}" for item, figure in entry["items"].items() if not clears_majority(figure)]
        unlearnt += [name] if not clears_majority(entry) else []
    people = _people(metrics)
    plain = (
        f"<p>Not shown to be learnt (interval does not clear the majority baseline): {escape(', '.join(unlearnt))}.</p>"
        if unlearnt
        else "<p>Every task and item clears its majority baseline.</p>"
    )
    lead = html.quiet(f"Split {html.text(metrics.get('split', 'test'))}, {people}, none seen in training.")
    shown = html.table(_HEAD, rows, numeric=(4, 5, 7, 8), kind="results")
    return html.section("Results", lead + plain + _LEGEND + shown + _further(found, closed))


def zero_shot(summary: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Attributes that stand in no training conversation, asked all the same."""
    entry = _tasks(summary, metrics).get(ZERO_SHOT)
    if entry is None:
        return ""
    names = list(entry["items"])
    held = f"Attributes held out of training: {', '.join(html.words(name) for name in names)}. " if names else ""
    lead = html.quiet(
        f"{held}They stand in no training conversation, neither in questions nor in captions. The majority mark is "
        "chance: the answer of a model that cannot tell."
    )
    verdict = (
        "<p>The interval lies above chance: the model carries over what it learnt about other attributes.</p>"
        if clears_majority(entry)
        else "<p>Not shown to be better than chance.</p>"
    )
    rows = [_result("held-out attributes", entry, "task", _ABOVE_CHANCE)]
    rows += [_result(item, part, "item", _ABOVE_CHANCE) for item, part in entry["items"].items() if len(names) > 1]
    shown = html.table(_HEAD, rows, numeric=(4, 5, 7, 8), kind="results")
    likely = _by_likelihood(entry)
    return html.section("Zero-shot: attributes never seen in training", lead + verdict + likely + shown)


def _by_likelihood(entry: Mapping[str, Any]) -> str:
    """What the model answers, and what it would if it had to choose an option."""
    found = (entry.get("also") or {}).get(BY_LIKELIHOOD)
    if not found:
        return ""
    return (
        f"<p>As the model answers, an answer that is none of the options being wrong: {html.estimate(entry)} "
        f"({html.percent(entry.get('unparsed'))} unread). If the likeliest option were taken whatever it writes: "
        f"{html.estimate(found)}.</p>"
    )


def _tasks(summary: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Figures by task, those of the summary first; items, which a summary may lack, from the metrics."""
    full = metrics.get("tasks") or {}
    found = summary.get("tasks") or full
    return {
        name: {**full.get(name, {}), **entry, "items": entry.get("items") or full.get(name, {}).get("items") or {}}
        for name, entry in found.items()
    }


def _people(metrics: Mapping[str, Any]) -> str:
    if "n_images" not in metrics:
        return "held out"
    return f"{html.text(metrics['n_images'])} images of {html.text(metrics['n_subjects'])} people"


def _result(name: str, figure: Mapping[str, Any], kind: str, grades: Sequence[tuple[str, str]] = _LEARNT) -> str:
    learnt = clears_majority(figure)
    direction = " ↑" if figure["higher_is_better"] else " ↓"
    grade, said = grades[learnt + (learnt and _beats_pixels(figure))]
    digits = _digits(figure)
    rivals = [html.number(figure["baselines"].get(rival), digits) for rival in ("majority", "pixels")]
    return (
        f'<tr class="{kind}{"" if learnt else " unlearnt"}"><td class="{kind}">{html.words(name)}</td>'
        f'<td class="plain"><small>{_metric(figure)}{direction}</small></td>'
        f"<td>{html.estimate(figure, digits)}</td>"
        f'<td class="plain">{interval_bar(figure)}</td>'
        f'<td class="n plain">{rivals[0]}</td><td class="n plain">{rivals[1]}</td>'
        f'<td class="plain">{html.tag(said, grade)}</td>'
        f'<td class="n plain">{html.text(figure.get("n"))}</td>'
        f'<td class="n plain">{html.percent(figure.get("unparsed"))}</td></tr>'
    )


def _further(found: Mapping[str, Mapping[str, Any]], closed: Mapping[str, Any] | None) -> str:
    """Folded: what other papers report of these tasks, how often answers are refused, and the power of the test set."""
    rows = []
    for name, entry in {"all closed questions": closed or {}, **found}.items():
        beside = entry.get("also") or {}
        also = [f"{_further_metric(metric, entry)} {html.estimate(part)}" for metric, part in beside.items()]
        power, refused = entry.get("smallest_difference"), entry.get("refused")
        if also or power is not None or refused is not None:
            unit = f" {html.text(entry['unit'])}" if power is not None and entry.get("unit") else ""
            least = html.number(power, _digits(entry)) + unit
            cells = [html.words(name), "<br>".join(also) or "–", html.percent(refused), least]
            rows.append(html.row(cells, numeric=(2, 3)))
    if not rows:
        return ""
    lead = html.quiet(
        "Refused: answers such as “I cannot help with that”; they count as unread and wrong. Smallest difference: two "
        "models whose true figures differ by less would more often than one time in five not be told apart on this "
        "test set (80 % power, 5 % two-sided)."
    )
    head = ("", "further metrics [95 %]", "refused", "smallest difference shown")
    return html.folded(
        "Further metrics, refusals, and what this test set can show", lead + html.table(head, rows, numeric=(2, 3))
    )


def words_of(metric: str) -> str:
    """A metric's name in words, escaped."""
    return escape(label(metric))


def _further_metric(metric: str, entry: Mapping[str, Any]) -> str:
    """`within_5` is a share of answers that are no further off, in the unit of the task."""
    unit = entry.get("unit") if metric.startswith("within_") else None
    return words_of(metric) + (f" {escape(unit)}" if unit else "")


def _metric(figure: Mapping[str, Any]) -> str:
    unit = figure.get("unit") if get(figure["metric"]).in_unit else None
    return words_of(figure["metric"]) + (f", {escape(unit)}" if unit else "")


def _digits(figure: Mapping[str, Any]) -> int:
    return 3 if figure.get("higher_is_better", True) else 2


def _beats_pixels(figure: Mapping[str, Any]) -> bool:
    rival = figure["baselines"].get("pixels")
    return rival is None or bool(figure["value"] > rival if figure["higher_is_better"] else figure["value"] < rival)
