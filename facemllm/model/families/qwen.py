"""Qwen-VL, from Qwen2-VL on: positions along several axes, tokens for deeper layers (Qwen3-VL), and language models
with linear attention (Qwen3.5), whose questions cannot share a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from facemllm.model.face_mllm import VisualTokens
from facemllm.model.families.base import Family


class QwenVL(Family):
    """The layout of Qwen-VL: the projector is the tower's `merger`."""

    model_types = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp")
    places: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **Family.places,
        "tower": ("model.visual",),
        "projector": ("model.visual.merger", "model.visual.deepstack_merger_list"),
    }

    def __init__(self, config: Any, processor: Any) -> None:
        super().__init__(config, processor)
        self._rope: tuple[Tensor, int] | None = None

    @property
    def fixed_side(self) -> int | None:
        """None: pictures of any size are taken."""
        return None

    def why_unfit(self, side: int) -> str | None:
        """Pictures have to be whole patches, and neither too small nor too large to be left as they are."""
        images = self.processor.image_processor
        patch = images.patch_size * images.merge_size
        least, most = images.size.shortest_edge, images.size.longest_edge
        if side % patch:
            return f"is no multiple of {patch}, its patches' side"
        if not least <= side * side <= most:
            return f"has {side * side} pixels, and its processor leaves {least} to {most} as they are"
        return None

    def beside(self, ids_BL: Tensor, start_B: Tensor | None = None) -> dict[str, Tensor]:
        """Kinds of tokens and a grid a row, from which the model counts its positions."""
        grid = self.example["image_grid_thw"].to(ids_BL.device)
        return {
            "mm_token_type_ids": (ids_BL == self.image_token_id).int(),
            "image_grid_thw": grid.expand(len(ids_BL), 3),
        }

    def positions(self, model: Any, position_RL: Tensor) -> Tensor:
        """Of each axis (3, R, L), by the model's own count: a picture spans fewer positions than it has tokens."""
        if self._rope is None:
            ids_1P = torch.tensor([self.frame.prefix_ids])
            found_31P, delta_11 = model.model.get_rope_index(ids_1P, **self.beside(ids_1P))
            self._rope = (found_31P[:, 0], int(delta_11))
        prefix_3P, delta = self._rope[0].to(position_RL.device), self._rope[1]
        length = prefix_3P.shape[1]
        inside_3RL = prefix_3P[:, position_RL.clamp(max=length - 1)]
        return torch.where(position_RL < length, inside_3RL, position_RL + delta)

    def beyond(
        self, model: Any, visual: VisualTokens, embedded_RLD: Tensor, ids_RL: Tensor, image_RL: Tensor, image_I: Tensor
    ) -> dict[str, Any]:
        """Tokens that are added in deeper layers, in the order in which they stand in the rows."""
        if not visual.deep:
            return {}
        order = image_I.argsort()
        deep = [one.flatten(0, 1).index_select(0, order) for one in visual.deep]
        return {"visual_pos_masks": image_RL, "deepstack_visual_embeds": deep}
