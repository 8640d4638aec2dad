"""`/feedback`: what a user says of an answer, kept with the picture where they agree to the deployment's text.

`GET` gives that text, with its version. `POST` takes JSON:

    {"image": "<SHA-256 of the picture's file>", "task": "age", "item": "age", "answer": "about 30 years old",
     "correction": "42", "consent": true, "consent_text": "1", "picture": {"b64": "<base64 of the file>"}}

`question` takes the place of task and item where a question was free. A picture is taken with consent only, and has to
be the one of the digest. Texts that the policy withholds (who somebody is, health, ...) are refused, with consent or
without. Pages of other sites cannot post here: a browser asks first before it sends JSON to another
site, and is not answered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from facemllm import tasks
from facemllm.core.corrections import Correction, Corrections, Full, TooOften
from facemllm.serve.asked.policy import Policy
from facemllm.serve.guard.images import read_image
from facemllm.serve.language import Encoded, Limits, Refused
from facemllm.tasks.base import CLOSED, Item, number_text
from facemllm.tasks.items import Number

if TYPE_CHECKING:
    from fastapi import APIRouter

_FIELDS = ("image", "picture", "task", "item", "question", "answer", "correction", "consent", "consent_text")
_MOST_CORRECTION, _MOST_ANSWER = 200, 2000
_NAMED = 12


class Feedback:
    """Checks corrections and stores them. `consent` is the version and text that users agree to, `names` the tasks of
    the deployment, `model` the digest of what answers, `policy` what no text may hold."""

    def __init__(
        self,
        store: Corrections,
        consent: tuple[str, str],
        names: Sequence[str],
        model: str,
        limits: Limits,
        policy: Policy,
    ) -> None:
        self.consent, self.names = consent, tuple(names)
        self._store, self._model, self._limits, self._policy = store, model, limits, policy

    def take(self, given: Any, client: str, picture: Encoded | None = None) -> dict[str, Any]:
        """Store one correction, as the JSON of a request; `picture` stands for the field of that name. Raises Refused:
        422 for what is not in order, 429 and 507 where no more is taken."""
        if not isinstance(given, Mapping):
            raise Refused(422, "the body must be an object; GET /feedback says what is asked for")
        if unknown := sorted(set(given) - set(_FIELDS)):
            raise Refused(422, f"unknown field '{str(unknown[0])[:40]}'; known are {', '.join(_FIELDS)}")
        consent, agreed = given.get("consent"), given.get("consent_text")
        if not isinstance(consent, bool):
            raise Refused(422, "consent must be true or false")
        if consent and agreed != self.consent[0]:
            raise Refused(422, f"consent_text must be the version of the text agreed to, now {self.consent[0]!r}")
        if "picture" in given:
            source = given["picture"]
            if not isinstance(source, Mapping) or set(source) != {"b64"}:
                raise Refused(422, 'picture must be {"b64": "<base64 of the file>"}')
            picture = read_image(source["b64"], "picture.b64", self._limits)
        if picture is not None and not consent:
            raise Refused(422, "a picture is taken with consent only: leave it out, or agree to the text")
        image = str(given.get("image") or (picture.digest if picture else ""))
        if len(image) != 64 or not set(image) <= set("0123456789abcdef"):
            raise Refused(422, "image must be the SHA-256 of the picture's file, 64 hexadecimal digits")
        if picture is not None and picture.digest != image:
            raise Refused(422, "the picture is not the one of that digest")
        said = _text(given.get("correction"), "correction", _MOST_CORRECTION)
        if not said:
            raise Refused(422, "correction must say what is right")
        answer, about = _text(given.get("answer", ""), "answer", _MOST_ANSWER), self._about(given, said)
        self._require_harmless(about, question=about["question"] or "", answer=answer, correction=said)
        correction = Correction(
            image=image,
            **about,
            answer=answer,
            correction=said,
            consent=consent,
            consent_text=str(agreed) if consent else None,
            picture=picture is not None,
            model=self._model,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        try:
            self._store.add(correction, picture.data if picture else None, client)
        except TooOften as busy:
            raise Refused(429, str(busy), busy.retry_after) from None
        except (Full, OSError):
            raise Refused(507, "no more corrections can be stored here; tell whoever runs this server") from None
        return {"stored": True, "image": image, "picture": correction.picture, "label": correction.label}

    def _require_harmless(self, about: Mapping[str, str | None], **texts: str) -> None:
        """Refuse texts that hold what the policy withholds; answers that the item has are none."""
        item = tasks.get(about["task"]).find(about["item"] or "") if about["task"] else None
        own = {name for option in (item.options if item else ()) for name in (option.value, option.text)}
        for name, text in texts.items():
            if text not in own and (refusal := self._policy.refuses_text(text)):
                raise Refused(422, f"{name} holds what is not stored ({refusal.rule}): {refusal.reason}")

    def _about(self, given: Mapping[str, Any], said: str) -> dict[str, str | None]:
        """What a correction is about, and the label that its words are of a task's item."""
        if "question" in given:
            if "task" in given or "item" in given:
                raise Refused(422, "give either question, or task and item")
            question = _text(given["question"], "question", self._limits.max_question_chars)
            return {"task": None, "item": None, "question": question, "label": None}
        name = given.get("task")
        if name not in self.names:
            raise Refused(422, f"task: one of {', '.join(self.names)} is needed, or question")
        task = tasks.get(str(name))
        only = task.items[0].name if len(task.items) == 1 else None
        item = task.find(str(given.get("item") or only))
        if item is None:
            raise Refused(422, f"item: one of {', '.join(one.name for one in task.items[:_NAMED])} is needed")
        if (label := label_of(item, said)) is None and item.form in CLOSED:
            values = ", ".join(option.value for option in item.options[:_NAMED])
            raise Refused(422, f"correction is no answer to {task.name}.{item.name}; answers are {values}")
        return {"task": task.name, "item": item.name, "question": None, "label": label}


def label_of(item: Item, text: str) -> str | None:
    """The canonical answer that a user's words give: an option's value or text, a number, or what the item reads."""
    if isinstance(item, Number):
        try:
            number = float(text)
        except ValueError:
            return item.parse(text)
        return number_text(number) if item.low <= number <= item.high else None
    values = [option.value for option in item.options]
    found = text if text in values else item.parse(text)
    return found if found is None or not values or found in values else None


def _text(value: Any, name: str, most: int) -> str:
    if not isinstance(value, str) or len(value) > most:
        raise Refused(422, f"{name} must be a text of at most {most} characters")
    text = " ".join(value.split())
    if not text.isprintable():
        raise Refused(422, f"{name} holds characters that cannot be printed")
    return text


def router(feedback: Feedback, client_of: Callable[[Request], str]) -> APIRouter:
    """The door; `client_of` names who asks, so that nobody writes for all. Bodies are bounded by BodyLimit before."""
    from fastapi import APIRouter

    door = APIRouter()

    async def show() -> dict[str, Any]:
        version, text = feedback.consent
        return {"consent": {"version": version, "text": text}, "fields": list(_FIELDS), "tasks": list(feedback.names)}

    async def post(request: Request) -> dict[str, Any]:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "a correction is sent as application/json")
        try:
            given = json.loads(await request.body())
        except (ValueError, RecursionError):
            raise Refused(400, "the body is not valid JSON") from None
        return await run_in_threadpool(feedback.take, given, client_of(request))

    door.add_api_route("/feedback", show, methods=["GET"])
    door.add_api_route("/feedback", post, methods=["POST"])
    return door
