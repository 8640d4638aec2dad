"""The objective `caption_words`: what an image alone tells of its caption's words.

Shapes: B faces, N image tokens, D width, V vocabulary, U words in use, F facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from facemllm.settings import Stage
from facemllm.train.corpus import CAPTION, Corpus, Texts
from facemllm.train.packing import word_bags
from facemllm.train.smoothing import NumberSmoothing

# Logits are this times the dot product, so that words tell apart before the mean token has had to grow. Measured after
# 450 steps, expression accuracy and yaw error on validation: 2.7 -> .17, 5.9; 10 -> .24, 2.9; 30 -> .29, 2.6.
_SCALE = 30.0
_RAREST = 2.5e-3  # shares are held this far from 0 and 1, which bounds the weight of a rare word
_MEETINGS = 5.0  # words expected to meet this often that never do exclude each other (chance: e^-5)
_TIED = 0.25
_HEAVIEST = 3.0
_BLOCK = 1024


def weight_beside_answers(stage: Stage, corpus: Corpus) -> float:
    """Weight of the loss of caption words beside answers: 0 where the stage has another objective, or no turn asks for
    a caption."""
    return stage.caption_words if stage.objective == "answers" and CAPTION in corpus.tasks else 0.0


class CaptionWords:
    """The mean token of a view (image or map), times the tied word embeddings, tells which words the caption holds: of
    its words, those that go with an answer to a closed question about the face ("blond", "smiling", not "and").

    It teaches the tower and puts images into the word space without a pass of the language model, several times faster
    than answers do. Two terms, over words w with logits l_w:

    - each word present or absent: binary cross-entropy, rare words weighing more, by 1 / sd of their occurrence;
    - each present word against its rivals, the words that no caption of the training split ever puts beside it
      ("sad" beside "happy", "turned 20 degrees left" beside "... 25 ..."): softmax cross-entropy. The captions alone
      say which words exclude each other; pairs too rare to have met by chance are left out. Rarer words weigh more, by
      the inverse root of their share among their rivals, numbers all alike.

    Measured on validation (docs/training.md): without the second term and the weights, expressions are learnt late.
    """

    def __init__(self, corpus: Corpus, tasks: Mapping[str, float], smoothing: NumberSmoothing) -> None:
        device = smoothing.device
        found = word_statistics(corpus, tasks, smoothing.vocabulary)
        share_U = np.clip(found.share_U, _RAREST, 1 - _RAREST)
        deviation_U = np.sqrt(share_U * (1 - share_U))
        expected_UU = np.outer(share_U, share_U) * len(corpus)
        rivals_UU = (found.beside_UU == 0) & (expected_UU >= _MEETINGS)
        self.smoothing = smoothing
        self.used_U = torch.from_numpy(found.used_U).to(device)
        self.prior_U = torch.from_numpy(np.log(share_U / (1 - share_U))).float().to(device)
        self.weight_U = torch.from_numpy(0.25 / deviation_U).float().to(device)
        self.rivals_UU = torch.from_numpy(rivals_UU).float().to(device)
        among_UU = rivals_UU | np.eye(len(share_U), dtype=bool)
        mean_U = (among_UU @ np.sqrt(share_U)) / (among_UU @ share_U)
        rarer_U = np.minimum(1 / np.sqrt(share_U) / mean_U, _HEAVIEST)
        number_U = np.isin(found.used_U, corpus.numbers.token)
        self.rarer_U = torch.from_numpy(np.where(number_U, 1.0, rarer_U)).float().to(device)

    def logits(self, model: Any, view_BND: Tensor) -> Tensor:
        """Log-odds of each used word (B, U)."""
        words_UD = model.get_input_embeddings().weight[self.used_U].float()
        return view_BND.float().mean(1) @ words_UD.T * _SCALE + self.prior_U

    def loss(self, model: Any, view_BND: Tensor, bag_BV: Tensor) -> Tensor:
        """Sum over the faces, float32; `bag_BV` is 1 where the face's caption holds the word."""
        with torch.autocast(view_BND.device.type, enabled=False):
            bag_BU = self.smoothing.bags(bag_BV)[:, self.used_U]
            logit_BU = self.logits(model, view_BND)
            present = F.binary_cross_entropy_with_logits(logit_BU, bag_BU, self.weight_U, reduction="sum")
            shifted_BU = logit_BU - logit_BU.detach().amax(1, keepdim=True)
            odds_BU = shifted_BU.exp()
            among_rivals_BU = (odds_BU + odds_BU @ self.rivals_UU.T).clamp(min=1e-30).log() - shifted_BU
            return present + (among_rivals_BU * bag_BU * self.rarer_U).sum()


@dataclass(frozen=True)
class WordStatistics:
    """Words that answers hold: their ids, the share of faces whose answers hold each, and how many hold each pair: a
    vocabulary may have hundreds of thousands of words, captions use a few hundred."""

    used_U: NDArray[np.int64]
    share_U: NDArray[np.float64]
    beside_UU: NDArray[np.float32]


def word_statistics(corpus: Corpus, tasks: Mapping[str, float], vocabulary: int) -> WordStatistics:
    """Of the words that answers to `tasks` hold, those that go with a fact: the share of faces that have the word and
    the share that have some closed answer correlate by `_TIED` at least. All words, where none does so or no closed
    question is asked. Plain and mirrored answers count half each in shares and pairs."""
    chosen = corpus.weights(tasks) > 0
    answers = [corpus.texts[text] for text in np.unique(corpus.answer[chosen])]
    used_U = np.unique(np.concatenate([np.empty(0, np.int32), *answers])).astype(np.int64)
    place_V = np.full(vocabulary, -1, np.int32)
    place_V[used_U] = np.arange(len(used_U))
    placed = replace(corpus, texts=Texts(place_V[corpus.texts.ids], corpus.texts.starts))
    words, facts = len(used_U), int(corpus.fact.max(initial=-1)) + 1
    count_U, beside_UU = np.zeros(words), np.zeros((words, words), np.float32)
    plain_U, with_F, both_UF = np.zeros(words), np.zeros(facts), np.zeros((words, facts), np.float32)
    for start in range(0, len(corpus), _BLOCK):
        rows = range(start, min(start + _BLOCK, len(corpus)))
        turns = [np.arange(*corpus.turn_starts[row : row + 2]) for row in rows]
        said = [t[chosen[t]] for t in turns]
        for mirror in (False, True):
            bags_BU = word_bags(placed, said, np.full(len(said), mirror), words)
            count_U += bags_BU.sum(0) / 2
            beside_UU += bags_BU.T @ bags_BU / 2
            if not mirror:
                every = np.concatenate(turns)
                owner, fact = np.repeat(np.arange(len(turns)), list(map(len, turns))), corpus.fact[every]
                true_BF = np.zeros((len(turns), facts), np.float32)
                true_BF[owner[fact >= 0], fact[fact >= 0]] = 1.0
                plain_U += bags_BU.sum(0)
                with_F += true_BF.sum(0)
                both_UF += bags_BU.T @ true_BF
    kept = np.arange(words)
    if facts:
        share_U, share_F = plain_U / len(corpus), with_F / len(corpus)
        spread_UF = np.sqrt(np.outer(share_U * (1 - share_U), share_F * (1 - share_F)))
        tie_UF = (both_UF / len(corpus) - np.outer(share_U, share_F)) / np.maximum(spread_UF, 1e-9)
        tied = np.flatnonzero(np.abs(tie_UF).max(1) >= _TIED)
        kept = tied if len(tied) else kept
    return WordStatistics(used_U[kept], count_U[kept] / len(corpus), beside_UU[np.ix_(kept, kept)])
