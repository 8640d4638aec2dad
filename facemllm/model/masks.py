"""Packed turns as trees of tokens, their attention masks and positions: one image, many questions, nothing read across.

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

Shapes: B rows, T tokens after the prefix, N tokens of the prefix, K scored positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
