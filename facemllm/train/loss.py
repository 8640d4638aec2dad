"""The loss of one step: the stage's objective, and what the knowledge branch adds to it.

L = objective + bce_weight * L_bce + logic_weight * L_c (FaceInsight, arXiv 2504.15624): `answers` is the cross-entropy
of an answer token, `caption_words` of a face's caption words, which image and map, if there is one, must each tell
alone; L_bce is the binary cross-entropy of a known characteristic, L_c the penalty that a face's scores pay for broken
relations. Each is a mean over the global batch, so that parts of it, on other workers or one after another, add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from facemllm.knowledge.penalties import Penalties, bce
from facemllm.model.forward import look, tower_features
from facemllm.model.pixels import normalise
from facemllm.model.segmentation import has_map
from facemllm.settings import Knowledge, Stage
from facemllm.train import augment
from facemllm.train.batches import Batch, Faces, on
from facemllm.train.data import Corpus
from facemllm.train.objectives import CaptionWords, token_losses
from facemllm.train.rows import row_states

_COUNTS = ("tokens", "cells", "questions")


@dataclass(frozen=True)
class Value:
    """A batch's share of the step's loss, and what is told of it: the terms, then the summed loss and the number of
    answer tokens of each task, then counts, in the order of `StepLoss.names`, the tasks and `_COUNTS`."""

    loss: Tensor
    report: Tensor


class StepLoss:
    """Computes the loss of batches of a plan. `names` are the terms: `loss`, then its parts."""

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
        self.stage, self.knowledge, self.model, self.corpus = stage, knowledge, model, corpus
        self.device, self.bf16 = device, bf16
        self.image_processor = processor.image_processor
        vocabulary = model.get_input_embeddings().weight.shape[0]
        words = stage.objective == "caption_words"
        self.words = CaptionWords(corpus, stage.tasks, vocabulary, device) if words else None
        self.scores = faces.labels is not None
        self.penalties = Penalties(faces.relations, model.model.knowledge.names).to(device) if self.scores else None
        extra = ("loss/characteristics", "loss/logic") if self.scores else ()
        self.names = ("loss", f"loss/{stage.objective}", *extra)

    def __call__(self, batch: Batch) -> Value:
        """The share of a batch in the step's loss."""
        batch = on(batch, self.device)
        tokens, cells = batch.tokens, batch.cells
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            maps_BSS = self._maps(batch)
            seen = look(self.model, self._features(batch), maps_BSS)
            tasks = torch.zeros(2, len(self.corpus.tasks), device=self.device)
            if self.words is not None and batch.words_BV is not None:
                objective = self._told(self.words, seen.views, maps_BSS, batch.words_BV) / batch.images
                tokens = cells = sum(view_BND.shape[0] * view_BND.shape[1] for view_BND in seen.views)
            else:
                packed = dict(batch.packed or {})
                at_K, target_K, task_K = packed.pop("at"), packed.pop("target"), packed.pop("task")
                renamed = ("ids", "face", "block", "position")
                rows = {f"{name}_RL": packed[name] for name in renamed}
                states = row_states(self.model, seen.tokens_BND, **rows, image_I=packed["image"])
                losses_K = token_losses(self.model, states[at_K], target_K)
                objective = losses_K.sum() / max(batch.answer_tokens, 1)
                tasks[0].index_add_(0, task_K, losses_K.detach())
                tasks[1].index_add_(0, task_K, torch.ones_like(losses_K))
            terms = [objective, *self._knowledge(seen.scores_BA, batch)]
        loss = terms[0]
        for term in terms[1:]:
            loss = loss + term
        told = torch.stack([loss, *terms]).detach().float()
        counts = torch.tensor([tokens, cells, batch.questions], dtype=torch.float32, device=self.device)
        return Value(loss, torch.cat([told, tasks.flatten(), counts]))

    def counts(self, report: Tensor) -> dict[str, int]:
        """`tokens` the language model was given, `cells` with padding, `questions`: of the summed report of a step."""
        return {name: int(value) for name, value in zip(_COUNTS, report[-len(_COUNTS) :].tolist(), strict=True)}

    def readable(self, total: Tensor, steps: int) -> dict[str, float]:
        """The sum of `steps` reports of whole steps as metrics: mean of each term, mean loss by task, padding."""
        values = total.tolist()
        known = len(self.names)
        metrics = {name: value / steps for name, value in zip(self.names, values, strict=False)}
        sums, counts = values[known : known + len(self.corpus.tasks)], values[known + len(self.corpus.tasks) :]
        by_task = zip(self.corpus.tasks, sums, counts, strict=False)
        metrics |= {f"loss/task/{task}": value / count for task, value, count in by_task if count}
        seen = self.counts(total)
        return metrics | {"padding": 1 - seen["tokens"] / max(seen["cells"], 1)}

    def _features(self, batch: Batch) -> Tensor:
        if batch.features_BNF is not None:
            return batch.features_BNF
        pixels_BSSC = batch.pixels_BSSC
        assert pixels_BSSC is not None
        if batch.changes is not None:
            pixels_BSSC = augment.apply(pixels_BSSC, batch.changes)
        return tower_features(self.model, normalise(pixels_BSSC, self.image_processor))

    def _maps(self, batch: Batch) -> Tensor | None:
        if batch.maps_BSS is None or batch.changes is None:
            return batch.maps_BSS
        return augment.apply_to_maps(batch.maps_BSS, batch.changes)

    def _told(
        self, words: CaptionWords, views: tuple[Tensor, ...], maps_BSS: Tensor | None, words_BV: Tensor
    ) -> Tensor:
        """What image and map miss of the caption's words, each alone; a face without a map has only its image."""
        missed = words.loss(self.model, views[0], words_BV)
        if maps_BSS is not None and len(views) > 1:
            there_B = has_map(maps_BSS)
            missed = missed + words.loss(self.model, views[1][there_B], words_BV[there_B])
        return missed

    def _knowledge(self, scores_BA: Tensor | None, batch: Batch) -> list[Tensor]:
        if scores_BA is None or batch.labels_BA is None or self.penalties is None:
            return []
        missed, _ = bce(scores_BA, batch.labels_BA)
        broken = self.penalties(scores_BA.sigmoid()).sum() / batch.images
        return [
            self.knowledge.bce_weight * missed / batch.known_labels,
            self.knowledge.logic_weight * broken,
        ]
