"""The page of the model server around made-up answers, for tests: `python -m tests.serving_page PORT FOLDER`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from facemllm import tasks
from facemllm.serve.asked.policy import Policy
from facemllm.serve.guard.bodies import BodyLimit
from facemllm.serve.language import Answer, Answers, Ask, Limits, Question, Refused
from facemllm.serve.observability import routers
from facemllm.serve.observer import Observer, Watch
from facemllm.settings import load
from facemllm.tasks.base import Task

LIMITS = Limits(max_body_mb=2, max_pixels=1_000_000, max_question_chars=100, max_instances=16)
HOSTILE = "<script>alert('x')</script>"
INFO = {
    "model": "face-mllm",
    "version": "7",
    "digest": "5e" * 32,
    "authorized": {
        "approvals": [
            {"person": "Ada Lovelace", "role": "reviewer", "issued": "2026-11-29T08:00:00Z", "statement": "x"}
        ],
        "expires": "2027-02-27T08:00:00Z",
        "withdrawn": None,
    },
}


class Fake:
    """Answers by rote: every kind of answer has a question that brings it."""

    takes_maps = True

    @property
    def offered(self) -> Any:
        return self.tasks

    def __init__(self, names: Sequence[str] = ("expression", "age", "attributes", "gender")) -> None:
        self.tasks: dict[str, Task] = {name: tasks.get(name) for name in names}
        self.asked: list[Ask] = []
        self.policy = Policy(load("laptop").serve.policy.allowed)

    async def answer(self, asks: Sequence[Ask], *, client: str, deadline: float | None) -> list[Answers]:
        self.asked += asks
        if any("busy" in (question.text or "") for ask in asks for question in ask.questions):
            raise Refused(429, "the server is busy; try again in a moment", 3.0)
        return [Answers(tuple(map(self._one, ask.questions))) for ask in asks]

    def _one(self, question: Question) -> Answer:
        text = question.text or ""
        if "who" in text.lower():
            return Answer("refused", "", rule="identification", reason="nobody is named or recognised by this server")
        if "weather" in text:
            return Answer("untaught", "", reason="this model was not taught that")
        if "dark" in text:
            return Answer("abstained", "", rule="too_dark", reason="the picture is darker than any that was evaluated")
        if text:
            return Answer("free", f"a person, as {text} says")
        item = self.tasks[question.task or ""].item(question.item or "")
        options = item.options
        best = options[len(options) // 3]
        rest = 0.3 / (len(options) - 1)
        scores = {option.value: 0.7 if option is best else rest for option in options}
        return Answer("taught", best.text, best.value, scores, 0.7, question.task, question.item)


def application(folder: Path | None, service: Fake | None = None, observer: Observer | None = None) -> FastAPI:
    """The page alone; corrections go to `folder`."""
    overrides = [f"serve.feedback.folder={folder}"] if folder else []

    def refuses(task: str) -> str | None:
        return "only with a written reason" if task == "gender" else None

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    made: Any = service or Fake()
    for router in routers(
        made, LIMITS, lambda: INFO, load("laptop", overrides).serve, refuses, lambda request, key: "me"
    ):
        app.include_router(router)
    app.add_middleware(BodyLimit, max_bytes=int(LIMITS.max_body_mb * 2**20), budget=2**28)
    app.add_middleware(Watch, observer=observer or Observer())

    @app.exception_handler(Refused)
    async def _refused(_: Any, error: Refused) -> Any:
        from fastapi.responses import JSONResponse

        return JSONResponse({"error": error.reason}, status_code=error.status)

    return app


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(application(Path(sys.argv[2])), host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
