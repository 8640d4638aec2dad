"""What a stage minimises: next tokens of packed answers, or the words of the caption.

Shapes: B faces, K answer tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from facemllm.model.forward import word_logits
from facemllm.train.data import Corpus, Texts
from facemllm.train.packing import word_bags

LOGITS_BYTES = 64 * 2**20

# Logits are this times the dot product, so that words tell apart before the mean token has had to grow. Measured after
# 450 steps, expression accuracy and yaw error on validation: 2.7 -> .17, 5.9; 10 -> .24, 2.9; 30 -> .29, 2.6.
_SCALE = 30.0
_RAREST = 2.5e-3  # shares are held this far from 0 and 1, which bounds the weight of a rare word
_MEETINGS = 5.0  # words expected to meet this often that never do exclude each other (chance: e^-5)
_BLOCK = 1024


def token_losses(model: Any, states_KD: Tensor, target_K: Tensor) -> Tensor:
    """Cross-entropy of every wanted token (K,), float32, from the states that predict them.

    Logits of more than `LOGITS_BYTES` are made in parts, in the backward pass once more: never all at once.
    """
    vocabulary = model.get_output_embeddings().weight.shape[0]
    part = max(1, LOGITS_BYTES // (4 * vocabulary))
    if len(states_KD) <= part:
        return _token_losses(model, states_KD, target_K)
    parts = zip(states_KD.split(part), target_K.split(part), strict=True)
    return torch.cat([checkpoint(_token_losses, model, *pair, use_reentrant=False) for pair in parts])


def _token_losses(model: Any, states_KD: Tensor, target_K: Tensor) -> Tensor:
    return F.cross_entropy(word_logits(model, states_KD), target_K, reduction="none")


class CaptionWords:
    """The mean token of a view (image or map), times the tied word embeddings, tells which words the caption holds.

    Needs the caption's text alone. It teaches the tower and puts images into the word space without a pass of the
    language model, several times faster than answers do. Two terms, over words w with logits l_w:

    - each word present or absent: binary cross-entropy, rare words weighing more, by 1 / sd of their occurrence;
    - each present word against its rivals, the words that no caption of the training split ever puts beside it
      ("sad" beside "happy", "turned 20 degrees left" beside "... 25 ..."): softmax cross-entropy. The captions alone
      say which words exclude each other; pairs too rare to have met by chance are left out.

    Measured on validation (docs/training.md): without the second term and the weights, expressions are learnt late.
    """

    def __init__(self, corpus: Corpus, tasks: Mapping[str, float], vocabulary: int, device: torch.device) -> None:
        used_U, share_U, beside_UU = word_statistics(corpus, tasks, vocabulary)
        share_U = np.clip(share_U, _RAREST, 1 - _RAREST)
        deviation_U = np.sqrt(share_U * (1 - share_U))
        expected_UU = np.outer(share_U, share_U) * len(corpus)
        rivals_UU = (beside_UU == 0) & (expected_UU >= _MEETINGS)
        self.used_U = torch.from_numpy(used_U).to(device)
        self.prior_U = torch.from_numpy(np.log(share_U / (1 - share_U))).float().to(device)
        self.weight_U = torch.from_numpy(0.25 / deviation_U).float().to(device)
        self.rivals_UU = torch.from_numpy(rivals_UU).float().to(device)

    def logits(self, model: Any, view_BND: Tensor) -> Tensor:
        """Log-odds of each used word (B, U)."""
        words_UD = model.get_input_embeddings().weight[self.used_U].float()
        return view_BND.float().mean(1) @ words_UD.T * _SCALE + self.prior_U

    def loss(self, model: Any, view_BND: Tensor, bag_BV: Tensor) -> Tensor:
        """Sum over the faces, float32; `bag_BV` is 1 where the face's caption holds the word."""
        with torch.autocast(view_BND.device.type, enabled=False):
            bag_BU = bag_BV[:, self.used_U]
            logit_BU = self.logits(model, view_BND)
            present = F.binary_cross_entropy_with_logits(logit_BU, bag_BU, self.weight_U, reduction="sum")
            shifted_BU = logit_BU - logit_BU.detach().amax(1, keepdim=True)
            odds_BU = shifted_BU.exp()
            among_rivals_BU = (odds_BU + odds_BU @ self.rivals_UU.T).clamp(min=1e-30).log() - shifted_BU
            return present + (among_rivals_BU * bag_BU).sum()


def word_statistics(
    corpus: Corpus, tasks: Mapping[str, float], vocabulary: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float32]]:
    """The words that answers to `tasks` hold (U,), the share of faces whose answers hold each (U,), and how many hold
    each pair of them (U, U): a vocabulary may have hundreds of thousands of words, captions use a few hundred.

    Plain and mirrored answers count half each.
    """
    chosen = corpus.weights(tasks) > 0
    answers = [corpus.texts[text] for text in np.unique(corpus.answer[chosen])]
    used_U = np.unique(np.concatenate([np.empty(0, np.int32), *answers])).astype(np.int64)
    place_V = np.full(vocabulary, -1, np.int32)
    place_V[used_U] = np.arange(len(used_U))
    placed = replace(corpus, texts=Texts(place_V[corpus.texts.ids], corpus.texts.starts))
    count_U, beside_UU = np.zeros(len(used_U)), np.zeros((len(used_U), len(used_U)), np.float32)
    for start in range(0, len(corpus), _BLOCK):
        rows = range(start, min(start + _BLOCK, len(corpus)))
        turns = [t[chosen[t]] for t in (np.arange(*corpus.turn_starts[row : row + 2]) for row in rows)]
        for mirror in (False, True):
            bags_BU = word_bags(placed, turns, np.full(len(turns), mirror), len(used_U))
            count_U += bags_BU.sum(0) / 2
            beside_UU += bags_BU.T @ bags_BU / 2
    return used_U, count_U / len(corpus), beside_UU
