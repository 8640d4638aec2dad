"""The segmentation branch: a map of face parts as a second visual input (FaceInsight, arXiv 2504.15624).

Each pixel's class becomes a short vector, patches of them go through a ViT of its own, and a projector brings the
result to the language model's width. The encoder sees the map at a fraction of the image's resolution: shapes are what
a map adds, and one as large as the tower costs a third of the throughput. A row without a map gets one learned token,
repeated, so that a model trained on both kinds answers on both.

Shapes: B faces, S side of the map as given, M side at which it is read, K classes, C width of a class, P patches,
N tokens, W width, D output width.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 19
NO_MAP = 255
"""Fills the map of a face that has none."""

_CLASS_WIDTH = 8


class SegmentationBranch(nn.Module):
    """Maps (B, S, S) uint8 -> tokens (B, `tokens`, `output`); the other arguments are the ViT's."""

    def __init__(self, *, side: int, patch: int, width: int, layers: int, heads: int, tokens: int, output: int) -> None:
        super().__init__()
        self.side, self.patch, self.tokens = side, patch, tokens
        grid = side // patch
        self.classes = nn.Embedding(CLASSES, _CLASS_WIDTH)
        self.patches = nn.Linear(patch * patch * _CLASS_WIDTH, width)
        self.places = nn.Parameter(torch.randn(grid * grid, width) * 0.02)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.projector = nn.Sequential(nn.Linear(width, output), nn.GELU(), nn.Linear(output, output))
        self.absent = nn.Parameter(torch.randn(output) * 0.02)

    def forward(self, map_BSS: Tensor) -> Tensor:
        """Tokens (B, N, D). A map whose first pixel is `NO_MAP` counts as none; an unknown class as background."""
        at_M = ((torch.arange(self.side, device=map_BSS.device) + 0.5) * (map_BSS.shape[1] / self.side)).long()
        small_BMM = map_BSS[:, at_M][:, :, at_M]
        grid = self.side // self.patch
        known_BMM = torch.where(small_BMM < CLASSES, small_BMM, 0)
        # a product: the backward pass of a look-up adds pixel by pixel, and takes longer than the rest of the branch
        one_hot_BMMK = known_BMM.unsqueeze(3) == torch.arange(CLASSES, device=map_BSS.device)
        embedded_BMMC = one_hot_BMMK.to(self.classes.weight.dtype) @ self.classes.weight
        x_BGPGPC = embedded_BMMC.unflatten(2, (grid, self.patch)).unflatten(1, (grid, self.patch))
        x_BPW = self.patches(x_BGPGPC.transpose(2, 3).flatten(3).flatten(1, 2)) + self.places
        x_BPW = self.norm(self.blocks(x_BPW))
        tokens_BND = self.projector(pooled(x_BPW.transpose(1, 2).unflatten(2, (grid, grid)), self.tokens))
        return torch.where(has_map(map_BSS)[:, None, None], tokens_BND, self.absent.to(tokens_BND.dtype))


class _Block(nn.Module):
    """A pre-norm transformer block, after Dosovitskiy et al. 2021; the feed-forward part doubles the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x_BPW: Tensor) -> Tensor:
        """(B, P, W) -> (B, P, W)."""
        parts = self.mix(self.before(x_BPW)).unflatten(2, (3, self.heads, -1)).float()
        q_BHPW, k_BHPW, v_BHPW = (part.transpose(1, 2) for part in parts.unbind(2))
        with torch.autocast(x_BPW.device.type, enabled=False):  # so few tokens: bf16 takes three times as long on a CPU
            mixed_BHPW = F.scaled_dot_product_attention(q_BHPW, k_BHPW, v_BHPW).to(x_BPW.dtype)
        x_BPW = x_BPW + self.out(mixed_BHPW.transpose(1, 2).flatten(2))
        return x_BPW + self.feed(self.after(x_BPW))


def has_map(map_BSS: Tensor) -> Tensor:
    """Which rows (B,) are a map, and not filled with `NO_MAP`."""
    return map_BSS[:, 0, 0] != NO_MAP


def pooled(grid_BWGG: Tensor, tokens: int) -> Tensor:
    """A grid as `tokens` tokens (B, N, W): n x n averages, behind the average of all if `tokens` is n^2 + 1."""
    side = isqrt(tokens)
    parts_BWN = F.adaptive_avg_pool2d(grid_BWGG, side).flatten(2)
    if side * side == tokens - 1:
        parts_BWN = torch.cat([grid_BWGG.mean((2, 3)).unsqueeze(2), parts_BWN], dim=2)
    if parts_BWN.shape[2] != tokens:
        raise ValueError(f"{tokens} tokens are neither a square nor a square and one")
    return parts_BWN.transpose(1, 2)
