"""The forward pass in two halves: image tokens once, then the language model over packed rows.

Packed turns as trees of tokens, their attention masks and positions: one image, many questions, nothing read across.

Training packs several turns of one face into a row (block mask). Inference adds the options of each question as
branches of its block (tree mask). A row is: prefix (whatever precedes the first question, image tokens included), then
the blocks. A token sees the prefix, and what stands before it in its own block and branch; positions restart after the
prefix, so that every turn is computed exactly as if it stood alone:

             prefix    block 1          block 2            x = sees, . = masked
             p p p   q q  a  b        q q  a
    p        x . .   . .  .  .        . .  .               p  prefix, causal
    p        x x .   . .  .  .        . .  .
    p        x x x   . .  .  .        . .  .
    q 1      x x x   x .  .  .        . .  .               position 3
    q 1      x x x   x x  .  .        . .  .               position 4
    a 1      x x x   x x  x  .        . .  .               position 5, branch a of block 1
    b 1      x x x   x x  .  x        . .  .               position 5 again: branch b does not see branch a
    q 2      x x x   . .  .  .        x .  .               position 3 again: block 2 does not see block 1
    q 2      x x x   . .  .  .        x x  .
    a 2      x x x   . .  .  .        x x  x

Shapes: B rows, N prefix tokens, T tokens after it, L = N + T, D width, F tower's width, V vocabulary, K scored or
picked positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facemllm.model.face_mllm import FaceMllmModel, VisualTokens

PADDING = -1  # block of a padding token; it sees itself alone
TRUNK = 0  # branch of the tokens that every branch of a block sees


def tree_mask(block_BT: Tensor, branch_BT: Tensor | None, prefix: int) -> Tensor:
    """Boolean mask (B, 1, N + T, N + T), true where the row's token may see the column's.

    `block_BT` numbers the blocks from 0 (`PADDING` for padding); `branch_BT` numbers branches inside a block from 1
    (`TRUNK` for the block's own tokens); None means there are no branches.
    """
    rows, length = block_BT.shape
    total = prefix + length
    mask_BLL = torch.ones(total, total, dtype=torch.bool, device=block_BT.device).tril().repeat(rows, 1, 1)
    inside_BTT = block_BT[:, :, None] == block_BT[:, None, :]
    if branch_BT is not None:
        inside_BTT &= (branch_BT[:, None, :] == TRUNK) | (branch_BT[:, None, :] == branch_BT[:, :, None])
    real_BT = block_BT != PADDING
    inside_BTT &= real_BT[:, None, :]
    mask_BLL[:, prefix:, prefix:] &= inside_BTT
    diagonal = torch.arange(total, device=block_BT.device)
    mask_BLL[:, diagonal, diagonal] = True
    return mask_BLL[:, None]


def with_prefix(positions_BT: Tensor, prefix: int) -> Tensor:
    """Positions (B, N + T) from positions counted within each block (B, T): prefix first, then each block after it."""
    before_BN = torch.arange(prefix, device=positions_BT.device).expand(len(positions_BT), -1)
    return torch.cat([before_BN, positions_BT + prefix], dim=1)


def as_taken(model: Any, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (B, 1, L, L) as the model's attention takes it: `sdpa` as it is, others add it to the scores."""
    if model.config.text_config._attn_implementation == "sdpa":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


@dataclass(frozen=True)
class Layout:
    """The token tree of some queries, a block each, and where each option's tokens are predicted."""

    ids: NDArray[np.int64]
    block: NDArray[np.int64]
    branch: NDArray[np.int64]
    position: NDArray[np.int64]
    at: NDArray[np.int64]  # (K,) token that predicts
    token: NDArray[np.int64]  # (K,) token predicted
    option: NDArray[np.int64]  # (K,) option it belongs to, counted over all queries
    ends: NDArray[np.int64]  # options before the end of each query


def joined(layouts: Sequence[Layout]) -> Layout:
    """Layouts of single queries as one of all."""

    def counted(name: str, sizes: Sequence[int]) -> NDArray[np.int64]:
        before = np.cumsum([0, *sizes[:-1]])
        return np.concatenate([getattr(one, name) + start for one, start in zip(layouts, before, strict=True)])

    def plain(name: str) -> NDArray[np.int64]:
        return np.concatenate([getattr(one, name) for one in layouts])

    tokens, options = [len(one.ids) for one in layouts], [int(one.ends[-1]) for one in layouts]
    return Layout(
        ids=plain("ids"),
        block=counted("block", [1] * len(layouts)),
        branch=plain("branch"),
        position=plain("position"),
        at=counted("at", tokens),
        token=plain("token"),
        option=counted("option", options),
        ends=counted("ends", options),
    )


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


def image_tokens(model: Any, pixel_values: Tensor, segmentation: Tensor | None = None) -> Tensor:
    """Normalised pixels (B, 3, S, S), and maps (B, S, S) where the model takes them, to a face's tokens (B, N, D)."""
    options = {"segmentation": segmentation} if isinstance(model.model, FaceMllmModel) else {}
    features = model.get_image_features(pixel_values=pixel_values, return_dict=True, **options).pooler_output
    return features if isinstance(features, Tensor) else torch.stack(list(features))


def prefix_embeddings(model: Any, image_BND: Tensor, prefix_ids: Sequence[int]) -> Tensor:
    """Embeddings of the prefix (B, N, D): its text, with the image tokens in their places."""
    ids_N = torch.tensor(prefix_ids, device=image_BND.device)
    place_N = ids_N == model.config.image_token_id
    if bool(place_N.all()):
        return image_BND
    text_ND = model.get_input_embeddings()(ids_N).to(image_BND.dtype)
    rows_BND = text_ND.repeat(len(image_BND), 1, 1)
    rows_BND[:, place_N] = image_BND
    return rows_BND


def hidden_states(
    model: Any, prefix_BND: Tensor, ids_BT: Tensor, block_BT: Tensor, branch_BT: Tensor | None, position_BT: Tensor
) -> Tensor:
    """Last hidden states of the tokens after the prefix (B, T, D), under the tree mask."""
    prefix = prefix_BND.shape[1]
    text_BTD = model.get_input_embeddings()(ids_BT).to(prefix_BND.dtype)
    states_BLD = model.model.language_model(
        inputs_embeds=torch.cat([prefix_BND, text_BTD], dim=1),
        attention_mask=as_taken(model, tree_mask(block_BT, branch_BT, prefix), text_BTD.dtype),
        position_ids=with_prefix(position_BT, prefix),
        use_cache=False,
    ).last_hidden_state
    return states_BLD[:, prefix:]


def word_logits(model: Any, states_KD: Tensor) -> Tensor:
    """Logits over the vocabulary (K, V), float32, for the picked states only."""
    return model.get_output_embeddings()(states_KD).float()
