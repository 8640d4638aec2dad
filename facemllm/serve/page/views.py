"""What the page shows: answers as rows, what can be asked, and the model with those who approved it."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from facemllm.report.kit import words
from facemllm.serve.language import Answer, Answers, Encoded
from facemllm.serve.page.form import Asked
from facemllm.serve.page.parts import coloured
from facemllm.tasks.base import Task

MOST_SHOWN = 1_500_000
"""Bytes of a picture or map that a page without scripts gives back to be seen; with scripts the browser has them."""
_MOST_SCORES = 6
_TAGS = {
    "taught": ("", ""),
    "free": ("in free text", "warn"),
    "untaught": ("not taught", "quiet"),
    "refused": ("refused", "bad"),
    "abstained": ("not said", "warn"),
}
_FORMS = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png", b"RIFF": "image/webp", b"BM": "image/bmp"}


@dataclass(frozen=True)
class Score:
    """An option and its probability, in percent."""

    text: str
    percent: float


@dataclass(frozen=True)
class Row:
    """A question and its answer. `tag` says in words what kind it is where it is no plain answer, `about` names it for
    a correction, `percent` is None where no probability is known."""

    question: str
    answer: str
    tag: str
    tone: str
    rule: str
    reason: str
    percent: float | None
    scores: Sequence[Score]
    suggestions: Sequence[str]
    about: str


@dataclass(frozen=True)
class Result:
    """All answers about one picture: `groups` by task, own questions last. `image` and `map` are data URLs, empty where
    they are too large or the browser has them."""

    digest: str
    image: str
    map: str
    groups: Sequence[tuple[str, Sequence[Row]]]
    milliseconds: int

    @property
    def rows(self) -> list[Row]:
        """Every row."""
        return [row for _, rows in self.groups for row in rows]


@dataclass(frozen=True)
class Offered:
    """A task that can be asked, or one that the policy refuses, with the reason."""

    name: str
    title: str
    count: int
    example: str
    use: str
    refused: str


def result(asked: Asked, found: Answers, known: Mapping[str, Task], seconds: float, script: bool) -> Result:
    """Answers for the page. With `script` the browser shows the picture that it has."""
    groups: dict[str, list[Row]] = {}
    for question, answer in zip(asked.ask.questions, found.answers, strict=True):
        task = known.get(question.task or "")
        name = words(task.name) if task else "your own questions"
        wording = question.text or (task.item(question.item or "").templates[0] if task else "")
        groups.setdefault(name, []).append(_row(wording, answer, known))
    image = asked.ask.image
    shown = "" if script else _data_url(image)
    return Result(image.digest, shown, _map(asked.ask.map), tuple(groups.items()), round(1000 * seconds))


def _row(question: str, answer: Answer, known: Mapping[str, Task]) -> Row:
    tag, tone = _TAGS[answer.kind]
    silent = answer.kind in ("refused", "untaught", "abstained")
    about = [answer.task, answer.item, None if answer.task and answer.item else question, answer.text]
    return Row(
        question=question,
        answer="" if silent else f"{answer.text} {_unit(answer, known)}".strip(),
        tag=tag,
        tone=tone,
        rule=words(answer.rule) if answer.rule else "",
        reason=answer.reason or (answer.text if silent else ""),
        percent=None if answer.probability is None else round(100 * answer.probability, 1),
        scores=_scores(answer, known),
        suggestions=getattr(answer, "suggestions", ()),
        about=json.dumps(about),
    )


def _unit(answer: Answer, known: Mapping[str, Task]) -> str:
    """The unit of an answer that is a bare number."""
    task = known.get(answer.task or "")
    bare = task is not None and answer.item is not None and answer.text.removeprefix("-").replace(".", "", 1).isdigit()
    return task.unit if task is not None and bare else ""


def _scores(answer: Answer, known: Mapping[str, Task]) -> list[Score]:
    """The likeliest options, in their own words."""
    task = known.get(answer.task or "")
    item = task.find(answer.item or "") if task else None
    texts = {option.value: option.text for option in item.options} if item else {}
    best = sorted((answer.scores or {}).items(), key=lambda pair: -pair[1])[:_MOST_SCORES]
    return [Score(texts.get(value, value), round(100 * share, 1)) for value, share in best]


def _data_url(image: Encoded) -> str:
    form = next((form for start, form in _FORMS.items() if image.data.startswith(start)), "")
    if not form or len(image.data) > MOST_SHOWN:
        return ""
    return f"data:{form};base64,{base64.b64encode(image.data).decode()}"


def _map(found: Encoded | None) -> str:
    if found is None or len(found.data) > MOST_SHOWN:
        return ""
    try:
        return f"data:image/png;base64,{base64.b64encode(coloured(found.data)).decode()}"
    except ValueError:
        return ""


def offered(known: Mapping[str, Task], refused: Callable[[str], str | None]) -> list[Offered]:
    """What can be asked by name."""
    return [
        Offered(name, words(name), len(task.items), task.items[0].templates[0], task.use, refused(name) or "")
        for name, task in known.items()
    ]


def preselected(offers: Sequence[Offered], most: int) -> list[str]:
    """The tasks that are chosen at first: as many as one request takes, in their order."""
    chosen, left = [], most
    for one in offers:
        if not one.refused and one.count <= left:
            chosen.append(one.name)
            left -= one.count
    return chosen


def model(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The model and who approved it, as rows of names and values, from what GET /info gives."""
    rows = [("Model", str(info.get("model", ""))), ("Version", str(info.get("version") or "–"))]
    rows.append(("Digest", str(info.get("digest", ""))))
    authorized = info.get("authorized")
    if not authorized:
        return [*rows, ("Approved by", "nobody: this server answers on its own machine alone")]
    by = "; ".join(f"{one['person']} as {words(one['role'])}, {one['issued']}" for one in authorized["approvals"])
    rows += [("Approved by", by), ("Approved until", str(authorized["expires"]))]
    return [*rows, ("Withdrawn", str(authorized["withdrawn"]))] if authorized.get("withdrawn") else rows
