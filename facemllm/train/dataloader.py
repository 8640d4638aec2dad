"""Batches of a stage: which faces and turns a step shows, how they are augmented, and their tensors, collated while the
step before computes.

All of step `t` is a function of (seed, stage, t): a resumed run needs no random state, and each of N workers takes its
slice of the same plan. Batches are collated in numpy: torch's operators would bring a second pool of threads, and both
would wait for cores.
Shapes: B faces of a batch, S image side, A characteristics, V vocabulary, N image tokens, F width of the tower.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facemllm.core import progress
from facemllm.errors import UserError
from facemllm.model.branches import NO_MAP
from facemllm.model.families import family_of
from facemllm.train.augment import Changes, draw_changes
from facemllm.train.caption_words import weight_beside_answers
from facemllm.train.corpus import Corpus, FaceDataset
from facemllm.train.features import with_features
from facemllm.train.packing import Packed, face_lengths, pack, word_bags
from facemllm.train.stage import StageRun


@dataclass(frozen=True)
class Plan:
    """What one step shows, for the global batch."""

    rows: NDArray[np.int64]  # (B,) rows of the corpus
    changes: Changes | None
    turns: list[NDArray[np.int64]]  # per face: its drawn turns, a turn that follows right after its predecessor
    labels: int  # answer tokens in the whole batch
    withheld: NDArray[np.bool_]  # (B,) faces shown without their map
    small: bool  # whether pictures are shown at two thirds of their side


class BatchSampler:
    """Draws the faces, turns and changes of every step of a stage; faces are `side` pixels wide.

    A turn that follows is drawn with its predecessor, unless its task or that of a turn between is not of the stage.
    A question that would need more than `limit` tokens, with the `prefix` tokens before it and whatever follows it, is
    never drawn: `left_out` lists such conversations as (image_id, tokens). Raises UserError when nothing is left.
    """

    def __init__(self, run: StageRun, corpus: Corpus, side: int, *, prefix: int = 0, limit: int | None = None) -> None:
        name, self.corpus, self.stage, self.side = run.name, corpus, run.stage, side
        self._withheld = run.settings.model.segmentation.drop
        self._key = (run.settings.seed, zlib.crc32(name.encode()))
        forms = run.settings.reformat.forms.model_dump(include={"native", "statement", "lettered"})
        weights = corpus.weights(self.stage.tasks, forms)
        self._mixed = weights > 0
        # a turn that follows is drawn with the turn it depends on, never alone
        self._weights = np.where(corpus.follows, 0.0, weights)
        if not self._weights.any():
            raise UserError(
                f"stage {name}: no conversation has a question of {', '.join(self.stage.tasks)}; the table has "
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
        draw = np.random.default_rng
        self._order = lru_cache(maxsize=2)(lambda epoch: draw([*self._key, 1, epoch]).permutation(self._usable))

    def plan(self, step: int) -> Plan:
        """The plan of step `step`, counted from 0."""
        images, faces = self.stage.batch_images, len(self._usable)
        numbers = np.arange(step * images, (step + 1) * images)
        rows = np.array([self._order(int(n) // faces)[int(n) % faces] for n in numbers])
        generator = np.random.default_rng([*self._key, 2, step])
        changes = draw_changes(generator, images, self.side, self.stage.disturb) if self.stage.augment else None
        turns = [self._draw(int(row), generator) for row in rows]
        mirrored = changes.mirror.astype(int) if changes else np.zeros(images, int)
        answers = [self.corpus.answer[drawn, side] for drawn, side in zip(turns, mirrored, strict=True)]
        labels = int(self.corpus.texts.lengths[np.concatenate(answers)].sum())
        withheld = generator.random(images) < self._withheld
        return Plan(rows, changes, turns, labels, withheld, step < self.stage.small_pictures * self.stage.steps)

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


@dataclass(frozen=True)
class Batch:
    """Some faces of a step and what is asked of them; the last three count over the global batch."""

    pixels_BSSC: Tensor | None
    features_BNF: Tensor | None
    maps_BSS: Tensor | None
    labels_BA: Tensor | None
    words_BV: Tensor | None  # caption words, if the stage is about these or learns them beside
    packed: dict[str, Tensor] | None  # fields of `Packed`, if the stage is about answers
    changes: Changes | None
    faces: int
    tokens: int  # that the language model is given, padding not counted; 0 if it is not run
    cells: int  # the same with padding
    questions: int
    images: int
    answer_tokens: int
    known_labels: int
    small: bool

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on `device`."""
        if device.type == "cpu":
            return self

        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: moved(one) for name, one in value.items()}
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        return replace(self, **{f.name: moved(getattr(self, f.name)) for f in fields(Batch)})


class DataLoader:
    """A rank's batches of every step. `sampler.left_out` are the questions that are too long. A rank's slice of a step
    is cut into batches of at most `train.micro_images` faces, of like length, so that little of a row is padding; each
    term of a batch's loss is a share of the global mean, so the batches add up to the step."""

    def __init__(self, run: StageRun, model: Any, processor: Any, dataset: FaceDataset) -> None:
        """Builds tower features if they are wanted and not there. Raises UserError when there is nothing to show."""
        answers = run.stage.objective == "answers"
        words = not answers or weight_beside_answers(run.stage, dataset.corpus) > 0
        self.run, self._family = run, family_of(model.config, processor)
        self._prefix_ids = self._family.frame.prefix_ids
        self._answers = answers
        self._vocabulary = model.get_input_embeddings().weight.shape[0] if words else None
        self._captions = dataset.corpus.captions() if answers and words else None
        self.sampler = BatchSampler(
            run,
            dataset.corpus,
            dataset.pixels.shape[1],
            prefix=len(self._prefix_ids),
            limit=self._family.longest if answers else None,
        )
        self._weights = dataset.corpus.class_weights(run.stage.class_weights)
        left_out = self.sampler.left_out
        if left_out and run.rank == 0:
            named = ", ".join(f"{image} ({tokens} tokens)" for image, tokens in left_out[:3])
            progress.event(note=f"{len(left_out)} questions are too long and left out, of images {named}")
        self.dataset = with_features(run, model, self._family, dataset)

    def batches(self, step: int) -> list[Batch]:
        """This rank's batches of a step, counted from 0."""
        return self._cut(self.sampler.plan(step), self.run.rank_slice)

    def sample(self, step: int) -> Batch:
        """A batch of the step to count operations on: of one face where memory is short."""
        part = self.run.rank_slice
        if self.run.settings.train.recompute:
            part = slice(part.start, part.start + 1)
        return self._cut(self.sampler.plan(step), part)[0]

    def image_ids(self, step: int) -> list[str]:
        """Ids of the images of the whole step."""
        return [self.dataset.corpus.image_id[int(row)].as_py() for row in self.sampler.plan(step).rows]

    def _cut(self, plan: Plan, part: slice) -> list[Batch]:
        """The batches of the faces `part` of the global batch."""
        mirrored = plan.changes.mirror if plan.changes else np.zeros(len(plan.rows), bool)
        index = np.arange(len(plan.rows))[part]
        pieces, micro_images = [index], self.run.settings.train.micro_images
        if micro_images:
            lengths = face_lengths(self.dataset.corpus, [plan.turns[i] for i in index], mirrored[index])
            index = index[np.argsort(-lengths, kind="stable")]
            count = -(-len(index) // micro_images)
            if self.run.sharded:  # its ranks gather weights together, so all make the same number of batches
                images, world_size = self.run.stage.batch_images, self.run.world_size
                largest = -(-images // world_size)
                count = min(-(-largest // micro_images), images // world_size)
            pieces = np.array_split(index, count)
        labels = self.dataset.labels
        known = 0 if labels is None else max(1, int((labels[plan.rows] >= 0).sum()))
        return [self._collate(plan, piece, mirrored[piece], known) for piece in pieces if len(piece)]

    def _collate(self, plan: Plan, index: NDArray[np.int64], mirrored: NDArray[np.bool_], known: int) -> Batch:
        data, train = self.dataset, self.run.settings.train
        rows, turns = plan.rows[index], [plan.turns[i] for i in index]
        pixel_rows = data.corpus.pixel_row[rows]
        maps, packed, words = None, None, None
        if data.maps is not None:
            maps = data.maps[pixel_rows]
            maps[plan.withheld[index]] = NO_MAP
        if self._answers:
            packed = pack(
                data.corpus,
                turns,
                mirrored,
                self._prefix_ids,
                self._family.image_token_id,
                row_tokens=train.row_tokens,
                multiple=64 if train.compile else 8,  # fewer shapes to compile for
                weights=self._weights,
                plain=not self._family.packs,
            )
        if self._vocabulary is not None:
            said = turns if self._captions is None else [one[one >= 0] for one in self._captions[rows][:, None]]
            words = word_bags(data.corpus, said, mirrored, self._vocabulary)
        return Batch(
            pixels_BSSC=self._tensor(data.pixels[pixel_rows] if data.features is None else None),
            features_BNF=self._tensor(None if data.features is None else data.features[rows]),
            maps_BSS=self._tensor(maps),
            labels_BA=self._tensor(None if data.labels is None else data.labels[rows]),
            words_BV=self._tensor(words),
            packed=None if packed is None else {f.name: self._tensor(getattr(packed, f.name)) for f in fields(Packed)},
            changes=plan.changes.part(index) if plan.changes else None,
            faces=len(index),
            tokens=packed.tokens if packed is not None else 0,
            cells=packed.ids.size if packed is not None else 0,
            questions=sum(map(len, turns)),
            images=len(plan.rows),
            answer_tokens=plan.labels,
            known_labels=known,
            small=plan.small,
        )

    def _tensor(self, values: NDArray[np.generic] | Tensor | None) -> Any:
        if values is None:
            return None
        tensor = values if isinstance(values, Tensor) else torch.from_numpy(values)
        return tensor.pin_memory() if self.run.device.startswith("cuda") else tensor


def prefetch(make: Callable[[int], list[Batch]], first: int, end: int) -> Iterator[list[Batch]]:
    """`make(step)` for every step, each made in a thread while the caller is busy with the one before it."""
    with ThreadPoolExecutor(1, "batches") as thread:
        coming = thread.submit(make, first) if first < end else None
        for step in range(first, end):
            assert coming is not None
            ready = coming.result()
            coming = thread.submit(make, step + 1) if step + 1 < end else None
            yield ready
