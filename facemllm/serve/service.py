"""From asks to answers, for every door alike: policy, then meaning, then the picture, then the model.

A question that asks for a taught item is answered as evaluation answers it: a closed one by the likelihood of its
options, an open one by reading what the model writes. Any other is answered in free text if it is about faces, or not
at all. Questions about the same face are put to the engine together.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from facemllm import tasks
from facemllm.serve.asked.matching import UNANSWERABLE, Matcher
from facemllm.serve.asked.policy import Policy
from facemllm.serve.engine.protocol import Engine
from facemllm.serve.engine.room import IDLE, UnderWay
from facemllm.serve.evaluated import Evaluated
from facemllm.serve.guard.decoding import Decoder
from facemllm.serve.language import Answer, Answers, Ask, Refused
from facemllm.serve.observer import Observer
from facemllm.serve.planning import Plan, Planner
from facemllm.tasks.answers import answer
from facemllm.tasks.characteristics import characteristic

if TYPE_CHECKING:
    from facemllm.model.inference import Scored

log = logging.getLogger("facemllm.serve")

MOST_TEXT, MOST_OPTIONS = 32_768, 4_096
"""Characters of all texts of a request, and of options of the client's own among them: the model reads every option."""
LONG_TEXT = 2_000
"""Characters above which texts are read beside the event loop."""
_HELD_BACK = 40
"""Words of a free answer that is streamed which are read together before the first is given."""
_WORD, _SENTENCE_END = re.compile(r"\S+"), re.compile(r"[.!?][\"')\]]*\s|\n")


@dataclass(frozen=True)
class Served:
    """The model that is served, as every answer names it."""

    name: str
    version: str | None
    digest: str


_Key = tuple[str, str | None, tuple[float, ...] | None]


def _key(ask: Ask) -> _Key:
    """What is looked at."""
    return ask.image.digest, ask.map.digest if ask.map else None, ask.box


@dataclass
class _Group:
    """Questions about one face, as (place of the ask, place in it, plan), and what was found."""

    ask: Ask
    asked: list[tuple[int, int, Plan]] = field(default_factory=list)
    characteristics: bool = False
    found: dict[tuple[int, int], Answer] = field(default_factory=dict)
    scores: dict[str, float] | None = None


class Service:
    """Answers asks. `timeout_s` is how long a client waits that does not say how long it does."""

    def __init__(
        self,
        model: Served,
        served: Sequence[tasks.Task],
        *,
        matcher: Matcher,
        policy: Policy,
        decoder: Decoder,
        refuses_picture: Callable[[Mapping[str, float]], str | None],
        engine: Engine,
        evaluated: Evaluated,
        timeout_s: float,
        observer: Observer | None = None,
    ) -> None:
        self.observer = observer or Observer()
        self.model, self.policy, self.evaluated, self.timeout_s = model, policy, evaluated, timeout_s
        self.tasks = {task.name: task for task in served}
        self._planner = Planner(served, matcher, policy)
        self._decoder, self._refuses_picture, self._engine = decoder, refuses_picture, engine
        self.takes_maps = engine.takes_maps
        about = _characteristics_of(task for task in served if policy.refuses_task(task.name) is None)
        self.characteristic_names = tuple(name for name in engine.characteristic_names if name in about)

    @property
    def offered(self) -> dict[str, tasks.Task]:
        """The tasks that can be asked by name: all but those that teach what a face does not tell."""
        return {name: task for name, task in self.tasks.items() if name != UNANSWERABLE}

    def check(self, client: str, under_way: UnderWay = IDLE) -> None:
        """Raise Refused (429, 503) where any ask of a client would be refused now, whatever it asks, or behind the
        requests that are under way."""
        self._engine.check(client=client, deadline=time.monotonic() + self.timeout_s, under_way=under_way)

    async def answer(self, asks: Sequence[Ask], *, client: str, deadline: float | None) -> list[Answers]:
        """Answers to all asks, in order. `deadline` is in seconds of `time.monotonic()`. Raises Refused."""
        started = time.perf_counter()
        size = _text_of(asks)
        if size > LONG_TEXT:  # reading takes a while; others are answered meanwhile
            plans = await asyncio.to_thread(lambda: [self._plans(ask) for ask in asks])
        else:
            plans = [self._plans(ask) for ask in asks]
        groups: dict[_Key, _Group] = {}
        for place, (ask, own) in enumerate(zip(asks, plans, strict=True)):
            group = groups.setdefault(_key(ask), _Group(ask))
            group.asked += [(place, n, plan) for n, plan in enumerate(own) if plan.answer is None]
            group.characteristics |= ask.characteristics
        async with self._until(deadline) as limit:
            await _all(self._look(one, client, limit) for one in groups.values() if one.asked or one.characteristics)
        answers = []
        for place, (ask, own) in enumerate(zip(asks, plans, strict=True)):
            group = groups[_key(ask)]
            said = (plan.answer or group.found[place, n] for n, plan in enumerate(own))
            kept = tuple(_held(one, ask.min_probability) for one in said)
            answers.append(Answers(kept, group.scores if ask.characteristics else None))
        self.observer.answered(asks, answers, time.perf_counter() - started)
        return answers

    async def stream(self, ask: Ask, *, client: str, deadline: float | None) -> AsyncIterator[str | Answer]:
        """The answer to an ask of one question: what is written freely by pieces, then the whole. Raises Refused."""
        _text_of([ask])
        (plan,) = self._plans(ask)
        if plan.answer is not None or plan.options:
            (found,) = await self.answer([ask], client=client, deadline=deadline)
            yield found.answers[0]
            return
        started = time.perf_counter()
        async with self._until(deadline) as limit:
            with self.observer.timed("decode"):
                face = await self._decoder.prepared(ask.image, ask.map, ask.box)
        if reason := self._refuses_picture(face.facts):
            whole = _abstained(plan, reason)
            self.observer.answered([ask], [Answers((whole,))], time.perf_counter() - started)
            yield whole
            return
        written, given, pieces = "", 0, self._engine.stream(face, plan.chat, client=client, deadline=limit)
        while plan.known is not None or self.policy.refuses_answer(written) is None:
            async with self._until(limit):  # never around a yield: the next piece may be asked for by another task
                piece = await anext(pieces, None)
            if piece is None:
                break
            written += piece
            if (safe := len(written) if plan.known else self._read(written)) > given:
                yield written[given:safe]
                given = safe
        whole = self._written(plan, written.strip())
        if whole.kind != "refused" and given < len(written):
            yield written[given:]
        self.observer.answered([ask], [Answers((whole,))], time.perf_counter() - started)
        yield whole

    def _read(self, written: str) -> int:
        """How much of a text that is being written may be given: nothing of its first words until they were read
        together, then whole sentences; nothing of one that tells what is withheld."""
        if len(_WORD.findall(written)) < _HELD_BACK or self.policy.refuses_answer(written):
            return 0
        return max((end.end() for end in _SENTENCE_END.finditer(written)), default=0)

    def _plans(self, ask: Ask) -> list[Plan]:
        if ask.map is not None and not self.takes_maps:
            raise Refused(422, f"{ask.where}.segmentation: this model looks at no map of face parts; leave it out")
        if ask.characteristics and not self.characteristic_names:
            raise Refused(422, f"{ask.where}.characteristics: this deployment gives no scores of them; leave it out")
        return [self._planner.plan(ask, question) for question in ask.questions]

    @asynccontextmanager
    async def _until(self, deadline: float | None) -> AsyncIterator[float]:
        """The time by which an answer has to be there; what takes longer is refused with 504."""
        limit = time.monotonic() + self.timeout_s
        limit = limit if deadline is None else min(limit, deadline)
        try:
            async with asyncio.timeout(max(0.0, limit - time.monotonic())):
                yield limit
        except TimeoutError:
            raise Refused(504, "there was no answer in time; try again, or ask less at once", 1.0) from None

    async def _look(self, group: _Group, client: str, deadline: float) -> None:
        """Answer all that is asked about one face."""
        from facemllm.model.inference import Query

        with self.observer.timed("decode"):
            face = await self._decoder.prepared(group.ask.image, group.ask.map, group.ask.box)
        if reason := self._refuses_picture(face.facts):
            group.found = {(place, n): _abstained(plan, reason) for place, n, plan in group.asked}
            group.scores = {} if group.characteristics else None
            return
        plans = [plan for _, _, plan in group.asked]
        with self.observer.timed("model"):
            found = await self._engine.answer(
                face,
                [Query(plan.text, plan.options) for plan in plans if plan.options],
                [plan.chat for plan in plans if not plan.options],
                characteristics=group.characteristics,
                client=client,
                deadline=deadline,
            )
        with self.observer.timed("answer"):
            scored, texts = iter(found.scored), iter(found.texts)
            for place, n, plan in group.asked:
                one = self._scored(plan, next(scored)) if plan.options else self._written(plan, next(texts))
                group.found[place, n] = one
        if group.characteristics:
            group.scores = {name: found.characteristics[name] for name in self.characteristic_names}

    def _scored(self, plan: Plan, scored: Scored) -> Answer:
        known = plan.known
        if known is None:
            likely = dict(zip(plan.options, scored.probabilities, strict=True))
            return Answer("free", plan.options[scored.best], None, likely, scored.probabilities[scored.best])
        found = answer(known, scored.probabilities, scored.greedy)
        scores, probability = found.scores if found.text else None, None
        if found.text and known.form != "number":
            probability = self.evaluated.calibrated(known.task, max(scored.probabilities))
        about = Answer("taught", found.text, found.value, scores, probability, known.task, known.item)
        if found.value is not None and plan.match is not None:
            item = self.tasks[known.task].item(known.item)
            return replace(about, text=plan.match.reply(item, found.value, found.text, probability))
        if found.value is None:
            return replace(about, kind="abstained", reason="the model would have written something else than an option")
        return about

    def _written(self, plan: Plan, text: str) -> Answer:
        known = plan.known
        if known is None:
            if refusal := self.policy.refuses_answer(text):
                return Answer("refused", refusal.reason, rule=refusal.rule, reason=refusal.reason)
            return Answer("free", text)
        value = self.tasks[known.task].item(known.item).parse(text)
        return Answer("taught", text, value, task=known.task, item=known.item)


def _text_of(asks: Sequence[Ask]) -> int:
    """Characters of all texts. Raises Refused (413) for more than policy, meaning and model are to read at once."""
    questions = [question for ask in asks for question in ask.questions]
    options = sum(len(option) for question in questions for option in question.options)
    said = sum(len(text) for one in questions for text in (one.text or "", *(text for _, text in one.chat)))
    if options > MOST_OPTIONS or options + said > MOST_TEXT:
        takes = f"this server takes {MOST_TEXT}, {MOST_OPTIONS} of them in options"
        raise Refused(413, f"the request has {options + said} characters of text, {options} in options; {takes}")
    return options + said


def _held(found: Answer, least: float | None) -> Answer:
    """The answer, held back if it is less probable than it has to be."""
    if least is None or found.kind not in ("taught", "free") or found.probability is None or found.probability >= least:
        return found
    reason = f"its probability, {found.probability:.2f}, is below the {least:.2f} asked for"
    return replace(found, kind="abstained", text="not sure enough to say", value=None, reason=reason)


def _abstained(plan: Plan, reason: str) -> Answer:
    known = plan.known
    return Answer(
        "abstained", reason, task=known.task if known else None, item=known.item if known else None, reason=reason
    )


async def _all(looks: Iterable[Coroutine[Any, Any, None]]) -> None:
    """All at once; the first that fails ends the others."""
    running = [asyncio.create_task(look) for look in looks]
    try:
        await asyncio.gather(*running)
    finally:
        for one in running:
            one.cancel()


def _characteristics_of(known: Iterable[tasks.Task]) -> set[str]:
    """Names of the characteristics that the closed questions of tasks are about."""
    return {
        characteristic(item, value)
        for task in known
        for item in task.items
        if item.form in ("boolean", "choice")
        for value in (["yes"] if item.form == "boolean" else [option.value for option in item.options])
    }
