"""The one language of requests inside the server: every protocol is translated into it, and answers out of it.

Everything from outside is taken for hostile. A refusal is `Refused`: an HTTP status and one line that says what to
change; each protocol gives it in its own form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


class Refused(Exception):
    """A request that is not answered: HTTP status, one line for the client, and when to try again (seconds)."""

    def __init__(self, status: int, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.retry_after = status, reason, retry_after


@dataclass(frozen=True)
class Limits:
    """How much a request may hold. `max_pixels` counts all its images together."""

    max_body_mb: float
    max_pixels: int
    max_question_chars: int
    max_instances: int


@dataclass(frozen=True)
class Encoded:
    """An image that passed every check short of decoding; `digest` is SHA-256 of `data`."""

    data: bytes = field(repr=False)
    width: int
    height: int
    digest: str


@dataclass(frozen=True)
class Question:
    """One question: a text, the name of a task's item, or a chat that ends in a question (its text is `text`, too).

    `options` are answers of the client's own: the likeliest is given. `chat` is (role, text) by turns.
    """

    text: str | None = None
    task: str | None = None
    item: str | None = None
    chat: tuple[tuple[str, str], ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ask:
    """Questions about one face. `map` is a map of its parts; `box` (left, top, right, bottom, in pixels of the image)
    says where the face is; `characteristics` asks for their scores beside the answers. An answer whose probability is
    below `min_probability` is held back. `where` is its place in the request, for refusals ("instances[0]")."""

    image: Encoded
    questions: tuple[Question, ...]
    map: Encoded | None = None
    box: tuple[float, float, float, float] | None = None
    characteristics: bool = False
    min_probability: float | None = None
    where: str = "request"


Kind = Literal["taught", "free", "untaught", "refused", "abstained"]
"""How a question was answered: as a task's item; in free text; not, since it is about something else; not, by policy;
not, since picture or probability do not allow it."""


@dataclass(frozen=True)
class Answer:
    """An answer to one question. `value` and `scores` are those of the task's item; `probability` is that of the answer
    given, calibrated where evaluation measured how; `rule` names what refused, `reason` says why there is no answer,
    and `suggestions` are questions that this model was taught. `text` always is something to say."""

    kind: Kind
    text: str
    value: Any = None
    scores: Mapping[str, float] | None = None
    probability: float | None = None
    task: str | None = None
    item: str | None = None
    rule: str | None = None
    reason: str | None = None
    suggestions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answers:
    """What was found about one face: answers in the order of the questions, and scores of characteristics if asked."""

    answers: tuple[Answer, ...]
    characteristics: Mapping[str, float] | None = None
