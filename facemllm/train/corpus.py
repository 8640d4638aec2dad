"""The data of a stage in memory: the turns of a split as flat integer arrays (`Corpus`), beside pixels, maps, labels.

Each distinct text is held once as token ids, its mirrored text (left <-> right) beside it, so that a mirrored face is
asked and answered correctly. `data.py` makes a `Corpus` from a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from facemllm.tasks import asking
from facemllm.tasks.relations import Relation

CAPTION = "caption"
"""The task whose answers are captions."""
HEAVIEST = 3.0
"""Largest weight of a class in the loss: a face or two in a thousand must not rule a step."""


@dataclass(frozen=True)
class Texts:
    """Token ids of distinct texts, end to end. Text `i` is `ids[starts[i]:starts[i + 1]]`."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]

    def __getitem__(self, index: int) -> NDArray[np.int32]:
        return self.ids[self.starts[index] : self.starts[index + 1]]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every text."""
        return np.diff(self.starts)


@dataclass(frozen=True)
class Numbers:
    """Answers to questions about numbers that are one token each: the token, the question's number, the value."""

    token: NDArray[np.int64]  # (M,)
    family: NDArray[np.int64]  # (M,)
    value: NDArray[np.float64]  # (M,)

    @classmethod
    def none(cls) -> Numbers:
        """No such answers."""
        return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))


@dataclass(frozen=True)
class Corpus:
    """The conversations of one split: which pixels, which turns, which texts. Row `r` shows pixels `pixel_row[r]` and
    has turns `turn_starts[r]:turn_starts[r + 1]`. A turn names its texts in `texts`: prompt and answer, plain and
    mirrored (column 1). A turn that `follows` continues the one before it. `fact` numbers what a closed turn asks and
    its canonical answer, `item` what a turn answered by a class asks, both -1 elsewhere. `form` is a place in
    `asking.VARIANTS`, and `share` the turn's share in the weight of its form: several statements about one item of a
    face share it, a set part of it for what is true."""

    image_id: pa.Array  # (rows,)
    pixel_row: NDArray[np.int64]
    turn_starts: NDArray[np.int64]
    prompt: NDArray[np.int32]  # (turns, 2)
    answer: NDArray[np.int32]  # (turns, 2)
    task: NDArray[np.int16]
    follows: NDArray[np.bool_]
    tasks: tuple[str, ...]
    texts: Texts
    fact: NDArray[np.int32]
    item: NDArray[np.int32]
    form: NDArray[np.int8]
    share: NDArray[np.float64]
    numbers: Numbers = field(default_factory=Numbers.none)

    def __len__(self) -> int:
        return len(self.pixel_row)

    def weights(self, mixture: Mapping[str, float], forms: Mapping[str, float] | None = None) -> NDArray[np.float64]:
        """Weight of each turn under a stage's mixture of tasks, 0 for a task the stage does not name, and of forms."""
        weights = np.array([mixture.get(name, 0.0) for name in self.tasks])[self.task]
        if forms is None:
            return weights
        return weights * self.share * np.array([forms.get(name, 1.0) for name in asking.VARIANTS])[self.form]

    def captions(self) -> NDArray[np.int64]:
        """The first turn of each row that asks for its caption, -1 where none does. (rows,)"""
        turns = np.flatnonzero(np.array([name == CAPTION for name in self.tasks])[self.task])
        rows, first = np.unique(np.searchsorted(self.turn_starts, turns, "right") - 1, return_index=True)
        found = np.full(len(self), -1)
        found[rows] = turns[first]
        return found

    def class_weights(self, power: float) -> NDArray[np.float32]:
        """What each turn's answer weighs in the loss: a class as its share among its question's answers to the power of
        `-power`, with mean 1 over the question's turns and at most `HEAVIEST`; other turns 1. (turns,)"""
        weights = np.ones(len(self.item), np.float32)
        turns = np.flatnonzero(self.item >= 0)
        if power and len(turns):
            item, fact = self.item[turns], self.fact[turns]
            asked = np.bincount(item)[item]
            rare = (np.bincount(fact)[fact] / asked) ** -power
            weights[turns] = np.minimum(rare / (np.bincount(item, rare)[item] / asked), HEAVIEST)
        return weights

    def chain_tokens(self, asked: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """Tokens from each turn to the end of the turns that follow it, as shown or mirrored, whichever are more. A
        turn that is not `asked` (turns,) ends those before it: it does not count, nor does what follows it."""
        lengths = self.texts.lengths
        tokens = (lengths[self.prompt] + lengths[self.answer]).max(1)
        opens = ~self.follows
        opens[self.turn_starts[:-1][np.diff(self.turn_starts) > 0]] = True
        chain = np.cumsum(opens) - 1
        if asked is not None:
            ended = np.cumsum(~asked & ~opens)
            tokens = np.where(ended > ended[opens][chain], 0, tokens)
        total = np.bincount(chain, tokens, minlength=chain[-1] + 1 if len(chain) else 0).astype(np.int64)
        return total[chain] if len(chain) else total


@dataclass(frozen=True)
class FaceDataset:
    """What a stage learns from: the conversations of a split, the pixels (rows, S, S, 3) of all rows of the table, the
    maps of face parts (rows, S, S) if the model takes them, and the labels of its characteristics (corpus rows, A), 1,
    0 or -1 for unknown, if it scores them. `features` of a frozen tower, by corpus row, stand in for the pixels."""

    corpus: Corpus
    pixels: NDArray[np.uint8]
    maps: NDArray[np.uint8] | None = None
    labels: NDArray[np.int8] | None = None
    relations: tuple[Relation, ...] = ()
    features: Any | None = None
