"""A served model for tests: the service and its doors around any predictor, real or fake, and pictures to ask about."""

import base64
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from facemllm.model.inference import FaceScores, Query, Scored
from facemllm.serve.assembly import Loaded, assembled
from facemllm.serve.engine.protocol import Found
from facemllm.serve.evaluated import Evaluated
from facemllm.serve.language import Limits
from facemllm.serve.service import Served
from facemllm.settings import plain
from facemllm.settings.serve import ServePolicy, ServeQuality
from tests.conftest import encode

REASONS = {"age": "a test", "gender": "a test", "expression": "a test"}
NO_LIMIT = ServeQuality(min_side=None, min_sharpness=None, min_brightness=None, min_contrast=None)
LIMITS = Limits(max_body_mb=1, max_pixels=1_000_000, max_question_chars=100, max_instances=8)


class FakePredictor:
    """Likes first options best, and tells what it was shown: images are their red value, maps their class."""

    def __init__(self, takes_maps: bool = True, names: tuple[str, ...] = ()):
        self.takes_maps, self.characteristic_names = takes_maps, names
        self.scored: list[tuple[list[Any], list[Any]]] = []
        self.queries: list[list[Query]] = []
        self.frame = self

    def pixels(self, image: Image.Image) -> Any:
        return np.int64(image.getpixel((0, 0))[0])  # type: ignore[index]

    def map(self, classes: Any) -> Any:
        return np.int64(classes[0, 0])

    def score_faces(self, images: Any, questions: Any, maps: Any) -> list[FaceScores]:
        self.scored.append((images, maps))
        self.queries += [list(asked) for asked in questions]
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


class PlainEngine:
    """Asks a predictor at once, face by face."""

    def __init__(self, predictor: Any, max_new_tokens: int) -> None:
        self._predictor, self._longest = predictor, max_new_tokens
        self.takes_maps, self.characteristic_names = predictor.takes_maps, predictor.characteristic_names

    async def answer(
        self, face: Any, closed: Any, open_: Any, *, characteristics: bool, client: str, deadline: float
    ) -> Found:
        scores: list[FaceScores] = []
        if closed or characteristics:
            scores = self._predictor.score_faces([face.pixels], [closed], [face.map])
        texts = tuple(self._text(face, chat) for chat in open_)
        found = scores[0] if scores else FaceScores([], {})
        return Found(tuple(found.answers), texts, found.characteristics)

    async def stream(self, face: Any, chat: Any, *, client: str, deadline: float) -> AsyncIterator[str]:
        yield self._text(face, chat)

    def _text(self, face: Any, chat: Any) -> str:
        if len(chat) == 1:
            batch = self._predictor.generate_batch([face.pixels], [chat[0][1]], self._longest, [face.map])
            return str(batch[0])
        turns = [{"role": role, "content": text} for role, text in chat]
        return str(self._predictor.generate(face.pixels, turns, self._longest, [face.map]))


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
    policy = ServePolicy(allowed=REASONS if allowed is None else allowed)
    chosen = plain().serve.model_copy(update={**bounds, "batch_size": 8, "quality": NO_LIMIT, "policy": policy})
    served = Served("m", "7", "d" * 64)
    engine = PlainEngine(predictor, max_new_tokens)
    return assembled(served, predictor, engine, chosen, ",".join(names), evaluated or Evaluated(), max_new_tokens)


def png(*color: int) -> bytes:
    """A PNG of one colour, or, of one number, a map of one class."""
    return encode(np.full((48, 32, 3) if len(color) > 1 else (48, 32), color, np.uint8), format="PNG")


def b64(data: bytes) -> dict[str, str]:
    """A picture as a request holds it."""
    return {"b64": base64.b64encode(data).decode()}


def data_url(data: bytes, kind: str = "png") -> str:
    """A picture as OpenAI's clients send it."""
    return f"data:image/{kind};base64,{b64(data)['b64']}"
