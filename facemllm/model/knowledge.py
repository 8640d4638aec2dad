"""The correlation module: characteristics refine one another along their co-occurrence graph (FaceInsight, 2504.15624).

T^0 is each characteristic's text embedding, from the language model's own words; T^l = rho(C T^(l-1) W^(l-1)) with the
fixed matrix C of `tasks/characteristics.py`; rho is LeakyReLU 0.2 between layers and nothing after the last (ML-GCN,
Chen et al. 2019). What comes out serves twice: against the pooled visual tokens it scores every characteristic of the
face, and, weighted by those scores, it becomes soft prompt tokens for the language model. In the prompt the scores are
mere weights: the language model's loss trains the graph's layers, but not what it sees in a face, so that the scores
stay probabilities that can be read beside the text.

Shapes: B faces, N visual tokens, A characteristics, K words of a characteristic, P prompt tokens, D width, V words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SLOPE = 0.2
NO_WORD = -1


class KnowledgeBranch(nn.Module):
    """Scores of `names` and a soft prompt, from visual tokens and the word embeddings.

    The graph (A, A) and each name's word ids (A, K) are buffers, so that they travel with the weights.
    """

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
            seen_BD = self.visual(visual_BND.to(kind).mean(1))
            logits_BA = seen_BD @ refined_AD.T * scale + self.prior
            share_PA = (self.queries @ refined_AD.T * scale).softmax(1)
            weight_BPA = share_PA * logits_BA.detach().sigmoid().unsqueeze(1)
            prompt_BPD = self.prompt(weight_BPA @ refined_AD)
        return logits_BA.float(), prompt_BPD
