"""OpenAI's chat completions, at `/openai/v1` and `/v1`: text or an object of a JSON schema, whole or as events.

A refusal by policy is the message's `refusal`. `logprobs` are those of an item's options, each taken as one token; what
is written freely has none. Beside what OpenAI's format has, `perception` tells of every answer what the other doors do.
"""

from __future__ import annotations

import json
import math
import re
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from facemllm import tasks
from facemllm.serve.asked.disguises import apart
from facemllm.serve.asked.policy import Refusal
from facemllm.serve.caller import CALLER
from facemllm.serve.doors.chat import ChatRequest, read_chat
from facemllm.serve.doors.errors import INTERNAL, log, openai_error, place
from facemllm.serve.doors.instances import write_answer
from facemllm.serve.doors.reading import read_json
from facemllm.serve.doors.schemas import write_object
from facemllm.serve.language import Answer, Answers, Limits, Refused
from facemllm.serve.planning import unrefused
from facemllm.serve.service import Service

if TYPE_CHECKING:
    from facemllm.model.reader import Reader

_NO_PROBABILITY = 1e-30
_WORDS = re.compile(r"\s*\S+|\s+$")


class ChatDoor:
    """Answers chat completions. `reader` counts tokens, `longest` is the most that the model writes."""

    def __init__(self, service: Service, limits: Limits, reader: Reader, longest: int) -> None:
        self._service, self._limits, self._reader, self._longest = service, limits, reader, longest
        self._started = int(time.time())

    def models(self) -> dict[str, Any]:
        """The list of models; `models` is how KServe's V1 protocol lists them."""
        return {"object": "list", "data": [self.model()], "models": [self._service.model.name]}

    def model(self) -> dict[str, Any]:
        """The model."""
        return {
            "id": self._service.model.name,
            "object": "model",
            "created": self._started,
            "owned_by": "facemllm",
        }

    def read(self, body: bytes) -> ChatRequest:
        """The request in a body. Raises Refused."""
        return read_chat(read_json(body), self._service.model.name, self._service.tasks, self._limits)

    async def answer(self, chat: ChatRequest) -> dict[str, Any]:
        """A completion. Raises Refused."""
        content, found, cut = "", tuple[Answer, ...](), False
        async for piece, answers, ended in self._pieces(chat):
            content, found, cut = content + piece, answers, ended
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if refusal := self._refusal(chat, found):
            message |= {"content": None, "refusal": refusal}
        choice = {"index": 0, "message": message, "logprobs": _logprobs(chat, found), "finish_reason": _finish(cut)}
        about = {"usage": self._usage(chat, content or refusal), "perception": [write_answer(one) for one in found]}
        return {**self._head("chat.completion"), "choices": [choice], **about}

    async def events(self, chat: ChatRequest) -> AsyncIterator[str]:
        """A completion as server-sent events. Raises Refused before the first; later it is an event."""
        head, content, found, cut = self._head("chat.completion.chunk"), "", tuple[Answer, ...](), False

        def event(delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
            choice = {"index": 0, "delta": delta, "logprobs": more.pop("logprobs", None), "finish_reason": finish}
            return _event({**head, "choices": [choice], **({"usage": None} if chat.usage else {}), **more})

        begun, piece = False, ""
        try:
            async for piece, answers, ended in self._pieces(chat):
                if not begun:
                    begun = True
                    yield event({"role": "assistant", "content": ""})
                content, found, cut = content + piece, answers, ended
                if piece and not found:
                    yield event({"content": piece})
            refusal, logprobs = self._refusal(chat, found), _logprobs(chat, found)
            if refusal:
                yield event({"refusal": refusal})
            elif piece:
                yield event({"content": piece}, logprobs=logprobs)
            yield event({}, _finish(cut), perception=[write_answer(one) for one in found])
            if chat.usage:
                yield _event({**head, "choices": [], "usage": self._usage(chat, content or refusal)})
            yield "data: [DONE]\n\n"
        except Exception as error:  # the status is sent already: the client hears of it in the stream
            if not begun:
                raise
            line = (error.status, error.reason) if isinstance(error, Refused) else (500, INTERNAL)
            log.error("%s while streaming, %s", type(error).__name__, place(error))
            yield _event(openai_error(*line)[1])

    async def _pieces(self, chat: ChatRequest) -> AsyncIterator[tuple[str, tuple[Answer, ...], bool]]:
        """Pieces of the content; with the last, which may be empty, come the answers and whether it was cut short."""
        service, caller = self._service, CALLER.get()
        options = {"client": caller.client, "deadline": caller.deadline}
        started = time.perf_counter()
        if chat.properties:
            if refusal := self._broken(chat):
                refused = Answer("refused", refusal.reason, rule=refusal.rule, reason=refusal.reason)
                yield "", self._noted(chat, refused, started), False
                return
            (answers,) = await service.answer([chat.ask], **options)  # type: ignore[arg-type]
            yield write_object(chat.properties, answers.answers)[0], answers.answers, False
            return
        written = ""
        async for piece in service.stream(chat.ask, **options):  # type: ignore[arg-type]
            if isinstance(piece, Answer):
                cut = bool(written) and self._tokens(piece.text) > self._longest
                yield "" if written else _content(piece), (piece,), cut
                return
            for word in [piece] if chat.max_tokens is None else _WORDS.findall(piece):
                written += word
                yield word, (), False
                if chat.max_tokens is not None and self._tokens(written) > chat.max_tokens:
                    yield "", self._noted(chat, Answer("free", written.strip()), started), True
                    return

    def _noted(self, chat: ChatRequest, found: Answer, started: float) -> tuple[Answer, ...]:
        """An answer that the service did not see the end of, counted as all are."""
        self._service.observer.answered([chat.ask], [Answers((found,))], time.perf_counter() - started)
        return (found,)

    def _broken(self, chat: ChatRequest) -> Refusal | None:
        """The rule that a turn breaks, a title, or the name of a property; one that is an item has the item's name."""
        policy = self._service.policy
        named = [(apart(one.name), one.question.task is None) for one in chat.properties]
        turns = unrefused(chat.turns, policy)
        found = [policy.refuses_text(text) for _, text in turns]
        found += [policy.refuses(apart(title)) for title in chat.titles]
        found += [policy.refuses_property(name) if own else policy.refuses(name) for name, own in named]
        return next(filter(None, found), None)

    def _refusal(self, chat: ChatRequest, found: tuple[Answer, ...]) -> str | None:
        if chat.properties and not any(one.kind == "refused" and len(found) == 1 for one in found):
            return write_object(chat.properties, found)[1]
        return next((one.reason for one in found if one.kind == "refused"), None)

    def _head(self, kind: str) -> dict[str, Any]:
        model = self._service.model
        about = {"model": model.name, "system_fingerprint": model.digest, "service_tier": None}
        return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), **about}

    def _tokens(self, text: str) -> int:
        """Tokens of an answer, its end included."""
        return len(self._reader.frame.answer(text))

    def _usage(self, chat: ChatRequest, said: str | None) -> dict[str, int]:
        asked, written = len(self._reader.chat(chat.turns)), self._tokens(said or "")
        return {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written}


def router(door: ChatDoor) -> APIRouter:
    """The routes of the door."""
    routes = APIRouter(tags=["OpenAI"])

    async def complete(request: Request) -> Response:
        chat = door.read(await request.body())
        if not chat.stream:
            return JSONResponse(await door.answer(chat))
        events = door.events(chat)
        first = await anext(events)  # what is refused is refused with its status

        async def all_of_it() -> AsyncIterator[str]:
            yield first
            async for event in events:
                yield event

        return StreamingResponse(all_of_it(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    for prefix in ("/openai/v1", "/v1"):
        routes.add_api_route(f"{prefix}/chat/completions", complete, methods=["POST"], response_model=None)
        routes.add_api_route(f"{prefix}/models", door.models, methods=["GET"])
    routes.add_api_route("/openai/v1/models/{name}", _one_model(door), methods=["GET"])
    return routes


def _one_model(door: ChatDoor) -> Any:
    async def give(name: str) -> dict[str, Any]:
        if name != door.model()["id"]:
            raise Refused(404, "no such model; GET /openai/v1/models lists them")
        return door.model()

    return give


def _content(found: Answer) -> str:
    """What a client reads that knows nothing of `perception`: of an abstention why there is no answer, and not the
    option that came nearest."""
    return found.reason or found.text if found.kind == "abstained" else found.text


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _finish(cut: bool) -> str:
    return "length" if cut else "stop"


def _logprobs(chat: ChatRequest, found: tuple[Answer, ...]) -> dict[str, Any] | None:
    """The options of each closed answer by probability, each as one token; None where there is none."""
    if chat.logprobs is None or not any(one.scores for one in found):
        return None
    content = []
    for one in found:
        if one.scores:
            options = sorted(_options(one), key=lambda option: -option[1])
            said = next((p for text, p in options if text == one.text), options[0][1])
            top = [_token(text, p) for text, p in options[: chat.logprobs]]
            content.append({**_token(one.text, said), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _options(found: Answer) -> list[tuple[str, float]]:
    scores = found.scores or {}
    if found.task is None or found.item is None:
        return list(scores.items())
    words = {option.value: option.text for option in tasks.get(found.task).question(found.item).options}
    return [(words[value], p) for value, p in scores.items()]


def _token(text: str, probability: float) -> dict[str, Any]:
    return {"token": text, "logprob": math.log(max(probability, _NO_PROBABILITY)), "bytes": list(text.encode())}
