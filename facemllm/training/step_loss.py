"""The loss of one step: the stage's objective, and what the knowledge branch adds to it.

L = objective + bce_weight * L_bce + logic_weight * L_c (FaceInsight, arXiv 2504.15624): `answers` is the cross-entropy
of an answer token, `caption_words` of a face's caption words; L_bce is the binary cross-entropy of a known
characteristic, L_c the penalty that a face's scores pay for broken relations. Each is a mean over the global batch, so
that slices of it, on other workers or one after another, add up to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facemllm.knowledge.penalties import Penalties, bce
from facemllm.knowledge.relations import Relation
from facemllm.model.forward import look, tower_features
from facemllm.model.pixels import normalise
from facemllm.model.prompts import Frame
from facemllm.model.segmentation import NO_MAP
from facemllm.settings import Knowledge, Stage
from facemllm.training import augment
from facemllm.training.data import Corpus
from facemllm.training.objectives import CaptionWords, answer_losses
from facemllm.training.packing import Plan, pack, word_bags


@dataclass(frozen=True)
class Faces:
    """What a stage learns from: pixels (rows, S, S, 3), maps of face parts (rows, S, S) if the model takes them, and
    the labels of its characteristics (corpus rows, A), 1, 0 or -1 for unknown, if it scores them."""

    pixels: NDArray[np.uint8]
    maps: NDArray[np.uint8] | None = None
    labels: NDArray[np.int8] | None = None
    relations: tuple[Relation, ...] = ()


@dataclass(frozen=True)
class Value:
    """A slice's share of the step's loss. `report` holds the terms, then the summed loss and the number of answer
    tokens of each task, in the order of `StepLoss.names`; `tokens` is what the language model was given."""

    loss: Tensor
    report: Tensor
    tokens: int


class StepLoss:
    """Computes the loss of slices of a plan. `names` are the terms: `loss`, then its parts."""

    def __init__(
        self,
        stage: Stage,
        knowledge: Knowledge,
        model: Any,
        processor: Any,
        corpus: Corpus,
        faces: Faces,
        *,
        device: torch.device,
        bf16: bool,
    ) -> None:
        self.stage, self.knowledge, self.model, self.corpus, self.faces = stage, knowledge, model, corpus, faces
        self.device, self.bf16 = device, bf16
        self.image_processor = processor.image_processor
        self.prefix_ids = Frame.of(model, processor).prefix_ids
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        words = stage.objective == "caption_words"
        self.words = CaptionWords(corpus, stage.tasks, self.vocabulary, device) if words else None
        self.scores = faces.labels is not None
        self.penalties = Penalties(faces.relations, model.model.knowledge.names).to(device) if self.scores else None
        extra = ("loss/characteristics", "loss/logic") if self.scores else ()
        self.names = ("loss", f"loss/{stage.objective}", *extra)

    def __call__(self, plan: Plan, part: slice) -> Value:
        """The share of faces `part` in the step's loss."""
        turns = plan.turns[part]
        mirrored = plan.changes.mirror[part] if plan.changes else np.zeros(len(turns), bool)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            seen = look(self.model, self._features(plan, part), self._maps(plan, part))
            tasks = torch.zeros(2, len(self.corpus.tasks), device=self.device)
            if self.words is not None:
                bag_BV = torch.from_numpy(word_bags(self.corpus, turns, mirrored, self.vocabulary)).to(self.device)
                objective = self.words.loss(self.model, seen.visual_BND, bag_BV) / len(plan.rows)
                tokens = seen.visual_BND.shape[0] * seen.visual_BND.shape[1]
            else:
                packed = pack(self.corpus, turns, mirrored)
                losses_K, task_K = answer_losses(self.model, seen.tokens_BND, self.prefix_ids, packed)
                objective = losses_K.sum() / plan.labels
                tasks[0].index_add_(0, task_K, losses_K.detach())
                tasks[1].index_add_(0, task_K, torch.ones_like(losses_K))
                tokens = packed.ids.size + len(turns) * len(self.prefix_ids)
            terms = [objective, *self._knowledge(seen.scores_BA, plan, part)]
        loss = terms[0]
        for term in terms[1:]:
            loss = loss + term
        return Value(loss, torch.cat([torch.stack([loss, *terms]).detach().float(), tasks.flatten()]), tokens)

    def readable(self, total: Tensor, steps: int) -> dict[str, float]:
        """The sum of `steps` reports of whole steps as metrics: mean of each term, mean loss by task."""
        values = total.tolist()
        known = len(self.names)
        metrics = {name: value / steps for name, value in zip(self.names, values, strict=False)}
        sums, counts = values[known : known + len(self.corpus.tasks)], values[known + len(self.corpus.tasks) :]
        by_task = zip(self.corpus.tasks, sums, counts, strict=True)
        return metrics | {f"loss/task/{task}": value / count for task, value, count in by_task if count}

    def _features(self, plan: Plan, part: slice) -> Tensor:
        pixels_BSSC = torch.from_numpy(self.faces.pixels[self.corpus.pixel_row[plan.rows[part]]]).to(self.device)
        if plan.changes:
            pixels_BSSC = augment.apply(pixels_BSSC, plan.changes.part(part))
        return tower_features(self.model, normalise(pixels_BSSC, self.image_processor))

    def _maps(self, plan: Plan, part: slice) -> Tensor | None:
        if self.faces.maps is None:
            return None
        maps_BSS = torch.from_numpy(self.faces.maps[self.corpus.pixel_row[plan.rows[part]]]).to(self.device)
        if plan.changes:
            maps_BSS = augment.apply_to_maps(maps_BSS, plan.changes.part(part))
        maps_BSS[torch.from_numpy(plan.withheld[part]).to(self.device)] = NO_MAP
        return maps_BSS

    def _knowledge(self, scores_BA: Tensor | None, plan: Plan, part: slice) -> list[Tensor]:
        if scores_BA is None or self.faces.labels is None or self.penalties is None:
            return []
        labels_BA = torch.from_numpy(self.faces.labels[plan.rows[part]]).to(self.device)
        known = max(1, int((self.faces.labels[plan.rows] >= 0).sum()))
        missed, _ = bce(scores_BA, labels_BA)
        broken = self.penalties(scores_BA.sigmoid()).sum() / len(plan.rows)
        return [self.knowledge.bce_weight * missed / known, self.knowledge.logic_weight * broken]
