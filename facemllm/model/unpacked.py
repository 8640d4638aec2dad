"""Closed questions of families whose questions cannot share a row (`Family.unpackable`): a question passes once with
its picture, and each option goes on from a copy of the cache that is left: keys and values, states of linear attention.

Unless a picture's tokens see the question (`Family.sees_question`), it passes once for all its questions. What goes on
from a copy is compared with whole rows once; a model of which it differs is given a row for every option.

Shapes: O options, L tokens of the longest, S of a question, D width, V vocabulary, P places that predict, K predicted
tokens.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facemllm.errors import UserError, one_line
from facemllm.model.face_mllm import VisualTokens
from facemllm.model.families import Family

log = logging.getLogger(__name__)

COPIES = 8
"""Most copies of a cache at a time: each holds the keys and values of a picture and a question."""

Asked = tuple[list[int], list[list[int]]]
"""Token ids of a question behind the prefix, and of each of its options."""

Likelihoods = tuple[NDArray[np.float64], NDArray[np.bool_]]
"""Of each of K tokens its log-likelihood, and whether it is the likeliest at its place."""

_PROBE, _ANSWERS = "Is this a face?", ("yes", "it cannot be told", "no")


def token_likelihoods(logits_PV: Tensor, place_K: Any, token_K: Any) -> Likelihoods:
    """Of tokens by the logits of the places that predict them. Raises UserError if these are no numbers."""
    index_K = torch.as_tensor(place_K, device=logits_PV.device)
    wanted_K = torch.as_tensor(token_K, device=logits_PV.device)
    likelihood_K = logits_PV.log_softmax(-1)[index_K, wanted_K].double().cpu().numpy()
    if np.isnan(likelihood_K).any():
        raise UserError("the model computes no numbers (NaN): its weights, or what its processor does, are damaged")
    return likelihood_K, (logits_PV.argmax(-1)[index_K] == wanted_K).cpu().numpy()


class Unpacked:
    """The likelihoods of options, of a model in evaluation mode."""

    def __init__(self, family: Family, model: Any) -> None:
        self._family, self._model = family, model
        self._prefix = list(family.frame.prefix_ids)
        self._copies: bool | None = None

    def likelihoods(self, visual: VisualTokens, asked: Sequence[Asked]) -> Likelihoods:
        """Of every token of every option, in order; the questions are asked about the one face in `visual`."""
        if self._copies is None:
            self._copies = self._goes_on(visual)
        found = list((self.by_copies if self._copies else self.by_rows)(visual, asked))
        likelihoods, expected = zip(*found, strict=True)
        return np.concatenate(likelihoods), np.concatenate(expected)

    def by_copies(self, visual: VisualTokens, asked: Sequence[Asked]) -> Iterator[Likelihoods]:
        """Options that go on from copies of their question's cache."""
        family, model = self._family, self._model
        picture = None if family.sees_question else family.begun(model, visual, self._ids([self._prefix]))[1]
        for prompt, answers in asked:
            if picture is None:
                states_1SD, cache = family.begun(model, visual, self._ids([self._prefix + prompt]))
            else:
                states_1SD = family.continued(model, self._ids([prompt]), cache := _copied(picture, 1))
            for part in _parts(answers):
                rows = [answer[:-1] for answer in part]
                states_OLD = family.continued(model, self._ids(rows), _copied(cache, len(rows)))
                ends_O = torch.tensor([len(row) for row in rows])
                real_OL = (torch.arange(states_OLD.shape[1]) < ends_O[:, None]).to(states_OLD.device)
                logits_PV = family.logits(model, torch.cat([states_1SD[0, -1:], states_OLD[real_OL]]))
                firsts = np.cumsum([1, *map(len, rows[:-1])])  # the place before them is the question's last token
                places = [[0, *range(first, first + len(row))] for first, row in zip(firsts, rows, strict=True)]
                yield token_likelihoods(logits_PV, np.concatenate(places), np.concatenate(part))

    def by_rows(self, visual: VisualTokens, asked: Sequence[Asked]) -> Iterator[Likelihoods]:
        """Options in whole rows, picture and question in each."""
        for prompt, answers in asked:
            start = len(self._prefix) + len(prompt)
            for part in _parts(answers):
                rows = [[*self._prefix, *prompt, *answer[:-1]] for answer in part]
                mask_OL = self._ids([[1] * len(row) for row in rows])
                start_O = torch.full((len(rows),), start, device=mask_OL.device)
                shown = visual.rows([0] * len(rows))
                states_OLD = self._family.plain(self._model, shown, self._ids(rows), mask_OL, start_O)
                for states_LD, answer in zip(states_OLD, part, strict=True):
                    logits_PV = self._family.logits(self._model, states_LD[start - 1 : start - 1 + len(answer)])
                    yield token_likelihoods(logits_PV, range(len(answer)), answer)

    def _goes_on(self, visual: VisualTokens) -> bool:
        """Whether options may go on from copies: tried on one question about a face."""
        frame, kind = self._family.frame, self._family.config.model_type
        probe = [(frame.prompt(_PROBE), [frame.answer(text) for text in _ANSWERS])]
        wanted = np.concatenate([one for one, _ in self.by_rows(visual, probe)])
        try:
            found = np.concatenate([one for one, _ in self.by_copies(visual, probe)])
        except Exception as error:  # what a cache of a family nobody wrote an adapter for lacks can be anything
            log.warning("%s: options take a row each: its cache cannot be copied: %s", kind, one_line(error))
            return False
        close = np.allclose(found, wanted, rtol=0, atol=1e-3 if self._model.dtype == torch.float32 else 0.25)
        if not close:
            log.warning("%s: options take a row each: from a copy of its cache it goes on otherwise", kind)
        return close

    def _ids(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Rows filled up on the right, to one token at least."""
        longest = max(1, *map(len, rows))
        return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=self._model.device)


def _parts(answers: Sequence[list[int]]) -> Iterator[Sequence[list[int]]]:
    for start in range(0, len(answers), COPIES):
        yield answers[start : start + COPIES]


def _copied(cache: Any, count: int) -> Any:
    """A cache of one row as one of so many; the former is left as it is."""
    copied = copy.deepcopy(cache)
    copied.reorder_cache(torch.zeros(count, dtype=torch.long))  # the one way that states of linear attention have, too
    return copied
