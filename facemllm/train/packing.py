"""Packed rows: which faces with their questions share a row of the language model (`model.forward` has the picture).

Shapes: B faces, R rows, L tokens of a row, K answer tokens, I image tokens of all faces together, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facemllm.model.forward import PADDING, PREFIX
from facemllm.train.corpus import Corpus

_WIDTHS = 16


@dataclass(frozen=True)
class Packed:
    """Packed rows. `face` and `block` say which tokens see one another, `image` where in the flattened rows the image
    tokens stand, face after face. `at` are the flat places from which the answer tokens `target` are to be predicted;
    `task` numbers the task that each of them belongs to, `weight` is what it weighs in the loss."""

    ids: NDArray[np.int64]  # (R, L)
    face: NDArray[np.int64]  # (R, L), `PADDING` where there is none
    block: NDArray[np.int64]  # (R, L), `PREFIX` in the prefix
    position: NDArray[np.int64]  # (R, L)
    image: NDArray[np.int64]  # (I,)
    at: NDArray[np.int64]  # (K,)
    target: NDArray[np.int64]  # (K,)
    task: NDArray[np.int64]  # (K,)
    weight: NDArray[np.float32]  # (K,)

    @property
    def tokens(self) -> int:
        """Tokens that are no padding."""
        return int((self.face != PADDING).sum())


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
    """Which faces share a row of `room` tokens: first fit, longest first; one longer than a row stands alone. `room` 0
    gives every face a row of its own, in the order given."""
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
    It depends on the lengths how many faces go into a row without a rest. Some widths are tried, not all."""
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
    weights: NDArray[np.float32] | None = None,
    plain: bool = False,
) -> Packed:
    """Faces and their turns as rows of up to `row_tokens` (see `tightest`), of one width, a multiple of `multiple`;
    `plain` gives every question, with those that follow it, a row and a prefix of its own. `weights` are those of the
    corpus' turns in the loss; None: 1 each."""
    if weights is None:
        weights = np.ones(len(corpus.task), np.float32)
    split = partial(_chains, corpus) if plain else lambda chosen: [chosen]
    shown = [(face, part) for face, chosen in enumerate(turns) for part in split(chosen)]
    alone = partial(_alone, corpus, weights, np.asarray(prefix_ids), image_token_id)
    faces = [alone(part, int(mirrored[face])) for face, part in shown]
    lengths = np.array([len(face.ids) for face in faces])
    rows, width = tightest(lengths, 0 if plain else row_tokens, multiple)
    shape = (len(rows), width)
    ids, position = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    member, block = np.full(shape, PADDING, np.int64), np.full(shape, PREFIX, np.int64)
    starts = np.zeros(len(faces), np.int64)
    for number, row in enumerate(rows):
        offset = 0
        for index in row:
            face, stop = faces[index], offset + int(lengths[index])
            ids[number, offset:stop], position[number, offset:stop] = face.ids, face.position
            member[number, offset:stop], block[number, offset:stop] = shown[index][0], face.block
            starts[index] = number * width + offset
            offset = stop
    return Packed(
        ids=ids,
        face=member,
        block=block,
        position=position,
        image=np.concatenate([face.image + start for face, start in zip(faces, starts, strict=True)]),
        at=np.concatenate([face.at + start for face, start in zip(faces, starts, strict=True)]),
        target=np.concatenate([face.target for face in faces]),
        task=np.concatenate([face.task for face in faces]),
        weight=np.concatenate([face.weight for face in faces]),
    )


def _chains(corpus: Corpus, turns: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Turns, each with those that follow it."""
    return np.split(turns, np.flatnonzero(~corpus.follows[turns])[1:])


def _alone(
    corpus: Corpus,
    weights: NDArray[np.float32],
    prefix_N: NDArray[np.int64],
    image_token_id: int,
    turns: NDArray[np.int64],
    mirror: int,
) -> Packed:
    """One face without padding."""
    prefix = len(prefix_N)
    ids: list[NDArray[Any]] = [prefix_N]
    blocks, positions = [np.full(prefix, PREFIX)], [np.arange(prefix)]
    at, targets, tasks, counts = [], [], [], []
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
        counts.append(len(answer))
        offset += count
        length += count
    whole = partial(np.concatenate, dtype=np.int64)
    return Packed(
        ids=whole(ids),
        face=np.zeros(length, np.int64),
        block=whole(blocks),
        position=whole(positions),
        image=np.flatnonzero(prefix_N == image_token_id),
        at=whole(at),
        target=whole(targets),
        task=whole(tasks),
        weight=np.repeat(weights[turns], counts),
    )


def word_bags(
    corpus: Corpus, turns: Sequence[NDArray[np.int64]], mirrored: NDArray[np.bool_], vocabulary: int
) -> NDArray[np.float32]:
    """Which words each face's drawn answers hold: (B, V) of 0 and 1."""
    bags = np.zeros((len(turns), vocabulary), np.float32)
    for index, (chosen, mirror) in enumerate(zip(turns, mirrored, strict=True)):
        for turn in chosen:
            bags[index, corpus.texts[corpus.answer[turn, int(mirror)]]] = 1.0
    return bags
