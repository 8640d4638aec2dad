"""The KServe model: from a checked request to answers, by the same rules as evaluation, many requests in one batch.

A question that is one of a task's wordings (whatever its case, spaces, marks and spelling, British or American), or
that is named by task and item, is answered as evaluation answers it: a closed one by the likelihood of its options, an
open one by generating the answer and reading what it says. Any other question is answered in free text, without value
or scores.

An instance may bring a map of the face's parts, to a model with a segmentation branch, and ask for the scores of the
face's characteristics, of one with a knowledge branch; only those that a task of this deployment asks for are given.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kserve import InferRequest, Model

from facemllm import tasks
from facemllm.model.inference import Predictor, Query, Scored
from facemllm.serve.doors.instances import Ask, read_request
from facemllm.serve.engine.batches import Job, Room, Scheduler
from facemllm.serve.guard.images import decode, decode_map
from facemllm.serve.language import Limits, Refused
from facemllm.tasks import ZERO_SHOT
from facemllm.tasks.answers import answer
from facemllm.tasks.characteristics import characteristic
from facemllm.tasks.paraphrases import normal

log = logging.getLogger("facemllm.serve")


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


_Face = tuple[Any, Any]
"""A face as the model sees it: pixels, and its map or None."""


class FaceModel(Model):
    """Answers `:predict` requests. `names` are the tasks whose questions it knows."""

    def __init__(
        self,
        name: str,
        predictor: Predictor,
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
                for text in item.wordings:  # where two tasks ask alike, the one named first answers
                    self._wordings.setdefault(normal(text), (task.question(item.name), text))
        self.takes_maps = predictor.takes_maps
        asked = _asked_for(self._tasks.values())
        self.characteristic_names = tuple(name for name in predictor.characteristic_names if name in asked)
        self._batches: Scheduler[list[Work], list[dict[str, Any]]] = Scheduler(
            self, Room(batch=batch_size, client_faces=256)
        )

    async def predict(self, payload: Any, headers: Any = None, response_headers: Any = None) -> dict[str, Any]:
        """Answer every instance of a request. Raises Refused."""
        started = time.perf_counter()
        works = await asyncio.to_thread(self._read, payload)
        results = await self._batches.submit(works, cost=len(works))
        images = sorted({work.ask.image.digest[:12] for work in works})
        milliseconds = 1000 * (time.perf_counter() - started)
        log.info("answered %d questions about %s in %.0f ms", len(works), " ".join(images), milliseconds)
        return {"predictions": results}

    def step(self, new: Sequence[Job[list[Work], list[dict[str, Any]]]]) -> None:
        """Answer a batch of requests; in the model's thread."""
        results = iter(self._answer([work for job in new for work in job.work]))
        for job in new:
            own = [next(results) for _ in job.work]
            error = next((one for one in own if isinstance(one, Exception)), None)
            if error is not None:
                job.fail(error)
            else:
                job.finish([one for one in own if not isinstance(one, Exception)])

    def reset(self) -> None:
        """Nothing is begun that is not ended."""

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
            known, text = self._wordings.get(normal(ask.question), (None, ask.question))
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
                    faces[work.face] = self._prepared(work.ask)
                except Refused as refusal:
                    faces[work.face] = refusal
        results: list[dict[str, Any] | Exception] = [{} for _ in works]
        scored: dict[tuple[str, str], list[int]] = {}  # closed questions, none where scores alone are asked
        open_: list[int] = []
        for n, work in enumerate(works):
            if isinstance(face := faces[work.face], Refused):
                results[n] = face
                continue
            if work.ask.characteristics:
                scored.setdefault(work.face, [])
            if work.known and work.known.options:
                scored.setdefault(work.face, []).append(n)
            elif len(work.ask.chat) > 1:
                turns = [{"role": role, "content": text} for role, text in work.ask.chat]
                text = self._predictor.generate(face[0], turns, self._max_new_tokens, [face[1]])
                results[n] = self._free(work, text)
            else:
                open_.append(n)
        if open_:
            images, maps = _columns(faces, [works[n].face for n in open_])
            asked = [works[n].text for n in open_]
            texts = self._predictor.generate_batch(images, asked, self._max_new_tokens, maps)
            for n, text in zip(open_, texts, strict=True):
                results[n] = self._free(works[n], text)
        if scored:
            images, maps = _columns(faces, scored)
            queries = [[_query(works[n]) for n in group] for group in scored.values()]
            found = dict(zip(scored, self._predictor.score_faces(images, queries, maps), strict=True))
            for key, group in scored.items():
                for n, one in zip(group, found[key].answers, strict=True):
                    results[n] = _closed(works[n], one)
            for work, result in zip(works, results, strict=True):
                if work.ask.characteristics and isinstance(result, dict):
                    known = found[work.face].characteristics
                    result["characteristics"] = {name: known[name] for name in self.characteristic_names}
        return results

    def _prepared(self, ask: Ask) -> _Face:
        image = decode(ask.image)
        classes_HW = decode_map(ask.map, image) if ask.map is not None else None
        return self._predictor.pixels(image), None if classes_HW is None else self._predictor.map(classes_HW)

    def _free(self, work: Work, text: str) -> dict[str, Any]:
        known = work.known
        value = self._tasks[known.task].item(known.item).parse(text) if known else None
        return _reply(known, text, value, None)


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
    faces: Mapping[tuple[str, str], _Face | Refused], chosen: Iterable[tuple[str, str]]
) -> tuple[list[Any], list[Any]]:
    """Pixels and maps of some faces, none of which was refused."""
    whole = [face for key in chosen if not isinstance(face := faces[key], Refused)]
    return [pixels for pixels, _ in whole], [map_ for _, map_ in whole]


def _query(work: Work) -> Query:
    assert work.known is not None
    return Query(work.text, tuple(option.text for option in work.known.options))


def _closed(work: Work, scored: Scored) -> dict[str, Any]:
    assert work.known is not None
    found = answer(work.known, scored.probabilities, scored.greedy)
    return _reply(work.known, found.text, found.value, found.scores)


def _reply(known: tasks.Question | None, text: str, value: Any, scores: Any) -> dict[str, Any]:
    about = {"task": known.task if known else None, "item": known.item if known else None}
    return {"answer": text, "value": value, "scores": scores, **about}
