"""Which faces and turns a step sees, and the packed rows they become.

Everything about step `t` is a function of (seed, stage, t): the faces (a fresh order every epoch), the turns drawn for
each, the augmentation. So a resumed run needs no random state, and each of N workers takes its slice of the same plan.

A row holds one face or several: each its prefix, image tokens included, then its questions as blocks that do not see
one another (`facemllm.train.rows` makes the mask). Positions restart for every face and block.
Shapes: B faces, R rows, L tokens of a row, K answer tokens, I image tokens of all faces together.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from facemllm.errors import UserError
from facemllm.settings import Stage
from facemllm.train import augment
from facemllm.train.data import Corpus

PADDING = -1
"""Face of a token that fills a row up."""
PREFIX = -1
"""Block of the tokens that every block of their face sees."""
_WIDTHS = 16


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
    """Packed rows. `face` and `block` say which tokens see one another, `image` where in the flattened rows the image
    tokens stand, face after face. `at` are the flat places from which the answer tokens `target` are to be predicted;
    `task` numbers the task that each of them belongs to."""

    ids: NDArray[np.int64]  # (R, L)
    face: NDArray[np.int64]  # (R, L), `PADDING` where there is none
    block: NDArray[np.int64]  # (R, L), `PREFIX` in the prefix
    position: NDArray[np.int64]  # (R, L)
    image: NDArray[np.int64]  # (I,)
    at: NDArray[np.int64]  # (K,)
    target: NDArray[np.int64]  # (K,)
    task: NDArray[np.int64]  # (K,)

    @property
    def tokens(self) -> int:
        """Tokens that are no padding."""
        return int((self.face != PADDING).sum())


class Planner:
    """Plans the steps of one stage over one corpus.

    A turn that follows is drawn with its predecessor, unless its task or that of a turn between is not of the stage.
    `withheld` is the share of faces shown without their map. A question that would need more than `limit` tokens,
    with the `prefix` tokens before it and whatever follows it, is never drawn: `left_out` lists such conversations as
    (image_id, tokens). Raises UserError when nothing is left to draw.
    """

    def __init__(
        self,
        corpus: Corpus,
        stage: Stage,
        name: str,
        seed: int,
        side: int,
        withheld: float = 0.0,
        *,
        prefix: int = 0,
        limit: int | None = None,
    ) -> None:
        self.corpus, self.stage, self.side, self._withheld = corpus, stage, side, withheld
        self._key = (seed, zlib.crc32(name.encode()))
        weights = corpus.weights(stage.tasks)
        self._mixed = weights > 0
        # a turn that follows is drawn with the turn it depends on, never alone
        self._weights = np.where(corpus.follows, 0.0, weights)
        if not self._weights.any():
            raise UserError(
                f"stage {name}: no conversation has a question of {', '.join(stage.tasks)}; the table has "
                f"{', '.join(sorted(corpus.tasks)) or 'none'}: name some of these in train.stages.{name}.tasks"
            )
        rows = np.repeat(np.arange(len(corpus)), np.diff(corpus.turn_starts))
        tokens = prefix + corpus.chain_tokens(self._mixed)
        long = (self._weights > 0) & (tokens > (limit or np.inf))
        self._weights[long] = 0.0
        self.left_out = [(corpus.image_id[int(rows[t])].as_py(), int(tokens[t])) for t in np.flatnonzero(long)]
        has_turns = np.bincount(rows, self._weights > 0, minlength=len(corpus)) > 0
        self._usable = np.flatnonzero(has_turns)
        if not len(self._usable):
            raise UserError(
                f"stage {name}: every question is longer than the {limit} tokens the language model can read "
                f"({self.left_out[0][1]} for image {self.left_out[0][0]}); shorten the texts or take another model.base"
            )
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
        mirrored = changes.mirror.astype(int) if changes else np.zeros(images, int)
        answers = [self.corpus.answer[drawn, side] for drawn, side in zip(turns, mirrored, strict=True)]
        labels = int(self.corpus.texts.lengths[np.concatenate(answers)].sum())
        withheld = generator.random(images) < self._withheld
        return Plan(rows, changes, turns, labels, withheld)

    def _draw(self, row: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """Weighted draw without replacement (Efraimidis and Spirakis 2006) of a face's turns."""
        first, end = self.corpus.turn_starts[row : row + 2]
        weights = self._weights[first:end]
        keys = generator.exponential(size=end - first) / np.maximum(weights, 1e-12)
        ranked = np.argsort(keys)[: min(self.stage.turns_per_image, int((weights > 0).sum()))] + first
        chains = []
        for turn in ranked:
            stop = turn + 1
            while stop < end and self.corpus.follows[stop] and self._mixed[stop]:
                stop += 1
            chains.append(np.arange(turn, stop))
        return np.concatenate(chains)


def face_lengths(corpus: Corpus, turns: Sequence[NDArray[np.int64]], mirrored: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Tokens of each face's drawn turns (B,), its prefix not counted."""
    lengths = corpus.texts.lengths
    sides = mirrored.astype(int)
    return np.array(
        [
            lengths[corpus.prompt[t, m]].sum() + lengths[corpus.answer[t, m]].sum()
            for t, m in zip(turns, sides, strict=True)
        ]
    )


def fitted(lengths: NDArray[np.int64], room: int) -> list[list[int]]:
    """Which faces share a row of `room` tokens: first fit, longest first; one longer than a row stands alone.

    `room` 0 gives every face a row of its own, in the order given.
    """
    if not room:
        return [[index] for index in range(len(lengths))]
    rows: list[list[int]] = []
    left: list[int] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        row = next((r for r, free in enumerate(left) if free >= length), None)
        if row is None:
            rows.append([])
            left.append(room)
            row = len(rows) - 1
        rows[row].append(index)
        left[row] -= length
    return rows


def tightest(lengths: NDArray[np.int64], most: int, multiple: int) -> tuple[list[list[int]], int]:
    """Rows as `fitted` makes them, and their width: the one with least padding up to `most`, or to the longest face's.

    It depends on the lengths how many faces go into a row without a rest. Some widths are tried, not all.
    """
    longest = int(lengths.max())
    rooms = {round(room) for room in np.linspace(longest, max(most, longest), _WIDTHS)} if most else {0}
    found = []
    for room in sorted(rooms):
        rows = fitted(lengths, room)
        width = -(-max(int(lengths[row].sum()) for row in rows) // multiple) * multiple
        found.append((len(rows) * width, width, rows))
    _, width, rows = min(found, key=lambda one: one[:2])
    return rows, width


def pack(
    corpus: Corpus,
    turns: Sequence[NDArray[np.int64]],
    mirrored: NDArray[np.bool_],
    prefix_ids: Sequence[int],
    image_token_id: int,
    *,
    row_tokens: int = 0,
    multiple: int = 8,
) -> Packed:
    """Faces and their turns as rows of up to `row_tokens` (see `tightest`), of one width, a multiple of `multiple`."""
    faces = [_face(corpus, prefix_ids, chosen, int(mirror)) for chosen, mirror in zip(turns, mirrored, strict=True)]
    lengths = np.array([len(face.ids) for face in faces])
    rows, width = tightest(lengths, row_tokens, multiple)
    shape = (len(rows), width)
    ids, position = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    member, block = np.full(shape, PADDING, np.int64), np.full(shape, PREFIX, np.int64)
    start = np.zeros(len(faces), np.int64)
    for number, row in enumerate(rows):
        offset = 0
        for index in row:
            face, stop = faces[index], offset + int(lengths[index])
            ids[number, offset:stop], position[number, offset:stop] = face.ids, face.position
            member[number, offset:stop], block[number, offset:stop] = index, face.block
            start[index] = number * width + offset
            offset = stop
    inside = np.flatnonzero(np.asarray(prefix_ids) == image_token_id)
    return Packed(
        ids=ids,
        face=member,
        block=block,
        position=position,
        image=(start[:, None] + inside).reshape(-1),
        at=np.concatenate([face.at + begin for face, begin in zip(faces, start, strict=True)]),
        target=np.concatenate([face.target for face in faces]),
        task=np.concatenate([face.task for face in faces]),
    )


@dataclass(frozen=True)
class _Face:
    ids: NDArray[np.int64]
    block: NDArray[np.int64]
    position: NDArray[np.int64]
    at: NDArray[np.int64]
    target: NDArray[np.int64]
    task: NDArray[np.int64]


def _face(corpus: Corpus, prefix_ids: Sequence[int], turns: NDArray[np.int64], mirror: int) -> _Face:
    prefix = len(prefix_ids)
    ids, blocks, positions = [np.asarray(prefix_ids)], [np.full(prefix, PREFIX)], [np.arange(prefix)]
    at, targets, tasks = [], [], []
    block, offset, length = -1, prefix, prefix
    for turn in turns:
        if not corpus.follows[turn]:
            block += 1
            offset = prefix
        prompt = corpus.texts[corpus.prompt[turn, mirror]]
        answer = corpus.texts[corpus.answer[turn, mirror]]
        count = len(prompt) + len(answer)
        # the end token predicts nothing, but a turn that follows stands after it
        ids += [prompt, answer]
        blocks.append(np.full(count, block))
        positions.append(np.arange(offset, offset + count))
        at.append(length + len(prompt) - 1 + np.arange(len(answer)))
        targets.append(answer)
        tasks.append(np.full(len(answer), corpus.task[turn]))
        offset += count
        length += count
    return _Face(*(np.concatenate(column).astype(np.int64) for column in (ids, blocks, positions, at, targets, tasks)))


def word_bags(
    corpus: Corpus, turns: Sequence[NDArray[np.int64]], mirrored: NDArray[np.bool_], vocabulary: int
) -> NDArray[np.float32]:
    """Which words each face's drawn answers hold: (B, V) of 0 and 1."""
    bags = np.zeros((len(turns), vocabulary), np.float32)
    for index, (chosen, mirror) in enumerate(zip(turns, mirrored, strict=True)):
        for turn in chosen:
            bags[index, corpus.texts[corpus.answer[turn, int(mirror)]]] = 1.0
    return bags
