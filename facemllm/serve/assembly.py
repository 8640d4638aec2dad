"""A loaded model put together with the parts of its service and its doors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from facemllm import tasks
from facemllm.model.inference import Predictor
from facemllm.serve.doors import openai, routes, task_door
from facemllm.serve.evaluated import Evaluated
from facemllm.serve.guard.decoding import Decoder
from facemllm.serve.language import Limits
from facemllm.serve.plain import PlainEngine, PredictorTokens, Prepared, Reasons, Wordings
from facemllm.serve.predictor import FaceModel, known_tasks
from facemllm.serve.service import Served, Service
from facemllm.settings.operations import Guard, Serve

if TYPE_CHECKING:
    from fastapi import APIRouter
    from kserve.protocol.dataplane import DataPlane


@dataclass(frozen=True)
class Loaded:
    """What a server serves: the KServe model, and the doors beside KServe's own."""

    model: FaceModel
    chat: openai.ChatDoor
    limits: Limits

    @property
    def service(self) -> Service:
        """Who answers."""
        return self.model.service

    def routers(self, plane: DataPlane, info: Callable[[], dict[str, Any]]) -> list[APIRouter]:
        """The routes of all doors; `info` is what GET /info gives."""
        own = routes.router(plane, info, self.chat.model())
        return [openai.router(self.chat), task_door.router(self.service, self.limits), own]


def decoder(predictor: Predictor, guard: Guard) -> Decoder[Prepared]:
    """Makes of pictures what a predictor looks at."""

    def prepare(image: Image.Image, classes: NDArray[np.uint8] | None, key: tuple[str, ...]) -> Prepared:
        return Prepared(predictor.pixels(image), None if classes is None else predictor.map(classes), {})

    return Decoder(
        prepare,
        threads=guard.decode_threads,
        seconds=guard.decode_s,
        cache=int(guard.decode_cache_mb * 2**20),
    )


def assembled(
    served: Served,
    predictor: Predictor,
    settings: Serve,
    names: str,
    evaluated: Evaluated,
    max_new_tokens: int,
) -> Loaded:
    """The service of a predictor, and its doors. `names` are those of the tasks it answers, with commas; empty for all
    that are not sensitive. Raises UserError for an unknown one."""
    answered = [tasks.get(name) for name in known_tasks(names)]
    policy = Reasons({task: why for task, why in settings.policy.allowed.items() if why})
    others = [tasks.get(name) for name in tasks.all_names() if tasks.get(name) not in answered]
    service = Service(
        served,
        answered,
        # questions of tasks that may not be asked are known, to be refused
        matcher=Wordings([*answered, *(task for task in others if policy.refuses_task(task.name))]),
        policy=policy,
        decoder=decoder(predictor, settings.guard),
        refuses_picture=lambda facts: None,
        engine=PlainEngine(predictor, settings.batch_size, max_new_tokens),
        evaluated=evaluated,
        timeout_s=settings.timeout_s,
    )
    limits = Limits(settings.max_body_mb, settings.max_pixels, settings.max_question_chars, settings.max_instances)
    door = openai.ChatDoor(service, limits, PredictorTokens(predictor), max_new_tokens)
    return Loaded(FaceModel(service, limits), door, limits)
