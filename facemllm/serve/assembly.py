"""A loaded model put together with the parts of its service and its doors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from facemllm import tasks
from facemllm.model.inference import Predictor
from facemllm.model.reader import Reader
from facemllm.serve import observability
from facemllm.serve.asked import quality
from facemllm.serve.asked.matching import Matcher
from facemllm.serve.asked.policy import Policy
from facemllm.serve.caller import CALLER
from facemllm.serve.doors import openai, routes, task_door
from facemllm.serve.engine.own import OwnEngine
from facemllm.serve.engine.pixels import pixels_of
from facemllm.serve.engine.protocol import Prepared
from facemllm.serve.engine.room import Room
from facemllm.serve.engine.vllm import VllmEngine
from facemllm.serve.evaluated import Evaluated
from facemllm.serve.guard.decoding import Decoder
from facemllm.serve.guard.keys import guarded_by
from facemllm.serve.language import Limits
from facemllm.serve.observer import Observer
from facemllm.serve.predictor import FaceModel, known_tasks
from facemllm.serve.service import Served, Service
from facemllm.settings.serve import Serve

if TYPE_CHECKING:
    from fastapi import APIRouter
    from kserve.protocol.dataplane import DataPlane
    from starlette.requests import Request


@dataclass(frozen=True)
class Loaded:
    """What a server serves: the KServe model, and the doors beside KServe's own."""

    model: FaceModel
    chat: openai.ChatDoor
    limits: Limits
    settings: Serve
    dtype: str

    @property
    def service(self) -> Service:
        """Who answers."""
        return self.model.service

    def routers(self, plane: DataPlane, info: Callable[[], dict[str, Any]]) -> list[APIRouter]:
        """The routes of all doors; `info` is what GET /info gives."""
        own = routes.router(plane, info, self.chat.model())

        def refuses(name: str) -> str | None:
            found = self.service.policy.refuses_task(name)
            return found.reason if found else None

        keys = guarded_by(self.settings.guard)

        def admit(request: Request, key: str) -> str:
            return keys.client(f"Bearer {key}") if keys else CALLER.get().client

        shown = observability.routers(self.service, self.limits, info, self.settings, refuses, admit, keys is not None)
        return [*shown, openai.router(self.chat), task_door.router(self.service, self.limits), own]


def loaded(service: Service, settings: Serve, reader: Reader, max_new_tokens: int, dtype: str = "float32") -> Loaded:
    """The doors of a service, whose model computes in `dtype`."""
    limits = Limits(settings.max_body_mb, settings.max_pixels, settings.max_question_chars, settings.max_instances)
    return Loaded(
        FaceModel(service, limits), openai.ChatDoor(service, limits, reader, max_new_tokens), limits, settings, dtype
    )


def engine_of(reader: Reader, settings: Serve, digest: str, max_new_tokens: int) -> OwnEngine | VllmEngine:
    """The engine that the settings name, ready to answer; `own` computes with a `Predictor`. Raises UserError."""
    queue, chosen = settings.queue, settings.engine
    room = Room(
        queue.faces,
        queue.questions,
        queue.client_faces,
        wait_s=queue.wait_s,
        batch=settings.batch_size,
        rows=queue.open_questions,
        window_s=queue.window_s,
    )
    if isinstance(reader, Predictor):
        own = OwnEngine(
            reader, room=room, max_new_tokens=max_new_tokens, cache_mb=queue.cache_mb, threads=settings.threads
        )
        own.make_ready()
        return own
    vllm = VllmEngine(
        reader,
        chosen.vllm_url,
        digest,
        room=room,
        max_new_tokens=max_new_tokens,
        cache_mb=queue.cache_mb,
        at_once=chosen.vllm_requests,
    )
    vllm.make_ready(chosen.vllm_wait_s)
    return vllm


def service_of(
    served: Served,
    predictor: Reader,
    settings: Serve,
    names: str,
    evaluated: Evaluated,
    max_new_tokens: int,
    observer: Observer,
) -> Service:
    """The service of a model, ready to answer. `predictor` is a `Predictor`, or a `Reader` where vLLM computes. `names`
    are those of the tasks it answers, with commas; empty for all that are not sensitive. Raises UserError for an
    unknown one, for a policy that is none, and for a model that the engine does not take."""
    answered = [tasks.get(name) for name in known_tasks(names)]
    policy = Policy(settings.policy.allowed)
    others = [task for task in map(tasks.get, tasks.all_names()) if task not in answered]
    engine = engine_of(predictor, settings, served.digest, max_new_tokens)
    if observer.metrics:
        observer.metrics.follow(engine.counters)

    pixels = pixels_of(predictor)

    def prepare(image: Image.Image, map_: NDArray[np.uint8] | None, key: tuple[str, ...]) -> Prepared:
        shown = predictor.map(map_) if map_ is not None and isinstance(predictor, Predictor) else None
        in_box = bool(key[-1])  # who sends a box says where the face is
        return Prepared(pixels(image), shown, key, quality.measure(image, None if in_box else find_faces))

    limits = settings.quality.model_dump()
    folder = limits.pop("detector")
    find_faces = quality.face_detector(Path(folder)) if folder else None
    guard = settings.guard
    cache = int(guard.decode_cache_mb * 2**20)
    return Service(
        served,
        answered,
        # questions of tasks that may not be asked are known, to be refused
        matcher=Matcher([*answered, *(task for task in others if policy.refuses_task(task.name))]),
        policy=policy,
        decoder=Decoder(prepare, threads=guard.decode_threads, seconds=guard.decode_s, cache=cache),
        refuses_picture=partial(quality.refuses, coverage=quality.Coverage(**limits)),
        engine=engine,
        evaluated=evaluated,
        observer=observer,
        timeout_s=settings.timeout_s,
    )
