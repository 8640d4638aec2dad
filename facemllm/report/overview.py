"""The run around the figures: header, gate, curves, faces with answers, steps, model, cost."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from facemllm.report import html
from facemllm.scoring import metrics

_SYNTHETIC = (
    "The faces in this run are synthetic heads drawn by a renderer. These figures say that the workflow and the model "
    "learn; they say nothing about real photographs."
)
_REAL = (
    "The faces in this run come from the source '{source}'. The figures hold for people and pictures like those in its "
    "held-out split, and say nothing about others."
)


def header(summary: Mapping[str, Any], source: str) -> str:
    """The run's name, how it ran, and what kind of data its figures are about."""
    notice = _SYNTHETIC if source == "render" else _REAL.format(source=source)
    facts = [f"profile {html.text(summary.get('profile'))}", html.text(summary.get("device"))]
    facts.append(html.seconds(summary.get("seconds")))
    return (
        f'<header><h1>{html.text(summary.get("run"))}</h1><p class="quiet">Face-MLLM run · {" · ".join(facts)}</p>'
        f'<p class="notice">{escape(notice)}</p></header>'
    )


def gate(found: Mapping[str, Any] | None) -> str:
    """The gate's verdict with its reasons; all checks folded."""
    if not found:
        return html.section("Gate", html.quiet("This run has not come to the gate."))
    word, kind = ("Passed", "good") if found["passed"] else ("Refused", "bad")
    reasons = "".join(f"<li>{html.text(reason)}</li>" for reason in found.get("reasons") or [])
    body = f'<p class="verdict {kind}">{word}</p><ul>{reasons}</ul>'
    if checks := found.get("checks"):
        rows = [html.row([_verdict(check["passed"]), html.text(check["reason"])]) for check in checks]
        body += html.folded(f"All {len(checks)} checks", html.table(["", "check"], rows))
    return html.section("Gate", body)


def _verdict(passed: bool) -> str:
    return html.tag("passed", "good") if passed else html.tag("failed", "bad")


def samples(found: Sequence[Mapping[str, Any]], folder: Path | None) -> str:
    """Some held-out faces with all that was said about them."""
    if not found or folder is None:
        return ""
    faces = []
    for sample in found:
        data = base64.b64encode((folder / "samples" / sample["image"]).read_bytes()).decode()
        rows = "".join(_answer(question) for question in sample["questions"])
        picture = f'<img alt="face {escape(sample["image_id"][:12])}" src="data:image/jpeg;base64,{data}">'
        faces.append(f'<div class="face">{picture}<table><tbody>{rows}</tbody></table></div>')
    lead = html.quiet("Drawn by digest, not chosen: the same faces for every model on these conversations.")
    shown, more = faces[:4], faces[4:]
    body = f'{lead}<div class="faces">{"".join(shown)}</div>'
    if more:
        body += html.folded(f"{len(more)} more faces", f'<div class="faces">{"".join(more)}</div>')
    return html.section("What it says about held-out faces", body)


def _answer(question: Mapping[str, Any]) -> str:
    """One question about a face: what was answered, and in words and colour whether it is right."""
    truth, parsed = (str(said).replace("_", " ") if said else said for said in (question["answer"], question["parsed"]))
    score = question["score"]
    if parsed is None:
        said, kind = f"{_unread(question['raw'] or '')} ✗; truth {html.text(truth)}", "bad"
    elif metrics.get(question["metric"]).answers == "number":
        said, kind = f"{html.text(parsed)} · truth {html.text(truth)} · off by {html.text(score)}", ""
    elif metrics.get(question["metric"]).answers == "facts":
        said, kind = f"{html.text(question['raw'])} <small>F1 {html.text(score)}</small>", ""
    elif score:
        said, kind = f"{html.text(parsed)} ✓ right", "good"
    else:
        said, kind = f"{html.text(parsed)} ✗ wrong, truth {html.text(truth)}", "bad"
    return f'<tr><td>{html.text(question["question"])}</td><td class="{kind}">{said}</td></tr>'


def _unread(raw: str) -> str:
    """An answer that is none; what stands in brackets is a note about it, not the model's words."""
    noted = raw.startswith("(") and raw.endswith(")")
    return f"no answer {html.text(raw)}" if noted else f"not readable: “{html.text(raw)}”"


def steps(found: Sequence[Mapping[str, Any]]) -> str:
    """Every step with its time, digest and telling figure."""
    rows = [
        html.row(
            [
                html.text(step.get("name")),
                html.seconds(step.get("seconds")),
                "cached" if step.get("cached") else "",
                html.code((step.get("digest") or "")[:12]),
                html.text(step.get("figure")),
            ],
            numeric=(1,),
        )
        for step in found
    ]
    names = ["step", "time", "", "digest", "what came of it"]
    return html.section("Steps", html.table(names, rows, numeric=(1,))) if rows else ""


def model(summary: Mapping[str, Any]) -> str:
    """The registered version, the decision on it, and where it answers."""
    facts = {name: summary[name] for name in ("model", "approval", "endpoint") if summary.get(name) is not None}
    return html.section("Model, approval, endpoint", html.definitions(facts)) if facts else ""


_COSTS = {
    "device": ("device", html.text),
    "seconds": ("time", html.seconds),
    "samples": ("faces", html.text),
    "tokens": ("tokens", html.text),
    "flops": ("operations", lambda value: _scaled(value, "FLOP")),
    "peak_memory_bytes": ("peak memory", lambda value: f"{value / 2**30:.2f} GiB"),
    "energy_cpu_joules": ("energy, processors", lambda value: f"{value / 3600:.2f} Wh"),
    "energy_gpu_joules": ("energy, GPU", lambda value: f"{value / 3600:.2f} Wh"),
    "price": ("price", html.text),
}
_ADDED = ("seconds", "tokens", "flops", "energy_cpu_joules", "energy_gpu_joules", "price")


def cost(found: Mapping[str, Any] | None) -> str:
    """What the run's steps cost: a row a step and their sum, a column for whatever is known of one of them."""
    stages = {name: body for name, body in (found or {}).items() if isinstance(body, Mapping)}
    if not stages:
        return ""
    known = {key for body in stages.values() for key, value in body.items() if value is not None}
    names = [name for name in _COSTS if name in known] + sorted(known - set(_COSTS))
    sums = {name: _sum([body.get(name) for body in stages.values()]) for name in _ADDED if name in known}
    lines = {**stages, **({"together": sums} if len(stages) > 1 else {})}
    places = [place for place, name in enumerate(names, 1) if name != "device"]
    rows = [
        html.row([html.words(stage), *(_cost(body, name) for name in names)], numeric=places)
        for stage, body in lines.items()
    ]
    head = ["step", *(_COSTS[name][0] if name in _COSTS else name.replace("_", " ") for name in names)]
    notes = ["Time and energy of the work itself, without starting up."]
    if "flops" in known:
        notes.append(
            "Operations: matrix products, convolutions and attention, counted on one step and scaled by tokens."
        )
    if not known & {"energy_cpu_joules", "energy_gpu_joules"}:
        notes.append("This machine reports no energy to this user.")
    return html.section("Cost", html.quiet(" ".join(notes)) + html.table(head, rows, numeric=places))


def _sum(amounts: Sequence[float | None]) -> float | None:
    """A sum is known where everything added is."""
    known = [amount for amount in amounts if amount is not None]
    return sum(known) if len(known) == len(amounts) else None


def _cost(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    return "–" if value is None else _COSTS[name][1](value) if name in _COSTS else html.text(value)


def _scaled(value: float, unit: str) -> str:
    """A large number with the prefix that keeps it short: `12.3 TFLOP`."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(value) < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} Z{unit}"
