"""Linear classifiers of questions, the second judge beside the lexicon and the rules: hashed words, pieces of words,
and, for items, the notions that the lexicon reads in them.

`items` knows items by name, and `NONE` for what asks for none; `refusals` the policy's rules by name, and `NONE` for
what breaks none. `tools/question_classifier.py` makes their weights anew.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from facemllm.serve.asked.lexicon import LEXICON
from facemllm.serve.asked.reading import Reading

Features = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Buckets of a text and their values, both (F,)."""

BUCKETS: Mapping[str, int] = {"items": 1 << 15, "refusals": 1 << 14}
NONE = "-"
_PIECES = range(2, 6)
_OF_NOTIONS = 0.7
"""Length of the features of notions, that of the features of words being 1."""


def of_item(asked: Reading) -> Features:
    """Words, pairs of words and pieces of words of a question; the notions that they stand for, pairs of notions, how
    much is strange, and runs of two and three words with notions in place of known words."""
    return _hashed("items", (1.0, _words(asked.plain)), (_OF_NOTIONS, _notions(asked)))


def of_refusal(words: str) -> Features:
    """Words, pairs of words and pieces of words of a text in any script, as `disguises.plain` leaves it."""
    return _hashed("refusals", (1.0, _words(words)))


def _hashed(name: str, *groups: tuple[float, Counter[str]]) -> Features:
    values: dict[int, float] = {}
    for length, found in groups:
        own: dict[int, float] = {}
        for feature, count in found.items():
            bucket = zlib.crc32(feature.encode()) % BUCKETS[name]
            own[bucket] = own.get(bucket, 0.0) + 1 + float(np.log(count))
        scale = length / (float(np.linalg.norm(list(own.values()))) or 1.0)
        for bucket, value in own.items():
            values[bucket] = values.get(bucket, 0.0) + scale * value
    return np.fromiter(values, np.int64, len(values)), np.fromiter(values.values(), float, len(values))


def _words(plain: str) -> Counter[str]:
    words = plain.split()
    found = Counter(f"w {word}" for word in words)
    found.update(f"p {one} {other}" for one, other in pairwise(words))
    for word in words:
        bounded = f" {word} "
        found.update(bounded[at : at + size] for size in _PIECES for at in range(len(bounded) - size + 1))
    return found


def _notions(asked: Reading) -> Counter[str]:
    notions = sorted(asked.notions)
    found = Counter(f"n {notion}" for notion in notions)
    found.update(f"nn {one} {other}" for one, other in combinations(notions, 2))
    found[f"strange {min(4, int(2 * asked.strange))}"] = 1
    meant = ["^", *_meant(asked), "$"]
    found.update(f"s {one} {other}" for one, other in pairwise(meant))
    found.update(" ".join(("t", *three)) for three in zip(meant, meant[1:], meant[2:], strict=False))
    return found


def _meant(asked: Reading) -> Iterator[str]:
    """The words, notions in place of known ones, and of unknown ones what kind they are."""
    for word in asked.words:
        notions = LEXICON.notions.get(word)
        if notions is None:
            yield "#else" if word in LEXICON.elsewhere else "#doing" if word in LEXICON.doings else "#"
        else:
            yield "+".join(sorted(notions)) or f".{word}"


class Classifier:
    """Weights by bucket and class. They are kept as steps of a square root, so that small ones are exact, too: a weight
    is `scale` by the square of its step, whose sign it has."""

    def __init__(self, names: list[str], step_BC: NDArray[np.int8], scale_C: NDArray[np.float32]) -> None:
        """The last row of `step_BC` is the bias."""
        self.names = names
        self._step_BC, self._scale_C = step_BC, scale_C

    @classmethod
    def of(cls, names: list[str], weight_BC: NDArray[np.floating], bias_C: NDArray[np.floating]) -> Classifier:
        """One of floating-point weights, rounded."""
        whole_BC = np.vstack([weight_BC, bias_C])
        scale_C = np.abs(whole_BC).max(0) / 127**2
        step_BC = np.sign(whole_BC) * np.rint(np.sqrt(np.abs(whole_BC) / scale_C))
        return cls(names, step_BC.astype(np.int8), scale_C.astype(np.float32))

    @classmethod
    def read(cls, file: Path) -> Classifier:
        """What `write` wrote."""
        with np.load(file, allow_pickle=False) as stored:
            return cls(stored["names"].tolist(), stored["step"], stored["scale"])

    def write(self, file: Path) -> None:
        """Keep it in a file."""
        np.savez_compressed(file, names=np.array(self.names), step=self._step_BC, scale=self._scale_C)

    def probabilities(self, features: Features) -> dict[str, float]:
        """How likely a question is of each class."""
        bucket_F, value_F = features
        step_FC = self._step_BC[np.append(bucket_F, -1)].astype(float)
        score_C = np.append(value_F, 1.0) @ (step_FC * np.abs(step_FC)) * self._scale_C
        relative_C = np.exp(score_C - score_C.max())
        return dict(zip(self.names, (relative_C / relative_C.sum()).tolist(), strict=True))


def file_of(name: str) -> Path:
    """Where the weights of a classifier are."""
    return Path(__file__).with_name(f"{name}.npz")


@cache
def classifier(name: str) -> Classifier:
    """`items` or `refusals`, as shipped."""
    return Classifier.read(file_of(name))
