"""How the model was trained: its branches, the relations it was held to, its curves, and what it said on the way."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from facemllm.report import html
from facemllm.report.charts import curve

_NAMES = {
    "loss/answers": "loss of answers",
    "loss/caption_words": "loss of caption words",
    "loss/characteristics": "loss of characteristics",
    "loss/logic": "penalty of broken relations",
    "learning_rate": "learning rate",
    "grad_norm": "norm of the gradient",
}
_SPEEDS = {"images_per_second": "faces/s", "samples_per_second": "faces/s", "tokens_per_second": "tokens/s"}

_LONGEST, _SHORT = 240, 60  # characters of an answer, open and closed; a model that repeats itself goes on for ever

Points = Sequence[Mapping[str, Any]]


def branches(found: Mapping[str, Any] | None) -> str:
    """The settings of the segmentation and knowledge branches that the model has."""
    if not found:
        return ""
    shown = {
        branch: {name: ", ".join(value) if isinstance(value, list) else value for name, value in chosen.items()}
        for branch, chosen in found.items()
    }
    return html.section("Branches of the model", html.definitions(shown))


def relations(found: Sequence[Mapping[str, Any]] | None) -> str:
    """The audit of logical relations in the training labels, before they were enforced."""
    if not found:
        return ""
    kept = sum(bool(one["enforced"]) for one in found)
    lead = (
        f"<p>{kept} of {len(found)} relations were enforced in training. A relation is left out when the true labels "
        "break it too often, when no label can be held against it, or when the others say it already.</p>"
    )
    rows = [
        html.row(
            [
                html.words(str(one["relation"])),
                html.text(one["checked"]),
                html.text(one["broken"]),
                html.percent(one["rate"]),
                html.tag("enforced", "good") if one["enforced"] else html.tag("left out", "quiet"),
            ],
            numeric=(1, 2, 3),
        )
        for one in found
    ]
    head = ("relation", "faces that tell", "broken by the labels", "share", "")
    shown = html.folded(f"All {len(rows)} relations", html.table(head, rows, numeric=(1, 2, 3)))
    return html.section("Logical relations in the labels", lead + shown)


def curves_of(curves: Mapping[str, Points]) -> str:
    """Loss by step, one curve a stage; folded below, each of its terms and tasks, the rate and the gradient."""
    parts, further = [], []
    for stage, points in curves.items():
        if not points:
            continue
        parts.append(f"<div><h3>{escape(stage)}</h3><small>{_told(points)}</small>{curve(points)}</div>")
        more = [_one(points, name, words) for name, words in _more(points).items()]
        further.append(html.folded(f"{stage}: its terms, tasks, rate and gradient", _grid(more)) if more else "")
    return html.section("Training: loss by step", _grid(parts) + "".join(further)) if parts else ""


def _grid(parts: Sequence[str]) -> str:
    return f'<div class="curves">{"".join(parts)}</div>'


def _one(points: Points, name: str, words: str) -> str:
    own = [point for point in points if isinstance(point.get(name), int | float)]
    return f"<div><h3>{escape(words)}</h3>{curve(own, name)}</div>"


def _more(points: Points) -> dict[str, str]:
    """Metrics that have a curve of their own beside the loss, and what they are called."""
    logged = sorted({name for point in points for name in point})
    tasks = {name: f"loss of task {name.split('/', 2)[2].replace('_', ' ')}" for name in logged if "loss/task/" in name}
    return {name: words for name, words in _NAMES.items() if name in logged} | tasks


def _told(points: Points) -> str:
    """A stage in a line: how far it came, how fast, with how much memory."""
    last = points[-1]
    words = [f"loss {html.text(last.get('loss'))} after {html.text(last.get('step'))} steps"]
    for name, unit in _SPEEDS.items():
        if (mean := _mean(points, name)) is not None:
            words.append(f"{mean:,.0f} {unit}")
    if (share := _mean(points, "mfu")) is not None:
        words.append(f"{share:.0%} of the peak operations")
    if peak := max((p.get("memory_bytes") or 0.0 for p in points), default=0.0):
        words.append(f"{peak / 2**30:.2f} GiB")
    if peak := max((p.get("learning_rate") or 0.0 for p in points), default=0.0):
        words.append(f"rate up to {peak:.1e}")
    return " · ".join(words)


def _mean(points: Points, name: str) -> float | None:
    values = [point[name] for point in points if isinstance(point.get(name), int | float)]
    return sum(values) / len(values) if values else None


def learning(samples: Mapping[str, Sequence[Mapping[str, Any]]], pictures: Mapping[str, bytes]) -> str:
    """What the model said after each stage of the same few faces: as it wrote, and the likeliest option."""
    stages = {stage: rows for stage, rows in samples.items() if rows}
    if not stages:
        return ""
    said = {stage: {(row["image_id"], row["task"], row["item"]): row for row in rows} for stage, rows in stages.items()}
    every = {key: row for rows in said.values() for key, row in rows.items()}
    faces = [_face(image, every, said, pictures.get(image)) for image in dict.fromkeys(key[0] for key in every)]
    lead = html.quiet(
        "The same validation faces and questions after every stage, drawn by digest. In brackets the likeliest option "
        "and its probability."
    )
    more = html.folded(f"{len(faces) - 1} more faces", "".join(faces[1:])) if faces[1:] else ""
    return html.section("What it said after each stage", lead + faces[0] + more)


def _face(image: str, every: Mapping[Any, Any], said: Mapping[str, Mapping[Any, Any]], picture: bytes | None) -> str:
    shown = html.code(image[:12])
    if picture is not None:
        data = base64.b64encode(picture).decode()
        shown = f'<img alt="face {escape(image[:12])}" src="data:image/jpeg;base64,{data}">'
    rows = [
        html.row([html.text(row["question"]), _truth(row), *(_answer(rows.get(key)) for rows in said.values())])
        for key, row in every.items()
        if key[0] == image
    ]
    table = html.table(("question", "truth", *(f"after {stage}" for stage in said)), rows)
    return f'<div class="learning">{shown}{table}</div>'


def _truth(row: Mapping[str, Any]) -> str:
    return html.text(str(row["truth"]).replace("_", " ").replace(";", "; ")) if row["truth"] is not None else "–"


def _answer(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    is_open = row.get("likeliest") is None
    written, longest = row["written"], _LONGEST if is_open else _SHORT
    words = html.text(f"{written[:longest]}…" if len(written) > longest else written)
    if is_open:
        return words
    return f"{words} <small>({html.words(str(row['likeliest']))} {html.percent(row['probability'])})</small>"
