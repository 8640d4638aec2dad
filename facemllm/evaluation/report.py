"""`report.html` of a run: one file that opens anywhere, with no network and no scripts.

It shows what was not learnt as plainly as what was, and says what kind of data it is about. Everything that comes from
outside is escaped; images are embedded.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from facemllm.evaluation.charts import curve, interval_bar
from facemllm.records import atomic_write
from facemllm.scoring.metrics import CLOSED_MEAN, clears_majority

_METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "mae": "mean error",
    "fact_f1": "F1 of facts",
}
_SYNTHETIC = (
    "The faces in this run are synthetic heads drawn by a renderer. These figures say that the workflow and the model "
    "learn; they say nothing about real photographs."
)
_REAL = (
    "The faces in this run come from the source '{source}'. The figures hold for people and pictures like those in its "
    "held-out split, and say nothing about others."
)


def write_report(
    out_html: Path,
    summary: Mapping[str, Any],
    evaluation_dir: Path | None = None,
    curves: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    *,
    source: str = "render",
) -> None:
    """Write the report of a run's `summary.json`, with its evaluation's items and samples and the training curves.

    `curves` maps a stage to what it logged (`step`, `loss`, `learning_rate`, `images_per_second`). `source` is the
    faces' source key; `render` means synthetic heads. A step may carry `figure`, a few telling words.
    """
    metrics = _json(evaluation_dir / "metrics.json") if evaluation_dir else {}
    samples = _json(evaluation_dir / "samples" / "samples.json") if evaluation_dir else []
    style = Path(__file__).with_name("report.css").read_text("utf-8")
    sections = [
        _header(summary, source),
        _gate(summary.get("gate")),
        _results(summary, metrics),
        _curves(curves or {}),
        _samples(samples, evaluation_dir),
        _steps(summary.get("steps") or []),
        _model(summary),
        _cost(summary.get("cost")),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(summary.get('run'))} · Face-MLLM</title><style>\n{style}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )
    atomic_write(out_html, page.encode("utf-8"))


def _json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _text(value: Any) -> str:
    """Any value as escaped text; a float with four digits, nothing as a dash."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return escape(str(value))


def _seconds(value: Any) -> str:
    if not isinstance(value, int | float):
        return "–"
    return f"{value:.1f} s" if value < 90 else f"{int(value // 60)} min {int(value % 60):02d} s"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>"


def _table(head: Sequence[str], rows: Iterable[str], numeric: Iterable[int] = (), kind: str = "plain") -> str:
    right = set(numeric)
    classes = [' class="n"' if place in right else "" for place in range(len(head))]
    cells = "".join(f"<th{side}>{escape(name)}</th>" for side, name in zip(classes, head, strict=True))
    top = f"<thead><tr>{cells}</tr></thead>"
    return f'<div class="scroll"><table class="{kind}">{top}<tbody>{"".join(rows)}</tbody></table></div>'


def _definitions(facts: Mapping[str, Any]) -> str:
    """A mapping as a list of terms, nested mappings flattened into their names."""
    rows = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            rows += [(f"{name} {inner}", below) for inner, below in value.items()]
        else:
            rows.append((name, value))
    body = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{_code(value) if 'digest' in name else _text(value)}</dd>"
        for name, value in rows
    )
    return f"<dl>{body}</dl>"


def _code(value: Any) -> str:
    return f"<code>{_text(value)}</code>"


def _header(summary: Mapping[str, Any], source: str) -> str:
    notice = _SYNTHETIC if source == "render" else _REAL.format(source=source)
    facts = [f"profile {_text(summary.get('profile'))}", _text(summary.get("device")), _seconds(summary.get("seconds"))]
    return (
        f'<header><h1>{_text(summary.get("run"))}</h1><p class="quiet">Face-MLLM run · {" · ".join(facts)}</p>'
        f'<p class="notice">{escape(notice)}</p></header>'
    )


def _gate(gate: Mapping[str, Any] | None) -> str:
    if not gate:
        return _section("Gate", '<p class="quiet">This run has not come to the gate.</p>')
    word, kind = ("Passed", "good") if gate["passed"] else ("Refused", "bad")
    reasons = "".join(f"<li>{_text(reason)}</li>" for reason in gate.get("reasons") or [])
    body = f'<p class="verdict {kind}">{word}</p><ul>{reasons}</ul>'
    if checks := gate.get("checks"):
        rows = [f"<tr><td>{_verdict(c['passed'])}</td><td>{_text(c['reason'])}</td></tr>" for c in checks]
        body += f"<details><summary>All {len(checks)} checks</summary>{_table(['', 'check'], rows)}</details>"
    return _section("Gate", body)


def _verdict(passed: bool) -> str:
    return f'<span class="tag {"good" if passed else "bad"}">{"passed" if passed else "failed"}</span>'


def _results(summary: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    found = summary.get("tasks") or metrics.get("tasks") or {}
    if not found:
        return ""
    rows = []
    if closed := metrics.get(CLOSED_MEAN) or summary.get(CLOSED_MEAN):
        rows.append(_result("all closed questions", closed, "task"))
    unlearnt = []
    for name, entry in found.items():
        items = entry.get("items") or metrics.get("tasks", {}).get(name, {}).get("items") or {}
        rows.append(_result(name, entry, "task"))
        rows += [_result(item, figure, "item") for item, figure in items.items()]
        unlearnt += [f"{name} {item}" for item, figure in items.items() if not clears_majority(figure)]
        unlearnt += [name] if not clears_majority(entry) else []
    names = ["", "metric", "value [95 %]", "against baselines", "majority", "pixels", "", "asked", "unread"]
    people = f"{_text(metrics['n_images'])} images of {_text(metrics['n_subjects'])} people" if metrics else "held out"
    plain = (
        f"<p>Not shown to be learnt (interval does not clear the majority baseline): {escape(', '.join(unlearnt))}.</p>"
        if unlearnt
        else "<p>Every task and item clears its majority baseline.</p>"
    )
    lead = f'<p class="quiet">Split {_text(metrics.get("split", "test"))}, {people}, none seen in training.</p>'
    return _section("Results", lead + plain + _LEGEND + _table(names, rows, numeric=(4, 5, 7, 8), kind="results"))


_LEGEND = (
    '<p class="legend">'
    '<span><svg viewBox="0 0 22 14"><rect class="interval" x="1" y="2" width="20" height="10" rx="3"/>'
    '<circle class="value" cx="11" cy="7" r="3.5"/></svg>value and 95 % interval over people</span>'
    '<span><svg viewBox="0 0 22 14"><line class="majority" x1="11" y1="0" x2="11" y2="14"/></svg>'
    "constant answer (majority, median)</span>"
    '<span><svg viewBox="0 0 22 14"><path class="pixels" d="M11 1 l6 6 -6 6 -6 -6z"/></svg>linear model on small pixels'
    "</span><span>↑ more is better, ↓ less is better</span></p>"
)

_GRADES = (("bad", "not learnt"), ("fair", "below pixels"), ("good", "learnt"))


def _result(name: str, figure: Mapping[str, Any], kind: str) -> str:
    learnt = clears_majority(figure)
    unit = figure.get("unit")
    metric = _METRICS.get(figure["metric"], figure["metric"])
    words = metric + (f", {unit}" if figure["metric"] == "mae" and unit else "")
    words += " ↑" if figure["higher_is_better"] else " ↓"
    grade, said = _GRADES[learnt + (learnt and _beats_pixels(figure))]
    digits = 3 if figure["higher_is_better"] else 2
    between = f"[{_figure(figure['low'], digits)}, {_figure(figure['high'], digits)}]"
    rivals = [_figure(figure["baselines"].get(rival), digits) for rival in ("majority", "pixels")]
    share = figure.get("unparsed")
    return (
        f'<tr class="{kind}{"" if learnt else " unlearnt"}"><td class="{kind}">{escape(name.replace("_", " "))}</td>'
        f'<td class="plain"><small>{escape(words)}</small></td>'
        f"<td>{_figure(figure['value'], digits)} <small>{between}</small></td>"
        f'<td class="plain">{interval_bar(figure)}</td>'
        f'<td class="n plain">{rivals[0]}</td><td class="n plain">{rivals[1]}</td>'
        f'<td class="plain"><span class="tag {grade}">{said}</span></td>'
        f'<td class="n plain">{_text(figure.get("n"))}</td>'
        f'<td class="n plain">{"–" if share is None else f"{share:.1%}"}</td></tr>'
    )


def _beats_pixels(figure: Mapping[str, Any]) -> bool:
    rival = figure["baselines"].get("pixels")
    return rival is None or bool(figure["value"] > rival if figure["higher_is_better"] else figure["value"] < rival)


def _figure(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    parts = []
    for stage, points in curves.items():
        if not points:
            continue
        last = points[-1]
        rates = [p["images_per_second"] for p in points if isinstance(p.get("images_per_second"), int | float)]
        words = [f"loss {_text(last.get('loss'))} after {_text(last.get('step'))} steps"]
        if rates:
            words.append(f"{sum(rates) / len(rates):,.0f} images/s")
        if peak := max((p.get("learning_rate") or 0.0 for p in points), default=0.0):
            words.append(f"rate up to {peak:.1e}")
        parts.append(f"<div><h3>{escape(stage)}</h3><small>{' · '.join(words)}</small>{curve(points)}</div>")
    return _section("Training: loss by step", f'<div class="curves">{"".join(parts)}</div>') if parts else ""


def _samples(samples: Sequence[Mapping[str, Any]], folder: Path | None) -> str:
    if not samples or folder is None:
        return ""
    faces = []
    for sample in samples:
        data = base64.b64encode((folder / "samples" / sample["image"]).read_bytes()).decode()
        rows = "".join(_answer(question) for question in sample["questions"])
        picture = f'<img alt="face {escape(sample["image_id"][:12])}" src="data:image/jpeg;base64,{data}">'
        faces.append(f'<div class="face">{picture}<table><tbody>{rows}</tbody></table></div>')
    lead = '<p class="quiet">Drawn by digest, not chosen: the same faces for every model on these conversations.</p>'
    shown, more = faces[:4], faces[4:]
    body = f'{lead}<div class="faces">{"".join(shown)}</div>'
    if more:
        body += f'<details><summary>{len(more)} more faces</summary><div class="faces">{"".join(more)}</div></details>'
    return _section("What it says about held-out faces", body)


def _answer(question: Mapping[str, Any]) -> str:
    """One question about a face: what was answered, and in words and colour whether it is right."""
    truth, parsed = (str(said).replace("_", " ") if said else said for said in (question["answer"], question["parsed"]))
    score = question["score"]
    if parsed is None:
        said, kind = f"not readable: “{_text(question['raw'])}” ✗; truth {_text(truth)}", "bad"
    elif question["metric"] == "mae":
        said, kind = f"{_text(parsed)} · truth {_text(truth)} · off by {_text(score)}", ""
    elif question["metric"] == "fact_f1":
        said, kind = f"{_text(question['raw'])} <small>F1 {_text(score)}</small>", ""
    elif score:
        said, kind = f"{_text(parsed)} ✓ right", "good"
    else:
        said, kind = f"{_text(parsed)} ✗ wrong, truth {_text(truth)}", "bad"
    return f'<tr><td>{_text(question["question"])}</td><td class="{kind}">{said}</td></tr>'


def _steps(steps: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        f"<tr><td>{_text(step.get('name'))}</td><td class='n'>{_seconds(step.get('seconds'))}</td>"
        f"<td>{'cached' if step.get('cached') else ''}</td><td>{_code((step.get('digest') or '')[:12])}</td>"
        f"<td>{_text(step.get('figure'))}</td></tr>"
        for step in steps
    ]
    names = ["step", "time", "", "digest", "what came of it"]
    return _section("Steps", _table(names, rows, numeric=(1,))) if rows else ""


def _model(summary: Mapping[str, Any]) -> str:
    facts = {name: summary[name] for name in ("model", "approval", "endpoint") if summary.get(name) is not None}
    return _section("Model, approval, endpoint", _definitions(facts)) if facts else ""


def _cost(cost: Mapping[str, Any] | None) -> str:
    """Cost per stage: one row a stage, one column for whatever was recorded."""
    stages = {name: body for name, body in (cost or {}).items() if isinstance(body, Mapping)}
    if not stages:
        return ""
    names = list(dict.fromkeys(key for body in stages.values() for key in body))
    rows = [
        f"<tr><td>{_text(stage)}</td>" + "".join(f'<td class="n">{_text(body.get(n))}</td>' for n in names) + "</tr>"
        for stage, body in stages.items()
    ]
    head = ["stage", *(name.replace("_", " ") for name in names)]
    return _section("Cost", _table(head, rows, numeric=range(1, len(head))))
