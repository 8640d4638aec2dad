"""The KServe model: from a checked request to answers, by the same rules as evaluation.

A question that is one of a task's own wordings (whatever its case, spaces and closing mark), or that is named by task
and item, is answered as evaluation answers it: a closed one by the likelihood of its options, a caption by generating
it and reading what it says. Any other question is answered in free text, without value or scores.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kserve import InferRequest, Model

from facemllm import tasks
from facemllm.model.inference import Query, Scored
from facemllm.serving.batching import Batcher
from facemllm.serving.policy import Ask, Encoded, Limits, Refused, decode, read_request
from facemllm.tasks.answers import answer
from facemllm.tasks.held_out import ZERO_SHOT

log = logging.getLogger("facemllm.serving")
MAX_WAITING = 256


class Answering(Protocol):
    """What is needed of a predictor; `facemllm.model.inference.Predictor` is one."""

    def pixels(self, image: Any) -> Any:
        """The image as the model sees it."""

    def score(self, images: Sequence[Any], questions: Sequence[Sequence[Query]]) -> list[list[Scored]]:
        """Probabilities of every option of every question of each image."""

    def generate(self, image: Any, question: str | Sequence[Mapping[str, Any]], max_new_tokens: int) -> str:
        """Free answer to a question or a chat."""

    def generate_batch(self, images: Sequence[Any], questions: Sequence[str], max_new_tokens: int) -> list[str]:
        """Free answers, one question an image."""


@dataclass(frozen=True)
class Work:
    """One question to answer. `known` is the task's question it stands for, `chat` the turns before and with it."""

    image: Encoded
    text: str
    known: tasks.Question | None
    chat: tuple[tuple[str, str], ...] = ()


class FaceModel(Model):
    """Answers `:predict` requests. `names` are the tasks whose questions it knows."""

    def __init__(
        self,
        name: str,
        predictor: Answering,
        *,
        names: Sequence[str],
        limits: Limits,
        batch_size: int,
        max_new_tokens: int,
    ) -> None:
        super().__init__(name)
        self._predictor, self._limits, self._max_new_tokens = predictor, limits, max_new_tokens
        self._tasks = {task.name: task for task in map(tasks.get, names)}
        self._wordings: dict[str, tuple[tasks.Question, str]] = {}
        for task in self._tasks.values():
            for item in task.items:
                for text in (*item.templates, *item.unseen):  # where two tasks ask alike, the one named first answers
                    self._wordings.setdefault(_plain(text), (task.question(item.name), text))
        self._batcher = Batcher(self._answer, size=batch_size, max_waiting=MAX_WAITING)

    def load(self) -> bool:
        """The predictor was loaded before; nothing is left to do."""
        self.ready = True
        return True

    def stop(self) -> None:
        """Answer no more."""
        self.ready = False

    async def predict(self, payload: Any, headers: Any = None, response_headers: Any = None) -> dict[str, Any]:
        """Answer every instance of a request. Raises Refused."""
        started = time.perf_counter()
        works = await asyncio.to_thread(self._read, payload)
        results = await self._batcher.submit(works)
        images = sorted({work.image.digest[:12] for work in works})
        milliseconds = 1000 * (time.perf_counter() - started)
        log.info("answered %d questions about %s in %.0f ms", len(works), " ".join(images), milliseconds)
        return {"predictions": results}

    def _read(self, payload: Any) -> list[Work]:
        if isinstance(payload, InferRequest):
            raise Refused(422, f"use /v1/models/{self.name}:predict; the v2 protocol's infer is not offered")
        if isinstance(payload, bytes | str):  # curl without a content type says it is a form
            try:
                payload = json.loads(payload)
            except (ValueError, RecursionError):
                raise Refused(400, "the body is not valid JSON") from None
        return [self._work(ask, f"instances[{n}]") for n, ask in enumerate(read_request(payload, self._limits))]

    def _work(self, ask: Ask, where: str) -> Work:
        if ask.question is not None:
            known, text = self._wordings.get(_plain(ask.question), (None, ask.question))
            return Work(ask.image, text, known)
        if ask.chat:
            return Work(ask.image, ask.chat[-1][1], None, ask.chat)
        task = self._tasks.get(ask.task or "")
        if task is None:
            raise Refused(422, f"{where}.task: unknown; known are {', '.join(self._tasks)}")
        questions = {question.item: question for question in task.questions()}
        item = ask.item or (next(iter(questions)) if len(questions) == 1 else "")
        if item not in questions:
            raise Refused(422, f"{where}.item: one of {', '.join(questions)} is needed for {task.name}")
        return Work(ask.image, questions[item].templates[0], questions[item])

    def _answer(self, works: Sequence[Work]) -> list[dict[str, Any] | Exception]:
        """Answer a batch; in the model's thread. Each image is decoded once, one at a time, and shrunk at once."""
        pixels: dict[str, Any] = {}
        for work in works:
            if work.image.digest not in pixels:
                try:
                    pixels[work.image.digest] = self._predictor.pixels(decode(work.image))
                except Refused as refusal:
                    pixels[work.image.digest] = refusal
        results: list[dict[str, Any] | Exception] = [{} for _ in works]
        closed: dict[str, list[int]] = {}
        open_: list[int] = []
        for n, work in enumerate(works):
            seen = pixels[work.image.digest]
            if isinstance(seen, Refused):
                results[n] = seen
            elif work.known and work.known.options:
                closed.setdefault(work.image.digest, []).append(n)
            elif len(work.chat) > 1:
                turns = [{"role": role, "content": text} for role, text in work.chat]
                results[n] = self._free(work, self._predictor.generate(seen, turns, self._max_new_tokens))
            else:
                open_.append(n)
        if closed:
            queries = [[_query(works[n]) for n in group] for group in closed.values()]
            scored = self._predictor.score([pixels[digest] for digest in closed], queries)
            for group, answers in zip(closed.values(), scored, strict=True):
                for n, one in zip(group, answers, strict=True):
                    results[n] = _closed(works[n], one)
        if open_:
            images, questions = [pixels[works[n].image.digest] for n in open_], [works[n].text for n in open_]
            texts = self._predictor.generate_batch(images, questions, self._max_new_tokens)
            for n, text in zip(open_, texts, strict=True):
                results[n] = self._free(works[n], text)
        return results

    def _free(self, work: Work, text: str) -> dict[str, Any]:
        if work.known is None:
            return {"answer": text, "value": None, "scores": None, "task": None, "item": None}
        value = self._tasks[work.known.task].parse(work.known.item, text)
        return {"answer": text, "value": value, "scores": None, "task": work.known.task, "item": work.known.item}


def known_tasks(text: str) -> list[str]:
    """Task names of a comma-separated list; if it is empty, all that are not sensitive. Raises UserError for an unknown
    one."""
    every = [name for name in tasks.all_names() if name != ZERO_SHOT and not tasks.get(name).sensitive]
    return [tasks.get(name).name for name in [name for name in text.split(",") if name] or every]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(" ?.!")


def _query(work: Work) -> Query:
    assert work.known is not None
    return Query(work.text, tuple(option.text for option in work.known.options))


def _closed(work: Work, scored: Scored) -> dict[str, Any]:
    assert work.known is not None
    said = answer(work.known, scored.probabilities, scored.greedy)
    return {
        "answer": said.text,
        "value": said.value,
        "scores": said.scores,
        "task": work.known.task,
        "item": work.known.item,
    }
