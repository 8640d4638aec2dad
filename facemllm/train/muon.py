"""Muon for the matrices of a model, AdamW for all else, in one optimiser.

Muon: Jordan et al. 2024, kellerjordan.github.io/posts/muon. That of torch takes matrices alone: no filter banks, no
sharded parameters, and nothing beside them.

Shapes: O outputs, I inputs of a layer, over all places of a convolution's kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from facemllm.train.checkpoint import MOMENTUM, local_part, local_rows

_POLYNOMIAL = (3.4445, -4.7750, 2.0315)  # of a singular value: a x + b x^3 + c x^5, steepest at zero
_ITERATIONS = 5
_MOMENTUM = 0.95
_SIZE = 0.2  # root mean square of a move in units of the rate, as AdamW's is (Liu et al. 2025, arXiv 2502.16982)


def orthogonalised(update_OI: Tensor, dtype: torch.dtype) -> Tensor:
    """The update with all its singular values brought near 1 (.7 to 1.2), by Newton and Schulz's iteration."""
    a, b, c = _POLYNOMIAL
    wide = update_OI.shape[0] <= update_OI.shape[1]
    x = (update_OI if wide else update_OI.T).to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


class MuonAdamW(torch.optim.AdamW):
    """AdamW over its groups, and Muon over those with `muon` true: a layer's weights, an output a row, move by their
    gradients' running mean with all its singular values made alike. Every direction is learnt at one pace, rare ones,
    too. Moves are as large as AdamW's, so both take the same rate.

    `dtype` is what the iteration computes in: bfloat16 does where it is fast.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], rate: float, dtype: torch.dtype) -> None:
        super().__init__(groups, rate, (0.9, 0.98), fused=True)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of all groups."""
        for group in self.param_groups:
            for parameter in group["params"] if group["muon"] else ():
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group["lr"], group["weight_decay"])
                    parameter.grad = None  # AdamW passes over it
        return super().step(closure)

    def _move(self, parameter: Tensor, gradient: Tensor, rate: float, decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state[MOMENTUM] = torch.zeros_like(gradient)
        mean = state[MOMENTUM].lerp_(gradient, 1 - _MOMENTUM)
        ahead = gradient.lerp(mean, _MOMENTUM)  # Nesterov's
        whole = ahead.full_tensor() if hasattr(ahead, "full_tensor") else ahead
        move_OI = orthogonalised(whole.flatten(1), self.dtype)
        first, last = local_rows(parameter)
        own = local_part(parameter)
        own.mul_(1 - rate * decay)
        size = rate * _SIZE * max(move_OI.shape) ** 0.5
        own.add_(move_OI[first:last].reshape(own.shape).to(own.dtype), alpha=-size)
