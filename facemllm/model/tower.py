"""The residual convolutional tower of the `tiny` preset, registered with transformers.

96 px -> 6x6 grid of 256 channels -> 10 tokens: the global mean, then the 3x3 average-pooled grid in reading order, each
through one LayerNorm. A plain patch ViT of the same size learns nothing from a few thousand faces in minutes; this does
(docs/training.md). It stands inside `LlavaForConditionalGeneration` with `vision_feature_select_strategy="full"`.

Shapes: B batch, C channels, S image side in pixels, G grid side, D width of a token, N = 10 tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

GRID = 3
TOKENS = GRID * GRID + 1


class FaceTowerConfig(PretrainedConfig):
    """Widths of the stem and of the four residual stages; the last width is the width of a token."""

    model_type = "face_tower"

    def __init__(
        self,
        image_size: int = 96,
        stem: int = 32,
        widths: list[int] | None = None,
        strides: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.image_size = image_size
        self.stem = stem
        self.widths = widths or [48, 96, 160, 256]
        self.strides = strides or [2, 2, 1, 2]
        self.hidden_size = self.widths[-1]
        kwargs.pop("hidden_size", None)
        super().__init__(**kwargs)


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut, after He et al. 2016; strided shortcuts average before they project."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _conv_norm(inputs, outputs, 3, stride)
        self.second = _conv_norm(outputs, outputs, 3, 1)
        pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.shortcut = nn.Sequential(pool, _conv_norm(inputs, outputs, 1, 1))

    def forward(self, x_BCSS: Tensor) -> Tensor:
        """(B, inputs, S, S) -> (B, outputs, S / stride, S / stride)."""
        return F.relu(self.second(F.relu(self.first(x_BCSS))) + self.shortcut(x_BCSS))


class FaceTower(PreTrainedModel):
    """Image (B, 3, S, S), values in [-1, 1] -> ten tokens (B, 10, 256)."""

    config_class = FaceTowerConfig
    base_model_prefix = "face_tower"
    main_input_name = "pixel_values"
    input_modalities = "image"
    _no_split_modules = ["ResidualBlock"]

    def __init__(self, config: FaceTowerConfig) -> None:
        super().__init__(config)
        self.stem = _conv_norm(3, config.stem, 3, 2)
        inputs = [config.stem, *config.widths[:-1]]
        self.stages = nn.Sequential(
            *(ResidualBlock(i, o, s) for i, o, s in zip(inputs, config.widths, config.strides, strict=True))
        )
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # through transformers' `init`, which leaves alone what a checkpoint filled: loading a model calls this too
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)
        else:
            super()._init_weights(module)

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode normalised pixels; `hidden_states` holds the one layer that LLaVA selects."""
        x_BCSS = pixel_values.contiguous(memory_format=torch.channels_last)
        grid_BDGG = self.stages(F.relu(self.stem(x_BCSS)))
        parts_BDP = F.adaptive_avg_pool2d(grid_BDGG, GRID).flatten(2)
        tokens_BDN = torch.cat([grid_BDGG.mean((2, 3)).unsqueeze(2), parts_BDP], dim=2)
        tokens_BND = self.norm(tokens_BDN.transpose(1, 2))
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens_BND, pooler_output=tokens_BND[:, 0], hidden_states=(tokens_BND,)
        )
