"""What one rank is shown of a stage: its batches of every step, from kept tower features where these save work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from facemllm.core import progress
from facemllm.model.prompts import Frame
from facemllm.train import features
from facemllm.train.batches import Batch, Batcher, Faces
from facemllm.train.data import Corpus
from facemllm.train.job import Job
from facemllm.train.packing import Planner


class Source:
    """The batches of a job. `left_out` are the questions that are too long, as (image_id, tokens)."""

    def __init__(self, job: Job, model: Any, processor: Any, corpus: Corpus, faces: Faces) -> None:
        """Builds tower features if they are wanted and not there. Raises UserError when there is nothing to show."""
        self._job, self._corpus = job, corpus
        answers = job.stage.objective == "answers"
        prefix = Frame.of(model, processor).prefix_ids
        self._planner = Planner(
            corpus,
            job.stage,
            job.name,
            job.seed,
            faces.pixels.shape[1],
            job.model.segmentation.drop,
            prefix=len(prefix),
            limit=getattr(model.config.text_config, "max_position_embeddings", None) if answers else None,
        )
        self.left_out = self._planner.left_out
        if self.left_out and job.rank == 0:
            named = ", ".join(f"{image} ({tokens} tokens)" for image, tokens in self.left_out[:3])
            progress.event(note=f"{len(self.left_out)} questions are too long and left out, of images {named}")
        self._batcher = Batcher(
            corpus,
            _with_features(job, model, processor, corpus, faces),
            prefix,
            model.config.image_token_id,
            None if answers else model.get_input_embeddings().weight.shape[0],
            micro_images=job.micro_images,
            row_tokens=job.row_tokens,
            multiple=64 if job.compile else 8,  # fewer shapes to compile for
            pinned=job.device.startswith("cuda"),
        )

    def batches(self, step: int) -> list[Batch]:
        """This rank's batches of a step, counted from 0."""
        return self._batcher(self._planner.plan(step), self._job.part, _pieces(self._job))

    def sample(self, step: int) -> Batch:
        """A batch of the step to count operations on: of one face where memory is short."""
        part = self._job.part
        return self._batcher(
            self._planner.plan(step), slice(part.start, part.start + 1) if self._job.recompute else part
        )[0]

    def images(self, step: int) -> list[str]:
        """Ids of the images of the whole step."""
        return [self._corpus.image_id[int(row)].as_py() for row in self._planner.plan(step).rows]


def _pieces(job: Job) -> int:
    """Batches of a step on every rank of a sharded model, whose ranks gather weights together; 0: as a rank needs."""
    if not (job.sharded and job.micro_images):
        return 0
    least, most = job.stage.batch_images // job.world, -(-job.stage.batch_images // job.world)
    return min(-(-most // job.micro_images), least)


def _with_features(job: Job, model: Any, processor: Any, corpus: Corpus, faces: Faces) -> Faces:
    """Faces with the features of a frozen tower, where the stage shows each face at least once, as it is."""
    stage = job.stage
    if not job.feature_cache or job.cache is None or stage.trains.tower != "frozen" or stage.augment:
        return faces
    if stage.steps * stage.batch_images < len(corpus):
        return faces
    folder = job.cache / features.name_of(model, processor.image_processor, job.table, corpus.pixel_row, job.precision)
    kept = features.cached(
        folder,
        model,
        processor.image_processor,
        faces.pixels,
        corpus.pixel_row,
        device=torch.device(job.device),
        bf16=job.precision == "bf16",
        rank=job.rank,
        world=job.world,
        wait=dist.barrier if job.world > 1 else lambda: None,
    )
    return replace(faces, features=kept)
