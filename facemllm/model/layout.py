"""The tokens of closed questions as a tree: a block each, and every option a branch of its block (see `masks`).

Shapes: K scored positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
