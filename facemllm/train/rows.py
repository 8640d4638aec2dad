"""Packed rows through the language model: who sees whom, and the hidden states.

A row of two faces, each with a prefix p and blocks of questions q:

             face 1         face 2                  x = sees, . = masked
             p p  q  q'     p p  q
    p        x .  .  .      . .  .                  positions 0 1 2 2 | 0 1 2: they restart with every face,
    p        x x  .  .      . .  .                  and with every block after the prefix
    q        x x  x  .      . .  .
    q'       x x  .  x      . .  .                  a block sees its face's prefix and itself
    p        . .  .  .      x .  .
    p        . .  .  .      x x  .
    q        . .  .  .      x x  x

So every question is computed as if it stood alone. Shapes: B faces, R rows, L tokens of a row, I image tokens of all
faces together, N of one face, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from facemllm.model.masks import as_taken
from facemllm.train.packing import PADDING, PREFIX


def row_mask(face_RL: Tensor, block_RL: Tensor) -> Tensor:
    """Boolean mask (R, 1, L, L), true where the row's token may see the column's; padding sees itself alone."""
    length = face_RL.shape[1]
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=face_RL.device).tril()
    mask_RLL = (face_RL[:, :, None] == face_RL[:, None, :]) & causal_LL
    mask_RLL &= (block_RL[:, None, :] == PREFIX) | (block_RL[:, :, None] == block_RL[:, None, :])
    mask_RLL &= (face_RL != PADDING)[:, None, :]
    diagonal = torch.arange(length, device=face_RL.device)
    mask_RLL[:, diagonal, diagonal] = True
    return mask_RLL[:, None]


def row_states(
    model: Any,
    tokens_BND: Tensor,
    ids_RL: Tensor,
    face_RL: Tensor,
    block_RL: Tensor,
    position_RL: Tensor,
    image_I: Tensor,
) -> Tensor:
    """Last hidden states of packed rows, flattened (R * L, D); `image_I` are the flat places of the image tokens."""
    embedded_RLD = model.get_input_embeddings()(ids_RL).to(tokens_BND.dtype)
    flat_ID = embedded_RLD.flatten(0, 1).index_copy(0, image_I, tokens_BND.flatten(0, 1))
    states_RLD = model.model.language_model(
        inputs_embeds=flat_ID.view_as(embedded_RLD),
        attention_mask=as_taken(model, row_mask(face_RL, block_RL), flat_ID.dtype),
        position_ids=position_RL,
        use_cache=False,
    ).last_hidden_state
    return states_RLD.flatten(0, 1)
