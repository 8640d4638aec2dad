"""What one forward and backward pass reads, gathered from memory maps while the step before computes.

It is gathered in numpy: torch's operators would bring a second pool of threads, and both pools would wait for cores.

A rank's slice of a step is cut into batches of at most `micro_images` faces, of like length, so that little of a row is
padding; each term of a batch's loss is a share of the global mean, so the batches add up to the step.
Shapes: B faces of a batch, S image side, A characteristics, V vocabulary, K answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facemllm.knowledge.relations import Relation
from facemllm.model.segmentation import NO_MAP
from facemllm.train.augment import Changes
from facemllm.train.data import Corpus
from facemllm.train.features import Features
from facemllm.train.packing import Packed, Plan, face_lengths, pack, word_bags


@dataclass(frozen=True)
class Faces:
    """What a stage learns from: pixels (rows, S, S, 3), maps of face parts (rows, S, S) if the model takes them, and
    the labels of its characteristics (corpus rows, A), 1, 0 or -1 for unknown, if it scores them. `features`, what a
    frozen tower says of every corpus row, stand in for the pixels."""

    pixels: NDArray[np.uint8]
    maps: NDArray[np.uint8] | None = None
    labels: NDArray[np.int8] | None = None
    relations: tuple[Relation, ...] = ()
    features: Features | None = None


@dataclass(frozen=True)
class Batch:
    """Some faces of a step and what is asked of them; the last three count over the global batch."""

    pixels_BSSC: Tensor | None
    features_BNF: Tensor | None
    maps_BSS: Tensor | None
    labels_BA: Tensor | None
    words_BV: Tensor | None  # caption words, if the stage is about these
    packed: dict[str, Tensor] | None  # fields of `Packed`, if the stage is about answers
    changes: Changes | None
    faces: int
    tokens: int  # that the language model is given, padding not counted; 0 if it is not run
    cells: int  # the same with padding
    questions: int
    images: int
    answer_tokens: int
    known_labels: int


class Batcher:
    """Cuts a rank's slice of a plan into batches. `row_tokens` and `multiple` shape the rows (see `packing.pack`)."""

    def __init__(
        self,
        corpus: Corpus,
        faces: Faces,
        prefix_ids: tuple[int, ...],
        image_token_id: int,
        vocabulary: int | None,
        *,
        micro_images: int = 0,
        row_tokens: int = 0,
        multiple: int = 8,
        pinned: bool = False,
    ) -> None:
        """`vocabulary` is given when the stage is about caption words; `pinned` memory is for a CUDA device."""
        self.corpus, self.faces, self.vocabulary = corpus, faces, vocabulary
        self.prefix_ids, self.image_token_id = prefix_ids, image_token_id
        self.micro_images, self.row_tokens, self.multiple, self.pinned = micro_images, row_tokens, multiple, pinned

    def __call__(self, plan: Plan, part: slice, pieces: int = 0) -> list[Batch]:
        """The batches of the faces `part` of the global batch; `pieces` says how many if `micro_images` shall not."""
        mirrored = plan.changes.mirror if plan.changes else np.zeros(len(plan.rows), bool)
        index = np.arange(len(plan.rows))[part]
        cut = [index]
        if self.micro_images:
            lengths = face_lengths(self.corpus, [plan.turns[i] for i in index], mirrored[index])
            index = index[np.argsort(-lengths, kind="stable")]
            cut = np.array_split(index, pieces or -(-len(index) // self.micro_images))
        labels = self.faces.labels
        known = 0 if labels is None else max(1, int((labels[plan.rows] >= 0).sum()))
        return [self._batch(plan, piece, mirrored[piece], known) for piece in cut if len(piece)]

    def _batch(self, plan: Plan, index: NDArray[np.int64], mirrored: NDArray[np.bool_], known: int) -> Batch:
        corpus, faces = self.corpus, self.faces
        rows, turns = plan.rows[index], [plan.turns[i] for i in index]
        seen = corpus.pixel_row[rows]
        changes = plan.changes.part(index) if plan.changes else None
        maps = None
        if faces.maps is not None:
            maps = faces.maps[seen]
            maps[plan.withheld[index]] = NO_MAP
        packed, words = None, None
        if self.vocabulary is None:
            packed = pack(
                corpus,
                turns,
                mirrored,
                self.prefix_ids,
                self.image_token_id,
                row_tokens=self.row_tokens,
                multiple=self.multiple,
            )
        else:
            words = word_bags(corpus, turns, mirrored, self.vocabulary)
        return Batch(
            pixels_BSSC=None if faces.features is not None else self._held(faces.pixels[seen]),
            features_BNF=self._held(faces.features[rows]) if faces.features is not None else None,
            maps_BSS=None if maps is None else self._held(maps),
            labels_BA=None if faces.labels is None else self._held(faces.labels[rows]),
            words_BV=None if words is None else self._held(words),
            packed=None if packed is None else {f.name: self._held(getattr(packed, f.name)) for f in fields(Packed)},
            changes=changes,
            faces=len(index),
            tokens=packed.tokens if packed is not None else 0,
            cells=packed.ids.size if packed is not None else 0,
            questions=sum(map(len, turns)),
            images=len(plan.rows),
            answer_tokens=plan.labels,
            known_labels=known,
        )

    def _held(self, values: NDArray[np.generic] | Tensor) -> Tensor:
        tensor = values if isinstance(values, Tensor) else torch.from_numpy(values)
        return tensor.pin_memory() if self.pinned else tensor


def on(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    if device.type == "cpu":
        return batch

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: moved(one) for name, one in value.items()}
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

    return replace(batch, **{f.name: moved(getattr(batch, f.name)) for f in fields(Batch)})


def ahead(make: Callable[[int], list[Batch]], first: int, end: int) -> Iterator[list[Batch]]:
    """`make(step)` for every step, each made in a thread while the caller is busy with the one before it."""
    with ThreadPoolExecutor(1, "batches") as thread:
        coming = thread.submit(make, first) if first < end else None
        for step in range(first, end):
            assert coming is not None
            ready = coming.result()
            coming = thread.submit(make, step + 1) if step + 1 < end else None
            yield ready
