"""A served model for tests: the service and its doors around any predictor, real or fake, and pictures to ask about."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from facemllm.model.inference import FaceScores, Query, Scored
from facemllm.serve.assembly import Loaded, assembled
from facemllm.serve.evaluated import Evaluated
from facemllm.serve.language import Limits
from facemllm.serve.service import Served
from facemllm.settings.operations import Serve, ServePolicy
from tests.conftest import encode

LIMITS = Limits(max_body_mb=1, max_pixels=1_000_000, max_question_chars=100, max_instances=8)


class FakePredictor:
    """Likes first options best, and tells what it was shown: images are their red value, maps their class."""

    def __init__(self, takes_maps: bool = True, names: tuple[str, ...] = ()):
        self.takes_maps, self.characteristic_names = takes_maps, names
        self.scored: list[tuple[list[Any], list[Any]]] = []
        self.queries: list[list[Query]] = []
        self.frame = self

    def pixels(self, image: Image.Image) -> int:
        return int(image.getpixel((0, 0))[0])  # type: ignore[index]

    def map(self, classes: Any) -> int:
        return int(classes[0, 0])

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

    def _chat(self, turns: Sequence[tuple[str, str]]) -> list[str]:
        return [word for _, text in turns for word in text.split()]


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
    chosen = Serve(
        **bounds, batch_size=8, threads=1, timeout_s=60, drain_s=0, policy=ServePolicy(allowed=allowed or {})
    )
    served = Served("m", "7", "d" * 64)
    return assembled(served, predictor, chosen, ",".join(names), evaluated or Evaluated(), max_new_tokens)


def png(*color: int) -> bytes:
    """A PNG of one colour, or, of one number, a map of one class."""
    return encode(np.full((48, 32, 3) if len(color) > 1 else (48, 32), color, np.uint8), format="PNG")


def b64(data: bytes) -> dict[str, str]:
    """A picture as a request holds it."""
    return {"b64": base64.b64encode(data).decode()}


def data_url(data: bytes, kind: str = "png") -> str:
    """A picture as OpenAI's clients send it."""
    return f"data:image/{kind};base64,{b64(data)['b64']}"
