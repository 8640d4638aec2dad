"""Pictures that are the same to the eye, and people who stand in several splits: found, and one of each pair dropped.

Pictures are compared by their perceptual hashes of 256 bits (`core.images`). Candidates share one of 16 slices of 16
bits, so pairs that differ in at most 15 bits are all found without comparing every two pictures.

A picture is also held against the mirror images of those in another split: mirrored copies leak, while within a split
they are training material.

Of a pair in two splits the copy farther from the test goes (train before validation before test). Of a pair in one
split the later goes, unless both are known to be of one person: frames of a video are alike and stay. A person in
several splits keeps the rows of the split nearest to the test. The very same bytes stay once in any case. About 230
bytes a picture stay in memory.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from facemllm.tables import SPLITS
from facemllm.version.tombstones import FORGOTTEN

_SLICES = 16
_BYTES = 32
_CROWD = 2000  # of one slice's value: pictures beyond it are compared with their nearest neighbours in order only

Groups = tuple[tuple[str, str], ...]
"""Name and value of every group that a row belongs to, as (("gender", "female"), ...)."""


@dataclass
class Census:
    """What is remembered of every row while a table is written, to decide afterwards which rows have to go."""

    bits: int
    hashes: bytearray = field(default_factory=bytearray)
    mirrored: bytearray = field(default_factory=bytearray)
    first: array[int] = field(default_factory=lambda: array("q"))
    splits: bytearray = field(default_factory=bytearray)
    subjects: array[int] = field(default_factory=lambda: array("q"))
    barred: bytearray = field(default_factory=bytearray)
    kinds: array[int] = field(default_factory=lambda: array("I"))
    _kinds: dict[Groups, int] = field(default_factory=dict)
    _numbers: dict[str, int] = field(default_factory=dict)
    _rows: dict[bytes, int] = field(default_factory=dict)

    def add(self, image_id: str, hashes: bytes, split: str, subject_id: str | None, groups: Groups = ()) -> None:
        """Note the next row: image, perceptual hashes (its own, its mirror image's), split, subject (None if unknown),
        the groups it belongs to."""
        row = len(self.splits)
        self.first.append(self._rows.setdefault(bytes.fromhex(image_id)[:16], row))
        self.hashes += hashes[:_BYTES]
        self.mirrored += hashes[_BYTES:]
        self.kinds.append(self._kinds.setdefault(groups, len(self._kinds)))
        self.splits.append(SPLITS.index(split))
        self.subjects.append(-1 if subject_id is None else self._numbers.setdefault(subject_id, len(self._numbers)))

    def bar(self, hashes: bytes) -> None:
        """Note the perceptual hash of a picture that was forgotten: what looks like it goes, too."""
        self.barred += hashes[:_BYTES]

    def dropped(self) -> dict[int, str]:
        """Rows to leave out, with the reason."""
        reasons = dict(self._leaked_subjects())
        same = [(first, row, "the same picture as") for row, first in enumerate(self.first) if first != row]
        for first, second, kind in (*same, *self._alike()):
            if first in reasons or second in reasons:
                continue
            if second >= len(self.splits):
                if first < len(self.splits):
                    reasons[first] = FORGOTTEN
                continue
            kept, gone = sorted((first, second), key=lambda row: (-self.splits[row], row))
            reasons[gone] = f"{kind} row {kept} of the {SPLITS[self.splits[kept]]} split"
        return dict(sorted(reasons.items()))

    def counted(self, without: Collection[int]) -> dict[str, dict[str, int]]:
        """Number of rows, but for those left out, by name and value of their groups."""
        rows = Counter(kind for row, kind in enumerate(self.kinds) if row not in without)
        names: dict[str, dict[str, int]] = {}
        for groups, kind in self._kinds.items():
            for name, value in groups:
                values = names.setdefault(name, {})
                values[value] = values.get(value, 0) + rows[kind]
        return {name: dict(sorted(values.items())) for name, values in sorted(names.items())}

    def report(self, dropped: Mapping[int, str]) -> dict[str, int]:
        """How many rows are dropped, by kind and split."""
        counts: Counter[str] = Counter()
        for row, reason in dropped.items():
            kind = "people in two splits" if reason.startswith("the same person") else "pictures alike"
            kind = FORGOTTEN if reason == FORGOTTEN else kind
            counts[f"{kind}, {SPLITS[self.splits[row]]}"] += 1
        return dict(sorted(counts.items()))

    def _leaked_subjects(self) -> Iterator[tuple[int, str]]:
        nearest: dict[int, int] = {}
        for subject, split in zip(self.subjects, self.splits, strict=True):
            nearest[subject] = max(nearest.get(subject, 0), split)
        for row, (subject, split) in enumerate(zip(self.subjects, self.splits, strict=True)):
            if subject >= 0 and split < nearest[subject]:
                yield row, f"the same person stands in the {SPLITS[nearest[subject]]} split"

    def _alike(self) -> Iterator[tuple[int, int, str]]:
        """Pairs of rows (first < second) that look alike, in order, with the words for how. Rows beyond the last are
        those barred."""
        rows, barred = len(self.splits), len(self.barred) // _BYTES
        if rows + barred < 2:
            return
        homes = np.concatenate([np.frombuffer(self.splits, np.uint8), np.full(barred, len(SPLITS), np.uint8)])
        # a pair in two splits has a row beyond training; what is barred has no mirror image of its own
        turned = np.arange(rows) if barred else np.flatnonzero(homes[:rows])
        mirrored = np.frombuffer(bytes(self.mirrored), np.uint8).reshape(rows, _BYTES)[turned]
        plain = np.frombuffer(bytes(self.hashes + self.barred), np.uint8).reshape(-1, _BYTES)
        codes, row_of = np.concatenate([plain, mirrored]), np.concatenate([np.arange(len(plain)), turned])
        is_mirrored = np.arange(len(codes)) >= len(plain)
        # neighbouring frequencies go together, so bits are interleaved over the slices
        bits = np.unpackbits(codes, axis=1).reshape(-1, _SLICES, 16).transpose(0, 2, 1).reshape(-1, 256)
        keys = np.packbits(bits, axis=1).view(np.uint16)
        people = np.array([*self.subjects, *[-1] * barred], np.int64)
        found: dict[tuple[int, int], tuple[bool, int]] = {}

        def compare(group: NDArray[np.int64]) -> None:
            """Note the pairs of a group that differ in few bits, but for those of one person in one split, and mirror
            images in one split."""
            words = codes[group].view(np.uint64)
            reach = min(len(group) - 1, _CROWD)
            for step in range(1, reach + 1):
                distance = np.bitwise_count(words[step:] ^ words[:-step]).sum(axis=1)
                close = np.flatnonzero(distance <= self.bits)
                if not len(close):
                    continue
                ends = np.stack([group[close], group[close + step]])
                (one, other), sides = np.sort(row_of[ends], axis=0), is_mirrored[ends].sum(axis=0)
                apart = ((people[one] != people[other]) | (people[one] < 0)) & (sides == 0)
                apart |= (homes[one] != homes[other]) & (sides < 2)
                for place in np.flatnonzero(apart):
                    pair, how = (int(one[place]), int(other[place])), (bool(sides[place]), int(distance[close[place]]))
                    found[pair] = min(found.get(pair, how), how)

        for column in range(_SLICES):
            order = np.argsort(keys[:, column], kind="stable")
            values = keys[order, column]
            edges = np.flatnonzero(np.diff(values)) + 1
            for group in np.split(order, edges):
                if len(group) > 1:
                    compare(group)
        for (first, second), (turned_over, distance) in sorted(found.items()):
            looks = "looks like the mirror image of" if turned_over else "looks like"
            yield first, second, f"{looks} ({distance} of 256 bits differ)"
