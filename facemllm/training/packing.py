"""Which faces and turns a step sees, and the packed rows they become.

Everything about step `t` is a function of (seed, stage, t): the faces (a fresh order every epoch), the turns drawn for
each, the augmentation. So a resumed run needs no random state, and each of N workers takes its slice of the same plan.
Shapes: B faces of the (global or local) batch, T packed tokens after the prefix.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from facemllm.model.masks import PADDING
from facemllm.settings import Stage
from facemllm.training import augment
from facemllm.training.data import Corpus

IGNORED = -100


@dataclass(frozen=True)
class Plan:
    """What one step sees, for the global batch."""

    rows: NDArray[np.int64]  # (B,) rows of the corpus
    changes: augment.Changes | None
    turns: list[NDArray[np.int64]]  # per face: its drawn turns, a turn that follows right after its predecessor
    labels: int  # answer tokens in the whole batch
    withheld: NDArray[np.bool_]  # (B,) faces shown without their map


@dataclass(frozen=True)
class Packed:
    """Packed rows as (B, T) integer arrays; `target` is the next token where that is an answer's, else `IGNORED`; `task`
    numbers the task of the turn it belongs to."""

    ids: NDArray[np.int64]
    block: NDArray[np.int64]
    position: NDArray[np.int64]
    target: NDArray[np.int64]
    task: NDArray[np.int64]


class Planner:
    """Plans the steps of one stage over one corpus; `withheld` is the share of faces shown without their map."""

    def __init__(self, corpus: Corpus, stage: Stage, name: str, seed: int, side: int, withheld: float = 0.0) -> None:
        self.corpus, self.stage, self.side, self._withheld = corpus, stage, side, withheld
        self._key = (seed, zlib.crc32(name.encode()))
        weights = corpus.weights(stage.tasks)
        # a turn that follows is drawn with the turn it depends on, never alone
        self._weights = np.where(corpus.follows, 0.0, weights)
        rows = np.repeat(np.arange(len(corpus)), np.diff(corpus.turn_starts))
        has_turns = np.bincount(rows, self._weights > 0, minlength=len(corpus)) > 0
        self._usable = np.flatnonzero(has_turns)
        if not len(self._usable):
            raise ValueError(f"stage {name}: no conversation has a turn of tasks {', '.join(stage.tasks)}")
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([*self._key, 1, epoch]).permutation(self._usable)

    def plan(self, step: int) -> Plan:
        """The plan of step `step`, counted from 0."""
        images, faces = self.stage.batch_images, len(self._usable)
        numbers = np.arange(step * images, (step + 1) * images)
        rows = np.array([self._order(int(n) // faces)[int(n) % faces] for n in numbers])
        generator = np.random.default_rng([*self._key, 2, step])
        changes = augment.draw(generator, images, self.side) if self.stage.augment else None
        turns = [self._draw(int(row), generator) for row in rows]
        drawn = np.concatenate(turns)
        lengths = np.diff(self.corpus.texts.starts)
        withheld = generator.random(images) < self._withheld
        return Plan(rows, changes, turns, int(lengths[self.corpus.answer[drawn, 0]].sum()), withheld)

    def _draw(self, row: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """Weighted draw without replacement (Efraimidis and Spirakis 2006) of a face's turns."""
        first, end = self.corpus.turn_starts[row : row + 2]
        weights = self._weights[first:end]
        keys = generator.exponential(size=end - first) / np.maximum(weights, 1e-12)
        ranked = np.argsort(keys)[: min(self.stage.turns_per_image, int((weights > 0).sum()))] + first
        chains = []
        for turn in ranked:
            stop = turn + 1
            while stop < end and self.corpus.follows[stop]:
                stop += 1
            chains.append(np.arange(turn, stop))
        return np.concatenate(chains)


def pack(corpus: Corpus, turns: list[NDArray[np.int64]], mirrored: NDArray[np.bool_], multiple: int = 8) -> Packed:
    """Rows of block-masked turns (see `facemllm.model.masks`), padded to a common length, a multiple of `multiple`."""
    rows = [_pack_row(corpus, chosen, int(mirror)) for chosen, mirror in zip(turns, mirrored, strict=True)]
    longest = max(len(row[0]) for row in rows)
    length = -(-longest // multiple) * multiple

    def padded(column: int, filler: int) -> NDArray[np.int64]:
        out = np.full((len(rows), length), filler, np.int64)
        for index, row in enumerate(rows):
            out[index, : len(row[column])] = row[column]
        return out

    return Packed(padded(0, 0), padded(1, PADDING), padded(2, 0), padded(3, IGNORED), padded(4, 0))


def _pack_row(corpus: Corpus, turns: NDArray[np.int64], mirror: int) -> tuple[NDArray[np.int64], ...]:
    ids, blocks, positions, targets, tasks = [], [], [], [], []
    block = -1
    offset = 0
    for turn in turns:
        if not corpus.follows[turn]:
            block += 1
            offset = 0
        prompt = corpus.texts[corpus.prompt[turn, mirror]]
        answer = corpus.texts[corpus.answer[turn, mirror]]
        # the end token predicts nothing, but a turn that follows stands after it
        tokens = np.concatenate([prompt, answer])
        target = np.full(len(tokens), IGNORED, np.int64)
        target[len(prompt) - 1 : -1] = answer
        ids.append(tokens)
        blocks.append(np.full(len(tokens), block))
        positions.append(np.arange(offset, offset + len(tokens)))
        targets.append(target)
        tasks.append(np.full(len(tokens), corpus.task[turn]))
        offset += len(tokens)
    return tuple(np.concatenate(column) for column in (ids, blocks, positions, targets, tasks))


def word_bags(
    corpus: Corpus, turns: list[NDArray[np.int64]], mirrored: NDArray[np.bool_], vocabulary: int
) -> NDArray[np.float32]:
    """Which words each face's drawn answers hold: (B, V) of 0 and 1."""
    bags = np.zeros((len(turns), vocabulary), np.float32)
    for index, (chosen, mirror) in enumerate(zip(turns, mirrored, strict=True)):
        for turn in chosen:
            bags[index, corpus.texts[corpus.answer[turn, int(mirror)]]] = 1.0
    return bags
