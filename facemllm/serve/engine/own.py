"""The project's own engine: a `Predictor` behind a queue, for every model, on CPU (float32) and CUDA (bfloat16).

The closed questions of many faces share a pass, a face that was looked at before needs no tower pass, and open
questions are written side by side, new ones joining between two tokens. What a face is answered does not depend on what
it is computed with.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from facemllm.model.decoding import MASK_CELLS, Decoding, Row, is_plain
from facemllm.model.families import Llava
from facemllm.model.forward import Layout
from facemllm.model.inference import Predictor, Query, Scored
from facemllm.serve.engine.batches import Job, Scheduler
from facemllm.serve.engine.encodings import Encoding, Encodings
from facemllm.serve.engine.packed import pack
from facemllm.serve.engine.pieces import Pieces, settled, streamed
from facemllm.serve.engine.protocol import Chat, Engine, Found, Prepared
from facemllm.serve.engine.room import IDLE, Room, UnderWay, cost_of, require_short
from facemllm.serve.engine.scoring import Scoring
from facemllm.serve.language import Refused

__all__ = ["Engine", "Found", "OwnEngine", "Prepared"]

_PROBE = Query("Is this a face?", ("yes", "no", "it cannot be told"))
_UNEVEN = 1.5  # how much longer than the shortest a row of a pass may be
_ROWS = {"cpu": 8, "cuda": 32}  # most rows or faces of a pass: on a CPU more fall out of its caches


@dataclass(eq=False)
class _Work:
    """What is asked of one face, and how far it is answered."""

    face: Prepared
    closed: Sequence[Query]
    chats: Sequence[Chat]
    prompts: Sequence[list[int]]
    characteristics: bool
    say: Callable[[str], None] | None = None
    tokens_ND: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    passes: list[Layout] = field(default_factory=list)
    scored: dict[int, list[Scored]] = field(default_factory=dict)  # by pass
    rows: list[Row] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    found: Mapping[str, float] = field(default_factory=dict)
    said: str = ""


_Job = Job[_Work, Found]


class OwnEngine:
    """Answers from a predictor, in a thread of its own. `cache_mb` bounds the encodings of faces that are kept."""

    def __init__(
        self,
        predictor: Predictor,
        *,
        room: Room | None = None,
        max_new_tokens: int = 96,
        cache_mb: float = 64,
        threads: int | None = None,
    ) -> None:
        self.predictor, self._threads = predictor, threads
        self.takes_maps = predictor.takes_maps
        self.characteristic_names = predictor.characteristic_names
        self.encodings = Encodings(int(cache_mb * 2**20))
        self._longest = max_new_tokens
        self._context = int(getattr(predictor.model.config.get_text_config(), "max_position_embeddings", 0) or 2**20)
        self._plain = is_plain(predictor.model)
        self.scoring: Predictor | Scoring = predictor
        self._rows = _ROWS.get(predictor.device.type, 32)
        self._batches: Scheduler[_Work, Found] = Scheduler(self, room)
        self.counters = self._batches.counters
        self.reset()

    @classmethod
    def load(
        cls, model_dir: Path | str, *, device: str = "cpu", threads: int = 1, room: Room | None = None, **options: float
    ) -> OwnEngine:
        """Load a model directory and make ready. Raises UserError."""
        predictor = Predictor.load(model_dir, device=device, threads=threads)
        engine = cls(predictor, room=room, threads=threads, **options)  # type: ignore[arg-type]
        engine.make_ready()
        return engine

    def make_ready(self) -> None:
        """Pack the model's layers where that is faster, and warm it up; the predictor's from then on, too."""
        # layers of other families may ask a linear layer for its weight
        if isinstance(self.predictor.family, Llava) and pack(self.predictor.model):
            grey = np.full(self.predictor.prepared, 128, np.uint8)
            flat_BNF = self.predictor.encode([grey] * 2).flat_BNF
            self.scoring = Scoring.of(self.predictor, flat_BNF, _PROBE) or self.predictor
        self.warm_up()

    def warm_up(self) -> None:
        """Answer about a grey face: the first pass of its kind is slow."""
        grey = np.full(self.predictor.prepared, 128, np.uint8)
        for count in (1, 2):
            visual = self.predictor.encode([grey] * count)
            self.scoring.score_rows(visual.flat_BNF, self.predictor.passes([_PROBE]) * count)
        if self._plain:
            decoding = Decoding(self.predictor, 2)
            decoding.begin([Row(self._prompt([("user", _PROBE.question)]), visual.tokens_BND[0])])
            decoding.step()

    async def answer(
        self,
        face: Prepared,
        closed: Sequence[Query],
        open_: Sequence[Chat],
        *,
        characteristics: bool = False,
        client: str = "",
        deadline: float = math.inf,
    ) -> Found:
        """All answers about one face. See `Engine`."""
        return await self._submit(self._work(face, closed, open_, characteristics), client, deadline)

    async def stream(
        self, face: Prepared, chat: Chat, *, client: str = "", deadline: float = math.inf
    ) -> AsyncIterator[str]:
        """The answer to a chat in pieces. See `Engine`."""
        loop = asyncio.get_running_loop()
        pieces: Pieces = asyncio.Queue()
        work = self._work(face, (), [chat], False)
        work.say = lambda text: _tell(loop, pieces, text)
        async with aclosing(streamed(self._submit(work, client, deadline), pieces)) as streaming:
            async for piece in streaming:
                yield piece

    def check(self, *, client: str = "", deadline: float = math.inf, under_way: UnderWay = IDLE) -> None:
        """Raise Refused (429, 503) where `answer` would now. See `Engine`: under overload, reading a body and decoding
        its picture cost more than the answers."""
        self._batches.check(client=client, deadline=deadline, under_way=under_way)

    def close(self, seconds: float | None = None) -> None:
        """Finish what is begun or waits, refuse what comes; wait so long for it."""
        self._batches.close(seconds)

    def _work(self, face: Prepared, closed: Sequence[Query], chats: Sequence[Chat], characteristics: bool) -> _Work:
        for query in closed:
            require_short(query)
            if (tokens := self.predictor.tokens_of(query)) > self._context:
                takes = f"this model takes {self._context}"
                raise Refused(413, f"the image, a question and an option of it are {tokens} tokens; {takes}")
        return _Work(face, closed, chats, [self._prompt(chat) for chat in chats], characteristics)

    def _prompt(self, chat: Chat) -> list[int]:
        """Token ids of a chat behind the prefix. Raises Refused."""
        try:
            ids = self.predictor.chat(chat)
        except ValueError as error:
            raise Refused(422, str(error)) from None
        if len(ids) + self._longest > self._context:
            takes = f"this model takes {self._context}, {self._longest} of them for the answer"
            raise Refused(413, f"the image and the chat are {len(ids)} tokens; {takes}")
        return ids[len(self.predictor.frame.prefix_ids) :]

    async def _submit(self, work: _Work, client: str, deadline: float) -> Found:
        cost = cost_of(len(work.closed), len(work.chats))
        return await self._batches.submit(work, client=client, deadline=deadline, cost=cost, rows=len(work.chats))

    def reset(self) -> None:
        """Forget what was begun."""
        self._decoding = Decoding(self.predictor, self._longest)
        self._begun: list[_Job] = []

    def step(self, new: Sequence[_Job]) -> None:
        """Look at new faces, score some passes of closed questions, and write one token of every open one."""
        if self._threads:
            torch.set_num_threads(self._threads)  # of this thread
            self._threads = None
        self._give_up()
        if new:
            self._begin(new)
        self._score()
        self._decoding.step()
        for job in self._begun:
            if job.work.say is not None and job.work.rows:
                self._say(job.work, job.work.say)
        self._end()

    def _give_up(self) -> None:
        """Stop writing for callers that have gone."""
        gone = [job for job in self._begun if not job.wanted]
        if gone:
            rows = {id(row) for job in gone for row in job.work.rows}
            self._decoding.drop(lambda row: id(row) in rows)
            for job in gone:
                job.fail(Refused(504, "nobody waits for this any more"))
            self._begun = [job for job in self._begun if not job.ended]

    def _begin(self, new: Sequence[_Job]) -> None:
        self._begun += new
        encodings = self._looked_at([job.work.face for job in new])
        for job in new:
            work, face = job.work, encodings[job.work.face.key]
            work.tokens_ND = face.tokens_ND
            if work.characteristics:
                work.found = face.characteristics
            work.passes = self.predictor.passes(work.closed) if work.closed else []
            if work.chats:
                self._write(work, face)
        self._decoding.begin([row for job in new for row in job.work.rows])

    def _score(self) -> None:
        """The next pass of every job, and further ones where few wait: no job of many holds up the others."""
        waiting: list[tuple[int, _Work, int]] = []
        for job in self._begun:
            left = [number for number in range(len(job.work.passes)) if number not in job.work.scored]
            waiting += [(turn, job.work, number) for turn, number in enumerate(left)]
        waiting.sort(key=lambda one: one[0])
        count = max(self._rows, sum(turn == 0 for turn, *_ in waiting))
        for group in _even([(work, number) for _, work, number in waiting[:count]], self._rows):
            flat_BNF = torch.stack([work.tokens_ND for work, _ in group])
            found = self.scoring.score_rows(flat_BNF, [work.passes[number] for work, number in group])
            for (work, number), scored in zip(group, found, strict=True):
                work.scored[number] = scored
            self._end()

    def _write(self, work: _Work, encoding: Encoding) -> None:
        """Begin to write; what settings of the model's own steer is written at once, by `generate`."""
        if self._plain:
            work.rows = [Row(prompt, encoding.tokens_ND) for prompt in work.prompts]
            return
        for chat in work.chats:
            turns = [{"role": role, "content": text} for role, text in chat]
            work.texts.append(self.predictor.generate(work.face.pixels, turns, self._longest, [work.face.map]))
            if work.say is not None:
                work.say(work.texts[-1])

    def _looked_at(self, faces: Iterable[Prepared]) -> dict[tuple[str, ...], Encoding]:
        """The encodings of faces by their keys, of those that were not kept in as few passes of the tower as fit."""
        wanted = {face.key: face for face in faces}
        found = {key: encoding for key in wanted if (encoding := self.encodings.get(key)) is not None}
        missing = [face for key, face in wanted.items() if key not in found]
        for start in range(0, len(missing), self._rows):
            part = missing[start : start + self._rows]
            encoded = self.predictor.encode([face.pixels for face in part], [face.map for face in part])
            known = self.predictor.characteristics(encoded)
            for face, tokens_ND, scores in zip(part, encoded.flat_BNF, known, strict=True):
                found[face.key] = Encoding(tokens_ND.clone(), scores)  # a view would hold the whole batch
                self.encodings.put(face.key, found[face.key])
        return found

    def _end(self) -> None:
        """Give their results to jobs that are answered."""
        for job in self._begun:
            work = job.work
            if len(work.scored) < len(work.passes) or len(work.chats) != len(work.rows or work.texts):
                continue
            if all(row.ended for row in work.rows):
                texts = work.texts or [self.predictor.text(row.written) for row in work.rows]
                scored = [one for number in range(len(work.passes)) for one in work.scored[number]]
                job.finish(Found(tuple(scored), tuple(texts), work.found))
        self._begun = [job for job in self._begun if not job.ended]

    def _say(self, work: _Work, say: Callable[[str], None]) -> None:
        """Tell what is new, but for the last word, which may still change."""
        (row,) = work.rows
        text = self.predictor.text(row.written)
        if not row.ended:
            text = settled(text)
        if row.ended or text.startswith(work.said):
            new = text[len(work.said) :]
            work.said += new
            if new:
                say(new)


def _even(waiting: Sequence[tuple[_Work, int]], most: int) -> Iterator[list[tuple[_Work, int]]]:
    """Rows in groups of about the same length: of at most `most`, which are padded little."""
    group: list[tuple[_Work, int]] = []
    shortest = 0
    for work, number in sorted(waiting, key=lambda one: len(one[0].passes[one[1]].ids)):
        length = len(work.passes[number].ids)
        if group and (len(group) == most or length > _UNEVEN * shortest or (len(group) + 1) * length**2 > MASK_CELLS):
            yield group
            group = []
        shortest = shortest if group else length
        group.append((work, number))
    if group:
        yield group


def _tell(loop: asyncio.AbstractEventLoop, pieces: Pieces, text: str) -> None:
    with suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(pieces.put_nowait, text)
