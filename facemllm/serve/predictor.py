"""The KServe model: from a checked request to answers, by the same rules as evaluation.

A question that is one of a task's own wordings (whatever its case, spaces and closing mark), or that is named by task
and item, is answered as evaluation answers it: a closed one by the likelihood of its options, a caption by generating
it and reading what it says. Any other question is answered in free text, without value or scores.

An instance may bring a map of the face's parts, to a model with a segmentation branch, and ask for the scores of the
face's characteristics, of one with a knowledge branch; only those that a task of this deployment asks for are told.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kserve import InferRequest, Model

from facemllm import tasks
from facemllm.knowledge.graph import characteristic
from facemllm.model.inference import Query, Scored
from facemllm.serve.batching import Batcher
from facemllm.serve.policy import Ask, Limits, Refused, decode, decode_map, read_request
from facemllm.tasks import ZERO_SHOT
from facemllm.tasks.answers import answer

log = logging.getLogger("facemllm.serve")
MAX_WAITING = 256


class Answering(Protocol):
    """What is needed of a predictor; `facemllm.model.inference.Predictor` is one."""

    takes_maps: bool
    characteristic_names: tuple[str, ...]

    def pixels(self, image: Any) -> Any:
        """The image as the model sees it."""

    def map(self, source: Any) -> Any:
        """A map of face parts as the model sees it."""

    def score(self, images: Sequence[Any], questions: Sequence[Sequence[Query]], maps: Any) -> list[list[Scored]]:
        """Probabilities of every option of every question of each image."""

    def characteristics(self, images: Sequence[Any], maps: Any) -> list[dict[str, float]]:
        """Probability of every characteristic of each image, by name."""

    def generate(self, image: Any, question: str | Sequence[Mapping[str, Any]], max_new_tokens: int, maps: Any) -> str:
        """Free answer to a question or a chat."""

    def generate_batch(
        self, images: Sequence[Any], questions: Sequence[str], max_new_tokens: int, maps: Any
    ) -> list[str]:
        """Free answers, one question an image."""


@dataclass(frozen=True)
class Work:
    """One question to answer. `known` is the task's question it stands for, `ask` what the instance said."""

    ask: Ask
    text: str
    known: tasks.Question | None

    @property
    def face(self) -> tuple[str, str]:
        """What is looked at: digests of the image and of its map, empty without one."""
        return self.ask.image.digest, self.ask.map.digest if self.ask.map is not None else ""


@dataclass(frozen=True)
class _Face:
    """A face as the model sees it."""

    pixels: Any
    map: Any


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
        self.takes_maps = predictor.takes_maps
        self.characteristic_names = tuple(
            name for name in predictor.characteristic_names if name in _asked_for(self._tasks.values())
        )
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
        images = sorted({work.ask.image.digest[:12] for work in works})
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
        if ask.map is not None and not self.takes_maps:
            raise Refused(422, f"{where}.segmentation: this model looks at no map of face parts; leave it out")
        if ask.characteristics and not self.characteristic_names:
            raise Refused(422, f"{where}.characteristics: this deployment gives no scores of them; leave it out")
        if ask.question is not None:
            known, text = self._wordings.get(_plain(ask.question), (None, ask.question))
            return Work(ask, text, known)
        if ask.chat:
            return Work(ask, ask.chat[-1][1], None)
        task = self._tasks.get(ask.task or "")
        if task is None:
            raise Refused(422, f"{where}.task: unknown; known are {', '.join(self._tasks)}")
        questions = {question.item: question for question in task.questions()}
        item = ask.item or (next(iter(questions)) if len(questions) == 1 else "")
        if item not in questions:
            raise Refused(422, f"{where}.item: one of {', '.join(questions)} is needed for {task.name}")
        return Work(ask, questions[item].templates[0], questions[item])

    def _answer(self, works: Sequence[Work]) -> list[dict[str, Any] | Exception]:
        """Answer a batch; in the model's thread. Each face is decoded once, one at a time, and shrunk at once."""
        faces: dict[tuple[str, str], _Face | Refused] = {}
        for work in works:
            if work.face not in faces:
                try:
                    faces[work.face] = self._seen(work.ask)
                except Refused as refusal:
                    faces[work.face] = refusal
        results: list[dict[str, Any] | Exception] = [{} for _ in works]
        closed: dict[tuple[str, str], list[int]] = {}
        open_: list[int] = []
        for n, work in enumerate(works):
            seen = faces[work.face]
            if isinstance(seen, Refused):
                results[n] = seen
            elif work.known and work.known.options:
                closed.setdefault(work.face, []).append(n)
            elif len(work.ask.chat) > 1:
                turns = [{"role": role, "content": text} for role, text in work.ask.chat]
                said = self._predictor.generate(seen.pixels, turns, self._max_new_tokens, [seen.map])
                results[n] = self._free(work, said)
            else:
                open_.append(n)
        if closed:
            queries = [[_query(works[n]) for n in group] for group in closed.values()]
            scored = self._predictor.score(*_columns(faces, closed, queries))
            for group, answers in zip(closed.values(), scored, strict=True):
                for n, one in zip(group, answers, strict=True):
                    results[n] = _closed(works[n], one)
        if open_:
            images, questions, maps = _columns(faces, [works[n].face for n in open_], [works[n].text for n in open_])
            texts = self._predictor.generate_batch(images, questions, self._max_new_tokens, maps)
            for n, text in zip(open_, texts, strict=True):
                results[n] = self._free(works[n], text)
        self._add_characteristics(works, faces, results)
        return results

    def _seen(self, ask: Ask) -> _Face:
        image = decode(ask.image)
        classes_HW = decode_map(ask.map, image) if ask.map is not None else None
        return _Face(self._predictor.pixels(image), None if classes_HW is None else self._predictor.map(classes_HW))

    def _add_characteristics(
        self, works: Sequence[Work], faces: Mapping[tuple[str, str], _Face | Refused], results: Sequence[Any]
    ) -> None:
        """Put the scores that this deployment may tell beside the answers that were asked for them."""
        asked = dict.fromkeys(
            work.face
            for work, result in zip(works, results, strict=True)
            if work.ask.characteristics and isinstance(result, dict)
        )
        if not asked:
            return
        images, _, maps = _columns(faces, asked, ())
        found = dict(zip(asked, self._predictor.characteristics(images, maps), strict=True))
        for work, result in zip(works, results, strict=True):
            if work.ask.characteristics and isinstance(result, dict):
                scores = found[work.face]
                result["characteristics"] = {name: scores[name] for name in self.characteristic_names}

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


def _asked_for(known: Iterable[tasks.Task]) -> set[str]:
    """Names of the characteristics that the closed questions of tasks are about."""
    return {
        characteristic(item, value)
        for task in known
        for item in task.items
        if item.form in ("boolean", "choice")
        for value in (["yes"] if item.form == "boolean" else [option.value for option in item.options])
    }


def _columns(
    faces: Mapping[tuple[str, str], _Face | Refused], chosen: Iterable[tuple[str, str]], asked: Any
) -> tuple[list[Any], Any, list[Any]]:
    """Pixels, what is asked, and maps of some faces, none of which was refused."""
    seen = [face for key in chosen if isinstance(face := faces[key], _Face)]
    return [face.pixels for face in seen], asked, [face.map for face in seen]


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
