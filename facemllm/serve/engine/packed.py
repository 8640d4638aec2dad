"""Layers by oneDNN with weights laid out once, in place of what PyTorch was built with.

PyTorch multiplies float32 matrices by MKL, which does not use AVX-512 on processors of other makers: on a Zen 5 core
oneDNN computes the same products 2.2 to 2.5 times as fast. A convolution lays its weights out anew in every call, and
the batch norm behind it is a factor of each of its filters. Results differ in rounding alone. For serving on a CPU;
training and evaluation keep the plain layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


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


class PackedConv(nn.Module):
    """A float32 `nn.Conv2d` and the `nn.BatchNorm2d` behind it as one, laid out for the first shape that it sees."""

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        one = fuse_conv_bn_eval(convolution, norm)
        self._how = (list(one.padding), list(one.stride), list(one.dilation), one.groups)
        self._weight, self._bias = one.weight.detach(), one.bias
        self._laid_out = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H', W')."""
        if not self._laid_out:
            self._weight = torch.ops.mkldnn._reorder_convolution_weight(self._weight, *self._how, list(x.shape))
            self._laid_out = True
        found = torch.ops.mkldnn._convolution_pointwise(x, self._weight, self._bias, *self._how, "none", [], "")
        return torch.as_tensor(found)


def pack(model: Any) -> bool:
    """Pack the linear layers of a model on a CPU in float32, and its convolutions that a batch norm follows; whether
    that could be done."""
    linears = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    if not linears or not torch.backends.mkldnn.is_available():
        return False
    if any(one.weight.device.type != "cpu" or one.weight.dtype != torch.float32 for _, one in linears):
        return False
    try:
        made: dict[str, nn.Module] = {name: PackedLinear(one) for name, one in linears}
        for name, module in model.named_modules():
            if type(module) is nn.Sequential and [*map(type, module)] == [nn.Conv2d, nn.BatchNorm2d]:
                made[name] = PackedConv(*module)
    except (AttributeError, RuntimeError):  # another PyTorch, or a processor that oneDNN has no kernels for
        return False
    for name, one in made.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, one)
    return True
