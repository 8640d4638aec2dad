"""A linear classifier of questions, for those that the lexicon leaves open: hashed words, pieces of words, and the
notions that the lexicon reads in them.

It knows items by name, and `NONE` for what asks for none. `tools/question_classifier.py` makes its weights anew.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from facemllm.serve.asked.lexicon import LEXICON
from facemllm.serve.asked.reading import Reading

BUCKETS = 1 << 15
NONE = "-"
_PIECES = range(2, 6)
_OF_NOTIONS = 0.7
"""Length of the features of notions, that of the features of words being 1."""


def features(asked: Reading) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Buckets of a question and their values: words, pairs of words and pieces of words; the notions that they stand
    for, pairs of notions, how much is strange, and runs of two and three words with notions in place of known words."""
    values: dict[int, float] = {}
    for length, found in ((1.0, _words(asked.plain)), (_OF_NOTIONS, _notions(asked))):
        own: dict[int, float] = {}
        for feature, count in found.items():
            bucket = zlib.crc32(feature.encode()) % BUCKETS
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
    """Weights by bucket and class."""

    def __init__(self, file: Path) -> None:
        with np.load(file, allow_pickle=False) as stored:
            self.names: list[str] = stored["names"].tolist()
            self._weight_BC, self._bias_C = stored["weight"].astype(np.float32), stored["bias"].astype(np.float32)

    def probabilities(self, asked: Reading) -> dict[str, float]:
        """How likely a question asks for each item, or for `NONE`."""
        bucket_F, value_F = features(asked)
        score_C = value_F @ self._weight_BC[bucket_F] + self._bias_C
        relative_C = np.exp(score_C - score_C.max())
        return dict(zip(self.names, (relative_C / relative_C.sum()).tolist(), strict=True))


@cache
def classifier() -> Classifier:
    """The one that is shipped."""
    return Classifier(Path(__file__).with_suffix(".npz"))
