"""Linear layers by oneDNN with weights laid out once, in place of the BLAS that PyTorch was built with.

PyTorch multiplies float32 matrices by MKL, which does not use AVX-512 on processors of other makers: on a Zen 5 core
oneDNN computes the same products 2.2 to 2.5 times as fast. Results differ in rounding alone. For serving on a CPU;
training and evaluation keep the plain layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A float32 `nn.Linear` that cannot be trained or saved."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous())
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return torch.as_tensor(torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], ""))


def pack(model: Any) -> bool:
    """Pack the linear layers of a model on a CPU in float32; whether that could be done."""
    linears = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    if not linears or not torch.backends.mkldnn.is_available():
        return False
    if any(one.weight.device.type != "cpu" or one.weight.dtype != torch.float32 for _, one in linears):
        return False
    try:
        made = {name: PackedLinear(one) for name, one in linears}
    except (AttributeError, RuntimeError):  # another PyTorch, or a processor that oneDNN has no kernels for
        return False
    for name, one in made.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, one)
    return True
