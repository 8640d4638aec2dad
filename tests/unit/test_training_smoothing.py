"""Numbers smoothed over their neighbours, beside torch's cross-entropy with soft targets."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from facemllm.train.corpus import Numbers
from facemllm.train.smoothing import NumberSmoothing

CPU = torch.device("cpu")
NUMBERS = Numbers(
    token=np.array([3, 4, 5, 6, 8, 9]), family=np.array([0, 0, 0, 0, 1, 1]), value=np.array([5, 10, 15, 20, -5.0, 5])
)
VOCABULARY = 12


def smoothing(width: float) -> NumberSmoothing:
    return NumberSmoothing(SimpleNamespace(numbers=NUMBERS), width, VOCABULARY, CPU)  # type: ignore[arg-type]


def shares(token: int, width: float) -> torch.Tensor:
    wanted = torch.zeros(VOCABULARY)
    wanted[token] = 1.0
    if token in NUMBERS.token:
        place = list(NUMBERS.token).index(token)
        own = [n for n in range(6) if NUMBERS.family[n] == NUMBERS.family[place]]
        step = 5.0 if NUMBERS.family[place] == 0 else 10.0
        weights = {n: np.exp(-0.5 * ((NUMBERS.value[n] - NUMBERS.value[place]) / (width * step)) ** 2) for n in own}
        wanted[token] = 0
        for n, weight in weights.items():
            wanted[NUMBERS.token[n]] = weight / sum(weights.values())
    return wanted


@pytest.mark.parametrize("width", [0.4, 0.7, 2.0])
def test_loss_and_gradient_are_those_of_soft_targets(width):
    torch.manual_seed(0)
    logits = torch.randn(VOCABULARY, VOCABULARY, requires_grad=True)
    target = torch.arange(VOCABULARY)
    found = smoothing(width).cross_entropy(logits, target)
    soft = torch.stack([shares(token, width) for token in range(VOCABULARY)])
    entropy = -(soft * soft.clamp(min=1e-30).log()).sum(1)
    torch.testing.assert_close(found, F.cross_entropy(logits, soft, reduction="none") - entropy)
    [gradient] = torch.autograd.grad(found.sum(), logits)
    torch.testing.assert_close(gradient, logits.detach().softmax(1) - soft)


def test_a_perfect_answer_costs_nothing_and_a_neighbour_less_than_a_stranger():
    smooth = smoothing(0.7)
    perfect = shares(4, 0.7).clamp(min=1e-12).log()[None]
    assert abs(float(smooth.cross_entropy(perfect, torch.tensor([4])))) < 1e-4
    sure = torch.full((2, VOCABULARY), -9.0)
    sure[0, 5], sure[1, 6] = 9.0, 9.0  # 15 and 20 years where it is 10
    near, far = smooth.cross_entropy(sure, torch.tensor([4, 4]))
    assert near < far


def test_without_a_width_nothing_is_smoothed():
    logits = torch.randn(VOCABULARY, VOCABULARY)
    target = torch.arange(VOCABULARY)
    plain = F.cross_entropy(logits, target, reduction="none")
    assert torch.equal(smoothing(0).cross_entropy(logits, target), plain)
    bags = torch.eye(VOCABULARY)
    assert torch.equal(smoothing(0).bags(bags), bags)
    torch.testing.assert_close(smoothing(0.7).bags(bags)[4], shares(4, 0.7))
    torch.testing.assert_close(smoothing(0.7).bags(bags).sum(1), torch.ones(VOCABULARY))
