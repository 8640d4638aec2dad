"""A loaded model put together with the parts of its service and its doors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from facemllm import tasks
from facemllm.model.inference import Predictor
from facemllm.serve.asked.matching import Matcher
from facemllm.serve.asked.policy import Policy
from facemllm.serve.asked.quality import Coverage, measure, refuses
from facemllm.serve.doors import openai, routes, task_door
from facemllm.serve.engine.batches import Room
from facemllm.serve.engine.own import OwnEngine
from facemllm.serve.engine.protocol import Chat, Engine, Prepared
from facemllm.serve.evaluated import Evaluated
from facemllm.serve.guard.decoding import Decoder
from facemllm.serve.language import Limits
from facemllm.serve.predictor import FaceModel, known_tasks
from facemllm.serve.service import Served, Service
from facemllm.settings.serve import Serve

if TYPE_CHECKING:
    import numpy as np
    from fastapi import APIRouter
    from kserve.protocol.dataplane import DataPlane
    from numpy.typing import NDArray
    from PIL.Image import Image


@dataclass(frozen=True)
class PredictorTokens:
    """Counts tokens as a predictor's tokenizer makes them."""

    predictor: Predictor

    def asked(self, chat: Chat) -> int:
        """Tokens of a chat about a picture."""
        return len(self.predictor.chat(chat))

    def said(self, text: str) -> int:
        """Tokens of an answer, its end included."""
        return len(self.predictor.frame.answer(text))


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


def own_engine(predictor: Predictor, settings: Serve, max_new_tokens: int) -> OwnEngine:
    """The project's engine around a predictor, warmed up."""
    queue = settings.queue
    engine = OwnEngine(
        predictor,
        room=Room(
            queue.faces,
            queue.questions,
            queue.client_faces,
            batch=settings.batch_size,
            rows=queue.open_questions,
            window_s=queue.window_s,
        ),
        max_new_tokens=max_new_tokens,
        cache_mb=queue.cache_mb,
        threads=settings.threads,
    )
    engine.warm_up()
    return engine


def assembled(
    served: Served,
    predictor: Predictor,
    engine: Engine,
    settings: Serve,
    names: str,
    evaluated: Evaluated,
    max_new_tokens: int,
) -> Loaded:
    """The service of an engine, whose pictures a predictor prepares, and its doors. `names` are those of the tasks it answers, with commas; empty for all
    that are not sensitive. Raises UserError for an unknown one."""
    answered = [tasks.get(name) for name in known_tasks(names)]
    policy = Policy(settings.policy.allowed)
    others = [tasks.get(name) for name in tasks.all_names() if tasks.get(name) not in answered]
    guard, coverage = settings.guard, Coverage(**settings.quality.model_dump())

    def prepare(image: Image, classes_HW: NDArray[np.uint8] | None, key: tuple[str, ...]) -> Prepared:
        map_SS = None if classes_HW is None else predictor.map(classes_HW)
        return Prepared(predictor.pixels(image), map_SS, key, measure(image))

    service = Service(
        served,
        answered,
        # questions of tasks that may not be asked are known, to be refused
        matcher=Matcher([*answered, *(task for task in others if policy.refuses_task(task.name))]),
        policy=policy,
        decoder=Decoder(
            prepare, threads=guard.decode_threads, seconds=guard.decode_s, cache=int(guard.decode_cache_mb * 2**20)
        ),
        refuses_picture=lambda facts: refuses(facts, coverage),
        engine=engine,
        evaluated=evaluated,
        timeout_s=settings.timeout_s,
    )
    limits = Limits(settings.max_body_mb, settings.max_pixels, settings.max_question_chars, settings.max_instances)
    door = openai.ChatDoor(service, limits, PredictorTokens(predictor), max_new_tokens)
    return Loaded(FaceModel(service, limits), door, limits)
