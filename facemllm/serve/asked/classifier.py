"""A linear classifier of questions, for those that the lexicon leaves open: hashed words and pieces of words.

It knows items by name, and `NONE` for what asks for none. `tools/question_classifier.py` makes its weights anew.
"""

from __future__ import annotations

import zlib
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

BUCKETS = 1 << 15
NONE = "-"
_PIECES = range(2, 6)


def features(plain: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Buckets of a normalised text and their values, of length 1: words, pairs of words, pieces of words."""
    words = plain.split()
    found = Counter(f"w {word}" for word in words)
    found.update(f"p {one} {other}" for one, other in pairwise(words))
    for word in words:
        bounded = f" {word} "
        found.update(bounded[at : at + size] for size in _PIECES for at in range(len(bounded) - size + 1))
    values: dict[int, float] = {}
    for feature, count in found.items():
        bucket = zlib.crc32(feature.encode()) % BUCKETS
        values[bucket] = values.get(bucket, 0.0) + 1 + float(np.log(count))
    value_F = np.fromiter(values.values(), float, len(values))
    return np.fromiter(values, np.int64, len(values)), value_F / (np.linalg.norm(value_F) or 1.0)


class Classifier:
    """Weights by bucket and class."""

    def __init__(self, file: Path) -> None:
        with np.load(file, allow_pickle=False) as stored:
            self.names: list[str] = stored["names"].tolist()
            self._weight_BC, self._bias_C = stored["weight"].astype(np.float32), stored["bias"].astype(np.float32)

    def probabilities(self, plain: str) -> dict[str, float]:
        """How likely a normalised text asks for each item, or for `NONE`."""
        bucket_F, value_F = features(plain)
        score_C = value_F @ self._weight_BC[bucket_F] + self._bias_C
        relative_C = np.exp(score_C - score_C.max())
        return dict(zip(self.names, (relative_C / relative_C.sum()).tolist(), strict=True))


@cache
def classifier() -> Classifier:
    """The one that is shipped."""
    return Classifier(Path(__file__).with_suffix(".npz"))
