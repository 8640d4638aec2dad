"""Targets that know that 35 is near 40.

Shapes: B faces, K answer tokens, M tokens that stand for numbers, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from facemllm.train.corpus import Corpus, Numbers


class NumberSmoothing:
    """Targets for the tokens that stand for numbers ("about 35 years old"): a Gaussian over the numbers that the same
    question may be answered by, of `width` steps between neighbours. It tells the model that 40 is nearly right where
    35 is; the end is lower errors of age and pose (docs/training.md). With a width of 0 a target is its token alone."""

    def __init__(self, corpus: Corpus, width: float, vocabulary: int, device: torch.device) -> None:
        numbers = corpus.numbers
        if not width:
            numbers = Numbers.none()
        apart_MM = np.abs(numbers.value[:, None] - numbers.value[None, :])
        share_MM = np.zeros(apart_MM.shape)
        for family in np.unique(numbers.family):
            own = np.flatnonzero(numbers.family == family)
            steps = np.diff(np.unique(numbers.value[own]))
            step = float(np.median(steps)) if len(steps) else 1.0
            share_MM[np.ix_(own, own)] = np.exp(-0.5 * (apart_MM[np.ix_(own, own)] / (width * step)) ** 2)
        share_MM /= share_MM.sum(1, keepdims=True).clip(1e-12)
        entropy_M = -(share_MM * np.log(share_MM.clip(1e-30))).sum(1)
        place_V = np.full(vocabulary, -1)
        place_V[numbers.token] = np.arange(len(numbers.token))
        self.token_M = torch.from_numpy(numbers.token).to(device)
        self.place_V = torch.from_numpy(place_V).to(device)
        self.share_MM = torch.from_numpy(share_MM).float().to(device)
        self.entropy_M = torch.from_numpy(entropy_M).float().to(device)
        self.device, self.vocabulary = device, vocabulary

    def cross_entropy(self, logits_KV: Tensor, target_K: Tensor) -> Tensor:
        """Cross-entropy (K,) less the target's own entropy, so that a perfect answer costs nothing."""
        losses_K = F.cross_entropy(logits_KV, target_K, reduction="none")
        if not len(self.token_M):
            return losses_K
        place_K = self.place_V[target_K]
        at = torch.nonzero(place_K >= 0)[:, 0]
        place_N = place_K[at]
        logits_NM = logits_KV[at][:, self.token_M]
        own_N = logits_NM.gather(1, place_N[:, None])[:, 0]
        spread_N = own_N - (self.share_MM[place_N] * logits_NM).sum(1) - self.entropy_M[place_N]
        return losses_K.index_add(0, at, spread_N)

    def bags(self, bag_BV: Tensor) -> Tensor:
        """Bags of words (B, V) in which a number's word is shared out among its neighbours."""
        if not len(self.token_M):
            return bag_BV
        smooth_BV = bag_BV.clone()
        smooth_BV[:, self.token_M] = bag_BV[:, self.token_M] @ self.share_MM
        return smooth_BV
