"""What packed rows are made of, and the halves of LLaVA's vision; families compute with them (`model.families`).

A row holds faces, each its prefix p (whatever precedes the first question, image tokens included), then its questions q
as blocks. Training packs several faces into a row; inference adds the options of each question as branches a, b of its
block. A token sees, of what stands before it, its face's prefix and its own block and branch. Positions restart for
every face, and for every block after the prefix, so that every turn is computed exactly as if it stood alone:

             face 1                face 2            x = sees, . = masked
             p p   q a b   q       p q
    p        x .   . . .   .       . .               position 0
    p        x x   . . .   .       . .               position 1
    q        x x   x . .   .       . .               position 2
    a        x x   x x .   .       . .               position 3
    b        x x   x . x   .       . .               position 3 again: branch b does not see branch a
    q        x x   . . .   x       . .               position 2 again: a block does not see another
    p        . .   . . .   .       x .               position 0 again: a face does not see another
    q        . .   . . .   .       x x               position 1

Shapes: B faces, R rows, L tokens of a row, I image tokens of all faces, N of one face, D width, F tower's width, V
vocabulary, K scored or picked positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from facemllm.model.face_mllm import FaceMllmModel, VisualTokens

FLOAT32_ATTENTION = "sdpa_float32"
"""Attention for training in bfloat16 on a CPU, whose kernels are slower backwards in bfloat16 than in float32."""

PADDING = -1  # face of a token that fills a row up; it sees itself alone
PREFIX = -1  # block of the tokens that every block of their face sees
TRUNK = 0  # branch of the tokens that every branch of a block sees


def row_mask(face_RL: Tensor, block_RL: Tensor, branch_RL: Tensor | None = None) -> Tensor:
    """Boolean mask (R, 1, L, L), true where the row's token may see the column's; None means there are no branches."""
    length = face_RL.shape[1]
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=face_RL.device).tril()
    mask_RLL = (face_RL[:, :, None] == face_RL[:, None, :]) & causal_LL
    mask_RLL &= (block_RL[:, None, :] == PREFIX) | (block_RL[:, :, None] == block_RL[:, None, :])
    if branch_RL is not None:
        mask_RLL &= (branch_RL[:, None, :] == TRUNK) | (branch_RL[:, :, None] == branch_RL[:, None, :])
    mask_RLL &= (face_RL != PADDING)[:, None, :]
    diagonal = torch.arange(length, device=face_RL.device)
    mask_RLL[:, diagonal, diagonal] = True
    return mask_RLL[:, None]


def as_taken(model: Any, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (R, 1, L, L) as the model's attention takes it: `sdpa` as it is, others add it to the scores."""
    if model.config.text_config._attn_implementation in ("sdpa", FLOAT32_ATTENTION):
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def _float32_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *given: Any, **options: Any) -> Any:
    with torch.autocast(query.device.type, enabled=False):
        found, weights = sdpa_attention_forward(module, query.float(), key.float(), value.float(), *given, **options)
    return found.to(query.dtype), weights


AttentionInterface.register(FLOAT32_ATTENTION, _float32_attention)


@dataclass(frozen=True)
class Layout:
    """A face's row, or a part of it (the prefix, a query as a block), and where each option's tokens are predicted."""

    ids: NDArray[np.int64]
    block: NDArray[np.int64]
    branch: NDArray[np.int64]
    position: NDArray[np.int64]
    at: NDArray[np.int64]  # (K,) token that predicts
    token: NDArray[np.int64]  # (K,) token predicted
    option: NDArray[np.int64]  # (K,) option it belongs to, counted over all queries
    ends: NDArray[np.int64]  # options before the end of each query


def joined(parts: Sequence[Layout]) -> Layout:
    """The row of a prefix and single queries."""
    columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(Layout)}
    tokens, options = list(map(len, columns["ids"])), [int(ends.max(initial=0)) for ends in columns["ends"]]
    counted = {"block": [0] + [1] * (len(parts) - 1), "at": tokens, "option": options, "ends": options}
    for name, sizes in counted.items():
        starts = np.cumsum([0, *sizes[:-1]])
        columns[name] = [column + start for column, start in zip(columns[name], starts, strict=True)]
    return Layout(**{name: np.concatenate(column) for name, column in columns.items()})


def tower_features(model: Any, pixel_values: Tensor) -> Tensor:
    """What the tower says of normalised pixels (B, 3, S, S): its selected layers, (B, N, F), before the projector."""
    outputs = model.model.vision_tower(pixel_values, output_hidden_states=True, return_dict=True)
    chosen = model.config.vision_feature_layer
    layers = [outputs.hidden_states[layer] for layer in ([chosen] if isinstance(chosen, int) else chosen)]
    if model.config.vision_feature_select_strategy == "default":
        layers = [layer[:, 1:] for layer in layers]
    return torch.cat(layers, dim=-1)


def visual_tokens(model: Any, features_BNF: Tensor, segmentation_BSS: Tensor | None = None) -> VisualTokens:
    """From tower features, and maps of face parts where the model takes them, to what the language model sees."""
    image_BND = model.model.multi_modal_projector(features_BNF)
    if isinstance(model.model, FaceMllmModel):
        return model.model.join(image_BND, segmentation_BSS)
    return VisualTokens(image_BND, (image_BND,), None)
