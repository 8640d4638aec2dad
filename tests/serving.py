"""A served model for tests: the service and its doors around any predictor, real or fake, and pictures to ask about.

A real predictor is served as the server does it, a fake one by an engine that calls it at once, with questions known by
their wordings and sensitive tasks refused without a reason.
"""

import base64
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from facemllm import tasks
from facemllm.model.inference import FaceScores, Predictor, Query, Scored
from facemllm.serve import assembly
from facemllm.serve.assembly import Loaded
from facemllm.serve.engine.protocol import Found, Prepared
from facemllm.serve.evaluated import Evaluated
from facemllm.serve.guard.images import decode, decode_map
from facemllm.serve.language import Encoded, Limits
from facemllm.serve.observer import Observer
from facemllm.serve.service import Served, Service
from facemllm.settings import serving
from facemllm.tasks.base import Item, Question, Task
from facemllm.tasks.paraphrases import normal
from tests.pictures import encode

LIMITS = Limits(max_body_mb=1, max_pixels=1_000_000, max_question_chars=100, max_instances=8)


class FakePredictor:
    """Likes first options best, and tells what it was shown: images are their red value, maps their class."""

    def __init__(self, takes_maps: bool = True, names: tuple[str, ...] = ()):
        self.takes_maps, self.characteristic_names = takes_maps, names
        self.scored: list[tuple[list[Any], list[Any]]] = []
        self.frame = self

    def pixels(self, image: Image.Image) -> Any:
        return int(image.getpixel((0, 0))[0])  # type: ignore[index]

    def map(self, classes: Any) -> Any:
        return int(classes[0, 0])

    def score_faces(self, images: Any, questions: Any, maps: Any) -> list[FaceScores]:
        self.scored.append((images, maps))
        return [
            FaceScores([self._score(query) for query in asked], dict.fromkeys(self.characteristic_names, image / 255))
            for image, asked in zip(images, questions, strict=True)
        ]

    def _score(self, query: Query) -> Scored:
        rest = (len(query.options) - 1) or 1
        return Scored((0.75, *[0.25 / rest] * (len(query.options) - 1)), 0)

    def generate(self, image: Any, question: Any, max_new_tokens: int, maps: Any) -> str:
        return f"chat of {image} {maps}"

    def generate_batch(self, images: Any, questions: Any, max_new_tokens: int, maps: Any) -> list[str]:
        return [f"{image} {shown}" for image, shown in zip(images, maps, strict=True)]

    def answer(self, text: str) -> list[str]:
        return [*text.split(), "end"]

    def chat(self, turns: Sequence[tuple[str, str]]) -> list[str]:
        return [word for _, text in turns for word in text.split()]


class DirectEngine:
    """Calls a predictor at once."""

    def __init__(self, predictor: Any) -> None:
        self._predictor = predictor
        self.takes_maps, self.characteristic_names = predictor.takes_maps, predictor.characteristic_names

    async def answer(
        self,
        face: Prepared,
        closed: Sequence[Query],
        open_: Sequence[Sequence[tuple[str, str]]],
        *,
        characteristics: bool,
        client: str,
        deadline: float,
    ) -> Found:
        found = FaceScores([], {})
        if closed or characteristics:
            (found,) = self._predictor.score_faces([face.pixels], [closed], [face.map])
        return Found(tuple(found.answers), tuple(self._write(face, chat) for chat in open_), found.characteristics)

    async def stream(
        self, face: Prepared, chat: Sequence[tuple[str, str]], *, client: str, deadline: float
    ) -> AsyncIterator[str]:
        yield self._write(face, chat)

    def _write(self, face: Prepared, chat: Sequence[tuple[str, str]]) -> str:
        if len(chat) == 1:
            (text,) = self._predictor.generate_batch([face.pixels], [chat[0][1]], 4, [face.map])
            return str(text)
        turns = [{"role": role, "content": text} for role, text in chat]
        return str(self._predictor.generate(face.pixels, turns, 4, [face.map]))


class DirectDecoder:
    """Decodes a picture at once."""

    def __init__(self, predictor: Any) -> None:
        self._predictor = predictor

    async def prepared(self, image: Encoded, map: Encoded | None, box: Any) -> Prepared:
        picture = decode(image)
        shown = None if map is None else self._predictor.map(decode_map(map, picture))
        return Prepared(self._predictor.pixels(picture), shown, (image.digest,))


@dataclass(frozen=True)
class Known:
    """A question known by its wording."""

    question: Question
    wording: str

    def reply(self, item: Item, value: str, text: str, probability: float | None = None) -> str:
        return text


class Wordings:
    """Knows questions by their wordings; any other may be answered freely."""

    def __init__(self, known: Sequence[Task]) -> None:
        self._known: dict[str, Known] = {}
        for task in known:
            for item in task.items:
                for text in item.wordings:
                    self._known.setdefault(normal(text), Known(task.question(item.name), text))

    def match(self, text: str) -> Known | None:
        return self._known.get(normal(text))

    def suggestions(self, text: str, count: int = 3) -> list[str]:
        return []

    def about_faces(self, text: str) -> bool:
        return True


@dataclass(frozen=True)
class Refusal:
    """Why something is not asked."""

    rule: str
    reason: str


@dataclass(frozen=True)
class Reasons:
    """Refuses sensitive tasks without a reason, and no text."""

    allowed: Mapping[str, str] = field(default_factory=dict)

    def refuses(self, text: str) -> Refusal | None:
        return None

    def breaks(self, text: str) -> Refusal | None:
        return None

    refuses_name = refuses_text = refuses_property = breaks

    def refuses_options(self, text: str, options: Sequence[str], match: Any, taught: Any) -> Refusal | None:
        return None

    def refuses_answer(self, text: str) -> Refusal | None:
        return None

    def refuses_task(self, task: str) -> Refusal | None:
        if tasks.get(task).sensitive and task not in self.allowed:
            return Refusal("sensitive", f"{task} is sensitive")
        return None

    def describe(self) -> dict[str, Any]:
        return {"allowed": dict(self.allowed)}


def loaded(
    predictor: Any,
    names: Sequence[str] = ("attributes", "age", "caption"),
    limits: Limits = LIMITS,
    evaluated: Evaluated | None = None,
    allowed: dict[str, str] | None = None,
    max_new_tokens: int = 4,
) -> Loaded:
    """The service of a predictor, and its doors."""
    bounds = {name: getattr(limits, name) for name in Limits.__dataclass_fields__}
    chosen = serving(
        {
            **bounds,
            "quality": dict.fromkeys(("min_side", "min_sharpness", "min_brightness", "min_contrast", "min_color")),
        },
        "test",
    )
    served, figures = Served("m", "7", "d" * 64), evaluated or Evaluated()
    if isinstance(predictor, Predictor):
        service = assembly.service_of(served, predictor, chosen, ",".join(names), figures, max_new_tokens, Observer())
    else:
        own, policy = [tasks.get(name) for name in names], Reasons(allowed or {})
        service = Service(
            served,
            own,
            matcher=Wordings(
                [*own, *(one for one in map(tasks.get, tasks.all_names()) if policy.refuses_task(one.name))]
            ),
            policy=policy,
            decoder=DirectDecoder(predictor),
            refuses_picture=lambda facts: None,
            engine=DirectEngine(predictor),
            evaluated=figures,
            timeout_s=60,
        )
    return assembly.loaded(service, chosen, predictor, max_new_tokens)


def png(*color: int) -> bytes:
    """A PNG of one colour, or, of one number, a map of one class."""
    return encode(np.full((48, 32, 3) if len(color) > 1 else (48, 32), color, np.uint8))


def b64(data: bytes) -> dict[str, str]:
    """A picture as a request holds it."""
    return {"b64": base64.b64encode(data).decode()}


def data_url(data: bytes) -> str:
    """A picture as OpenAI's clients send it."""
    return f"data:image/png;base64,{b64(data)['b64']}"
