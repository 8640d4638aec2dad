"""FaceInsight's two branches (arXiv 2504.15624): a map of face parts as a second visual input, and characteristics that
refine one another along their co-occurrence graph.

Segmentation: each pixel's class becomes a short vector, patches of them go through a ViT of its own, and a projector
brings the result to the language model's width. The encoder sees the map at a fraction of the image's resolution:
shapes are what a map adds, and one as large as the tower costs a third of the throughput. A row without a map gets one
learned token, repeated, so that a model trained on both kinds answers on both.

Knowledge: T^0 is each characteristic's text embedding, from the language model's own words; T^l = rho(C T^(l-1)
W^(l-1)) with the fixed matrix C of `tasks/characteristics.py`; rho is LeakyReLU 0.2 between layers and nothing after
the last (ML-GCN, Chen et al. 2019). What comes out serves twice: against the pooled visual tokens it scores every
characteristic of the face, and, weighted by those scores, it becomes soft prompt tokens for the language model. In the
prompt the scores are mere weights: the language model's loss trains the graph's layers, but not what it sees in a face,
so that the scores stay probabilities that can be read beside the text.

Shapes: B faces, S side of the map as given, M side at which it is read, K classes, C width of a class, P patches or
prompt tokens, N tokens, W width, D output width; A characteristics, K words of a characteristic, V words.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 19
NO_MAP = 255
"""Fills the map of a face that has none."""

NO_WORD = -1

_CLASS_WIDTH = 8
_SLOPE = 0.2


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


class KnowledgeBranch(nn.Module):
    """Scores of `names` and a soft prompt, from visual tokens and the word embeddings. The graph (A, A) and each name's
    word ids (A, K) are buffers, so that they travel with the weights."""

    def __init__(self, *, names: Sequence[str], words: int, width: int, layers: int, prompt_tokens: int) -> None:
        super().__init__()
        self.names = tuple(names)
        count = len(self.names)
        self.graph: Tensor
        self.words: Tensor
        self.register_buffer("graph", torch.eye(count))
        self.register_buffer("words", torch.full((count, words), NO_WORD, dtype=torch.long))
        self.text_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        self.visual = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.prior = nn.Parameter(torch.zeros(count))
        self.queries = nn.Parameter(torch.randn(prompt_tokens, width) * 0.02)
        self.prompt = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))

    def refined(self, embedding_VD: Tensor) -> Tensor:
        """Text embeddings of the characteristics after the graph (A, D)."""
        known_AK = self.words != NO_WORD
        words_AKD = F.embedding(self.words.clamp(min=0), embedding_VD) * known_AK.unsqueeze(2)
        x_AD = self.text_norm(words_AKD.sum(1) / known_AK.sum(1, keepdim=True).clamp(min=1))
        for number, layer in enumerate(self.layers):
            x_AD = self.graph.to(x_AD.dtype) @ layer(x_AD)
            if number + 1 < len(self.layers):
                x_AD = F.leaky_relu(x_AD, _SLOPE)
        return x_AD

    def forward(self, visual_BND: Tensor, embedding_VD: Tensor) -> tuple[Tensor, Tensor]:
        """Log-odds of every characteristic (B, A), float32, and prompt tokens (B, P, D)."""
        with torch.autocast(visual_BND.device.type, enabled=False):
            kind = self.prior.dtype
            refined_AD = self.refined(embedding_VD.to(kind))
            scale = refined_AD.shape[1] ** -0.5
            visual_BD = self.visual(visual_BND.to(kind).mean(1))
            logits_BA = visual_BD @ refined_AD.T * scale + self.prior
            share_PA = (self.queries @ refined_AD.T * scale).softmax(1)
            weight_BPA = share_PA * logits_BA.detach().sigmoid().unsqueeze(1)
            prompt_BPD = self.prompt(weight_BPA @ refined_AD)
        return logits_BA.float(), prompt_BPD
