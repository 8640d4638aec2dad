"""What a stage minimises: next tokens of packed answers, or the words of the caption.

Shapes: B faces, T packed tokens, K answer tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from facemllm.model.forward import hidden_states, prefix_embeddings, word_logits
from facemllm.training.data import Corpus
from facemllm.training.packing import IGNORED, Packed


def answer_loss(model: Any, image_BND: Tensor, prefix_ids: tuple[int, ...], packed: Packed) -> Tensor:
    """Sum of the cross-entropies of all answer tokens (end tokens included) of packed rows, float32."""
    device = image_BND.device
    ids_BT, block_BT, position_BT, target_BT = (
        torch.from_numpy(a).to(device) for a in (packed.ids, packed.block, packed.position, packed.target)
    )
    prefix_BND = prefix_embeddings(model, image_BND, prefix_ids)
    states_BTD = hidden_states(model, prefix_BND, ids_BT, block_BT, None, position_BT)
    wanted_BT = target_BT != IGNORED
    return F.cross_entropy(word_logits(model, states_BTD[wanted_BT]), target_BT[wanted_BT], reduction="sum")


class CaptionWords:
    """The mean image token, times the tied word embeddings, tells which words the caption holds.

    Needs the caption's text alone. It teaches the tower and puts images into the word space without a pass of the
    language model, five times faster than answers do.
    """

    def __init__(self, corpus: Corpus, tasks: dict[str, float], vocabulary: int, device: torch.device) -> None:
        share_V = word_shares(corpus, tasks, vocabulary)
        self.used_U = torch.from_numpy(np.flatnonzero(share_V > 0)).to(device)
        share_U = torch.from_numpy(share_V[share_V > 0]).clamp(max=1 - 1e-3).to(device)
        self.prior_U = torch.logit(share_U).float()
        self.weight_U = WEIGHT(share_U)
        self.scale = SCALE

    def logits(self, model: Any, image_BND: Tensor) -> Tensor:
        """Log-odds of each used word (B, U)."""
        words_UD = model.get_input_embeddings().weight[self.used_U].float()
        return image_BND.float().mean(1) @ words_UD.T * self.scale + self.prior_U

    def loss(self, model: Any, image_BND: Tensor, bag_BV: Tensor) -> Tensor:
        """Sum over the faces, float32."""
        with torch.autocast(image_BND.device.type, enabled=False):
            return FORM(self, self.logits(model, image_BND), bag_BV[:, self.used_U])


def word_shares(corpus: Corpus, tasks: dict[str, float], vocabulary: int) -> np.ndarray:
    """Share of faces whose answers (of the given tasks) hold each word, plain and mirrored faces alike: (V,)."""
    count_V = np.zeros(vocabulary)
    chosen = corpus.weights(tasks) > 0
    for row in range(len(corpus)):
        turns = np.arange(*corpus.turn_starts[row : row + 2])
        for mirror in (0, 1):
            texts = [corpus.texts[corpus.answer[turn, mirror]] for turn in turns if chosen[turn]]
            if texts:
                count_V[np.unique(np.concatenate(texts))] += 0.5
    return count_V / len(corpus)


SCALE = 2.718
WEIGHT = lambda share_U: torch.ones_like(share_U).float()
FORM = lambda s, logit_BU, bag_BU: F.binary_cross_entropy_with_logits(
    logit_BU, bag_BU, weight=s.weight_U, reduction="sum"
)
