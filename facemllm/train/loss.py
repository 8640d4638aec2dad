"""The loss of one step: the stage's objective, and what the knowledge branch adds to it.

L = objective + bce_weight * L_bce + logic_weight * L_c (FaceInsight, arXiv 2504.15624). The objective `caption_words`
is L_w: what image and map, if there is one, each miss of a caption's words; `answers` is the cross-entropy of an answer
token, a rare class weighing more, and L_w of weight `caption_words` beside it. L_bce is the binary cross-entropy of a
known characteristic, L_c the penalty that a face's scores pay for broken relations. Each is a mean over the global
batch, so that parts of it, on other workers or one after another, add up.

Shapes: B faces, K answer tokens, N image tokens, D width, V vocabulary, U words in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from facemllm.errors import UserError
from facemllm.model.branches import has_map
from facemllm.model.face_mllm import VisualTokens
from facemllm.model.families import Family, family_of
from facemllm.model.forward import PADDING
from facemllm.train.augment import apply_changes, apply_to_maps
from facemllm.train.caption_words import CaptionWords, weight_beside_answers
from facemllm.train.corpus import CAPTION, FaceDataset
from facemllm.train.dataloader import Batch
from facemllm.train.penalties import Penalties, bce
from facemllm.train.smoothing import NumberSmoothing
from facemllm.train.stage import StageRun

LOGITS_BYTES = 64 * 2**20

_COUNTS = ("tokens", "cells", "questions")


@dataclass(frozen=True)
class Value:
    """A batch's share of the step's loss, and what is reported of it: the terms, then the summed loss and the number of
    answer tokens of each task, then counts, in the order of `StepLoss.names`, the tasks and `_COUNTS`."""

    loss: Tensor
    report: Tensor


class StepLoss:
    """Computes the loss of batches of a plan. `names` are the terms: `loss`, then its parts."""

    def __init__(self, run: StageRun, model: Any, processor: Any, dataset: FaceDataset) -> None:
        self.knowledge, self.model, self.corpus = run.settings.model.knowledge, model, dataset.corpus
        self.device, self.bf16 = torch.device(run.device), run.precision == "bf16"
        self.family = family_of(model.config, processor)
        if run.stage.small_pictures and not self.family.any_size:
            raise UserError(
                f"stage {run.name}: train.stages.{run.name}.small_pictures is {run.stage.small_pictures}, and "
                f"{model.config.model_type} takes pictures of one size alone; set it to 0"
            )
        vocabulary = model.get_input_embeddings().weight.shape[0]
        self.answers = run.stage.objective == "answers"
        self.beside = weight_beside_answers(run.stage, self.corpus)
        about = {CAPTION: 1.0} if self.answers else run.stage.tasks
        self.smoothing = NumberSmoothing(self.corpus, run.stage.number_smoothing, vocabulary, self.device)
        words = not self.answers or self.beside > 0
        self.words = CaptionWords(self.corpus, about, self.smoothing) if words else None
        self.penalties: Penalties | None = None
        extra: tuple[str, ...] = ("loss/caption_words",) if self.beside else ()
        if dataset.labels is not None:
            self.penalties = Penalties(dataset.relations, model.model.knowledge.names).to(self.device)
            extra += ("loss/characteristics", "loss/logic")
        self.names = ("loss", f"loss/{run.stage.objective}", *extra)

    def __call__(self, batch: Batch) -> Value:
        """The share of a batch in the step's loss."""
        batch = batch.to(self.device)
        tokens, cells = batch.tokens, batch.cells
        tasks = torch.zeros(2, len(self.corpus.tasks), device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            maps_BSS = self._maps(batch)
            visual = self.family.visual(self.model, self._features(batch), maps_BSS)
            terms = []
            if batch.packed is not None:
                states = self._states(visual, batch.packed)[batch.packed["at"]]
                losses_K = token_losses(self.family, self.model, states, batch.packed["target"], self.smoothing)
                terms.append((losses_K * batch.packed["weight"]).sum() / max(batch.answer_tokens, 1))
                tasks[0].index_add_(0, batch.packed["task"], losses_K.detach())
                tasks[1].index_add_(0, batch.packed["task"], torch.ones_like(losses_K))
            if self.words is not None and batch.words_BV is not None:
                missed = self._caption_words(self.words, visual.views, maps_BSS, batch.words_BV) / batch.images
                terms.append(self.beside * missed if self.answers else missed)
            if batch.packed is None:
                tokens = cells = sum(view_BND.shape[0] * view_BND.shape[1] for view_BND in visual.views)
            terms += self._knowledge(visual.scores_BA, batch)
        loss = terms[0]
        for term in terms[1:]:
            loss = loss + term
        values = torch.stack([loss, *terms]).detach().float()
        counts = torch.tensor([tokens, cells, batch.questions], dtype=torch.float32, device=self.device)
        return Value(loss, torch.cat([values, tasks.flatten(), counts]))

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
        done = self.counts(total)
        return metrics | {"padding": 1 - done["tokens"] / max(done["cells"], 1)}

    def _features(self, batch: Batch) -> Tensor:
        if batch.features_BNF is not None:
            return batch.features_BNF
        assert batch.pixels_BSSC is not None
        changed = batch.pixels_BSSC if batch.changes is None else apply_changes(batch.pixels_BSSC, batch.changes)
        inputs = self.family.inputs(changed)
        if batch.small:
            side = round(inputs["pixel_values"].shape[-1] * 2 / 3)
            smaller_BCSS = F.interpolate(inputs["pixel_values"], size=side, mode="bilinear", antialias=True)
            inputs = {"pixel_values": smaller_BCSS}
        return self.family.features(self.model, inputs)

    def _states(self, visual: VisualTokens, packed: dict[str, Tensor]) -> Tensor:
        """Last hidden states of all rows, flattened."""
        if self.family.packs:
            rows = [packed[name] for name in ("ids", "face", "block", "position", "image")]
            return self.family.packed(self.model, visual, *rows)
        face_RL, at = packed["face"], packed["at"]
        own_R, length = face_RL[:, 0], face_RL.shape[1]
        shown = visual.rows(own_R)
        start_R = torch.full_like(own_R, length).scatter_reduce(0, at // length, at % length + 1, "amin")
        mask_RL = (face_RL != PADDING).long()
        return self.family.plain(self.model, shown, packed["ids"], mask_RL, start_R).flatten(0, 1)

    def _maps(self, batch: Batch) -> Tensor | None:
        if batch.maps_BSS is None or batch.changes is None:
            return batch.maps_BSS
        return apply_to_maps(batch.maps_BSS, batch.changes)

    def _caption_words(
        self, words: CaptionWords, views: tuple[Tensor, ...], maps_BSS: Tensor | None, words_BV: Tensor
    ) -> Tensor:
        """What image and map miss of the caption's words, each alone, summed over the faces that have a caption; a face
        without a map has only its image."""
        told_B = words_BV.any(1)
        missed = words.loss(self.model, views[0][told_B], words_BV[told_B])
        if maps_BSS is not None and len(views) > 1:
            there_B = has_map(maps_BSS) & told_B
            missed = missed + words.loss(self.model, views[1][there_B], words_BV[there_B])
        return missed

    def _knowledge(self, scores_BA: Tensor | None, batch: Batch) -> list[Tensor]:
        if scores_BA is None or batch.labels_BA is None or self.penalties is None:
            return []
        missed, _ = bce(scores_BA, batch.labels_BA)
        broken = self.penalties(scores_BA.sigmoid()).sum() / batch.images
        return [self.knowledge.bce_weight * missed / batch.known_labels, self.knowledge.logic_weight * broken]


def token_losses(family: Family, model: Any, states_KD: Tensor, target_K: Tensor, smoothing: NumberSmoothing) -> Tensor:
    """Cross-entropy of every wanted token (K,), float32, from the states that predict them. Logits of more than
    `LOGITS_BYTES` are made in parts, in the backward pass once more: never all at once."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    part = max(1, LOGITS_BYTES // (4 * vocabulary))
    if len(states_KD) <= part:
        return _token_losses(family, model, states_KD, target_K, smoothing)
    parts = zip(states_KD.split(part), target_K.split(part), strict=True)
    part_losses = partial(_token_losses, family, model)
    return torch.cat([checkpoint(part_losses, *pair, smoothing, use_reentrant=False) for pair in parts])


def _token_losses(
    family: Family, model: Any, states_KD: Tensor, target_K: Tensor, smoothing: NumberSmoothing
) -> Tensor:
    return smoothing.cross_entropy(family.logits(model, states_KD), target_K)
