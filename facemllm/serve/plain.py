"""The plainest parts of a service: questions known by their wordings, pictures decoded as they come, one queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from facemllm import tasks
from facemllm.model.inference import Predictor, Query, Scored
from facemllm.serve.engine.batches import MAX_WAITING, Batcher
from facemllm.serve.guard.images import decode, decode_map
from facemllm.serve.language import Encoded
from facemllm.serve.parts import Chat
from facemllm.tasks.paraphrases import normal


@dataclass(frozen=True)
class Prepared:
    """A face as the model sees it: pixels and map."""

    pixels: Any
    map: Any
    facts: Mapping[str, float]


@dataclass(frozen=True)
class Found:
    """What the model found of a face."""

    scored: tuple[Scored, ...] = ()
    texts: tuple[str, ...] = ()
    characteristics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Known:
    """A question known by its wording."""

    question: tasks.Question
    wording: str

    def reply(self, item: tasks.base.Item, value: str, text: str) -> str:
        """The answer's own words."""
        return text


@dataclass(frozen=True)
class NotAllowed:
    """Why a task is not asked."""

    rule: str
    reason: str


class Wordings:
    """Knows a question by its wording, whatever its case, spaces, marks and spelling; any other is free."""

    def __init__(self, known: Sequence[tasks.Task]) -> None:
        self._wordings: dict[str, Known] = {}
        for task in known:
            for item in task.items:
                for text in item.wordings:  # where two tasks ask alike, the one named first answers
                    self._wordings.setdefault(normal(text), Known(task.question(item.name), text))

    def match(self, text: str) -> Known | None:
        """The item that has this wording."""
        return self._wordings.get(normal(text))

    def suggestions(self, text: str, count: int = 3) -> list[str]:
        """The first questions."""
        return [one.wording for one in list(self._wordings.values())[:count]]

    def about_faces(self, text: str) -> bool:
        """Any question is."""
        return True


class Reasons:
    """Sensitive tasks need a reason."""

    def __init__(self, allowed: Mapping[str, str]) -> None:
        self._allowed = allowed

    def refuses(self, text: str) -> NotAllowed | None:
        """No text is refused."""
        return None

    def refuses_task(self, task: str) -> NotAllowed | None:
        """A sensitive task without a reason is."""
        if tasks.get(task).sensitive and task not in self._allowed:
            return NotAllowed("sensitive", f"{task} is sensitive, and this deployment gives no reason to ask for it")
        return None

    def describe(self) -> dict[str, Any]:
        """Reasons by task."""
        return {"allowed": dict(self._allowed)}


class PlainDecoder:
    """Decodes in a thread of the event loop's."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    async def prepared(self, image: Encoded, map: Encoded | None, box: tuple[float, ...] | None) -> Prepared:
        """The face of a picture."""
        return await asyncio.to_thread(self._prepared, image, map, box)

    def _prepared(self, image: Encoded, map: Encoded | None, box: tuple[float, ...] | None) -> Prepared:
        picture = decode(image)
        classes_HW = decode_map(map, picture) if map is not None else None
        if box is not None:
            picture = picture.crop([round(side) for side in box])  # type: ignore[arg-type]
        return Prepared(
            self._predictor.pixels(picture), None if classes_HW is None else self._predictor.map(classes_HW), {}
        )


@dataclass(frozen=True)
class _Work:
    face: Prepared
    closed: Sequence[Query]
    open_: Sequence[Chat]
    characteristics: bool


class PlainEngine:
    """One queue in front of the predictor, in a thread of its own."""

    def __init__(self, predictor: Predictor, batch_size: int, max_new_tokens: int) -> None:
        self._predictor, self._max_new_tokens = predictor, max_new_tokens
        self.takes_maps: bool = predictor.takes_maps
        self.characteristic_names: tuple[str, ...] = predictor.characteristic_names
        self._batcher = Batcher(self._answer, size=batch_size, max_waiting=MAX_WAITING)

    async def answer(
        self,
        face: Prepared,
        closed: Sequence[Query],
        open_: Sequence[Chat],
        *,
        characteristics: bool,
        client: str,
        deadline: float,
    ) -> Found:
        """Answer questions about a face."""
        (found,) = await self._batcher.submit([_Work(face, closed, open_, characteristics)])
        return found

    async def stream(self, face: Prepared, chat: Chat, *, client: str, deadline: float) -> AsyncIterator[str]:
        """The whole answer as one piece."""
        found = await self.answer(face, (), [chat], characteristics=False, client=client, deadline=deadline)
        yield found.texts[0]

    def _answer(self, works: Sequence[_Work]) -> list[Found | Exception]:
        scored = [work for work in works if work.closed or work.characteristics]
        faces = (
            self._predictor.score_faces(
                [work.face.pixels for work in scored],
                [work.closed for work in scored],
                [work.face.map for work in scored],
            )
            if scored
            else []
        )
        by_work = {id(work): found for work, found in zip(scored, faces, strict=True)}
        single = [(work, chat) for work in works for chat in work.open_ if len(chat) == 1]
        written = iter(
            self._predictor.generate_batch(
                [work.face.pixels for work, _ in single],
                [chat[0][1] for _, chat in single],
                self._max_new_tokens,
                [work.face.map for work, _ in single],
            )
            if single
            else ()
        )
        results: list[Found | Exception] = []
        for work in works:
            texts = tuple(next(written) if len(chat) == 1 else self._talk(work.face, chat) for chat in work.open_)
            found = by_work.get(id(work))
            results.append(Found(tuple(found.answers) if found else (), texts, found.characteristics if found else {}))
        return results

    def _talk(self, face: Prepared, chat: Chat) -> str:
        turns = [{"role": role, "content": text} for role, text in chat]
        return self._predictor.generate(face.pixels, turns, self._max_new_tokens, [face.map])


class PredictorTokens:
    """Counts tokens as a predictor's tokenizer makes them."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def asked(self, chat: Chat) -> int:
        """Tokens of a chat about a picture."""
        return len(self._predictor._chat(list(chat)))

    def said(self, text: str) -> int:
        """Tokens of an answer, its end included."""
        return len(self._predictor.frame.answer(text))
