"""A loaded model put together with the parts of its service and its doors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facemllm import tasks
from facemllm.model.inference import Predictor
from facemllm.serve import seen
from facemllm.serve.caller import CALLER
from facemllm.serve.doors import openai, routes, task_door
from facemllm.serve.evaluated import Evaluated
from facemllm.serve.language import Limits
from facemllm.serve.plain import PlainDecoder, PlainEngine, PredictorTokens, Reasons, Wordings
from facemllm.serve.predictor import FaceModel, known_tasks
from facemllm.serve.service import Served, Service
from facemllm.settings.operations import Serve

if TYPE_CHECKING:
    from fastapi import APIRouter
    from kserve.protocol.dataplane import DataPlane


RULES = ("sensitive",)


@dataclass(frozen=True)
class Loaded:
    """What a server serves: the KServe model, and the doors beside KServe's own."""

    model: FaceModel
    chat: openai.ChatDoor
    limits: Limits
    settings: Serve

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

        shown = seen.routers(
            self.service, self.limits, info, self.settings, refuses, lambda request, key: CALLER.get().client
        )
        return [*shown, openai.router(self.chat), task_door.router(self.service, self.limits), own]


def assembled(
    served: Served,
    predictor: Predictor,
    settings: Serve,
    names: str,
    evaluated: Evaluated,
    max_new_tokens: int,
    kept: Path,
) -> Loaded:
    """The service of a predictor, and its doors. `names` are those of the tasks it answers, with commas; empty for all
    that are not sensitive. Raises UserError for an unknown one."""
    about = {"name": served.name, "version": served.version or "", "digest": served.digest}
    answered = [tasks.get(name) for name in known_tasks(names)]
    policy = Reasons({task: why for task, why in settings.policy.allowed.items() if why})
    others = [tasks.get(name) for name in tasks.all_names() if tasks.get(name) not in answered]
    service = Service(
        served,
        answered,
        # questions of tasks that may not be asked are known, to be refused
        matcher=Wordings([*answered, *(task for task in others if policy.refuses_task(task.name))]),
        policy=policy,
        decoder=PlainDecoder(predictor),
        refuses_picture=lambda facts: None,
        engine=PlainEngine(predictor, settings.batch_size, max_new_tokens),
        evaluated=evaluated,
        timeout_s=settings.timeout_s,
        observer=seen.observer(about, [task.name for task in answered], RULES, settings, kept),
    )
    limits = Limits(settings.max_body_mb, settings.max_pixels, settings.max_question_chars, settings.max_instances)
    door = openai.ChatDoor(service, limits, PredictorTokens(predictor), max_new_tokens)
    return Loaded(FaceModel(service, limits), door, limits, settings)
