"""The KServe model: its V1 and V2 requests, handed to the service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kserve import InferRequest, InferResponse, Model

from facemllm import tasks
from facemllm.serve.caller import CALLER
from facemllm.serve.doors import infer, instances
from facemllm.serve.doors.reading import read_json
from facemllm.serve.language import Limits
from facemllm.serve.service import Service
from facemllm.tasks import ZERO_SHOT


class FaceModel(Model):
    """Answers `:predict` and `infer`. It is ready as long as `ready` says so: KServe's own hooks that load a model, or
    declare it ready, change nothing."""

    def __init__(self, service: Service, limits: Limits) -> None:
        super().__init__(service.model.name)
        self.service, self._limits = service, limits
        self.ready = True

    def load(self) -> bool:
        """Whether it is ready: it was loaded before it was made."""
        return bool(self.ready)

    def start(self) -> None:
        """Nothing: KServe's would declare it ready."""

    async def predict(
        self, payload: Any, headers: Any = None, response_headers: Any = None
    ) -> dict[str, Any] | InferResponse:
        """Answer every question of a request. Raises Refused."""
        caller = CALLER.get()
        if isinstance(payload, InferRequest):
            asks = infer.read_request(payload, self._limits)
            answers = await self.service.answer(asks, client=caller.client, deadline=caller.deadline)
            return infer.write_answers(payload, self.service.model, answers)
        if isinstance(payload, bytes | str):  # curl without a content type says it is a form
            payload = read_json(payload if isinstance(payload, bytes) else payload.encode())
        asks = instances.read_request(payload, self._limits)
        answers = await self.service.answer(asks, client=caller.client, deadline=caller.deadline)
        return instances.write_answers(answers)

    def get_input_types(self) -> list[dict[str, Any]]:
        """The tensors that V2 infer needs."""
        return infer.INPUTS

    def get_output_types(self) -> list[dict[str, Any]]:
        """The tensors that V2 infer gives."""
        return infer.OUTPUTS


def taught_tasks(model: Path) -> str:
    """Names, with commas, of the tasks that a model directory was trained on, as its lineage.json says; empty where it
    says nothing, as that of a model from elsewhere."""
    try:
        return ",".join(json.loads((model / "lineage.json").read_text("utf-8"))["settings"]["tasks"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def known_tasks(text: str) -> list[str]:
    """Task names of a comma-separated list; if it is empty, all that are not sensitive. Raises UserError for an unknown
    one."""
    every = [name for name in tasks.all_names() if name != ZERO_SHOT and not tasks.get(name).sensitive]
    return [tasks.get(name).name for name in [name for name in text.split(",") if name] or every]
