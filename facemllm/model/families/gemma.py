"""Gemma 3 and 4, whose image tokens see one another and whose layers see windows, and PaliGemma, which reads all of a
prompt in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from facemllm.model.face_mllm import VisualTokens
from facemllm.model.families.base import Family
from facemllm.model.inputs import Frame


class Gemma3(Family):
    """Gemma 3."""

    model_types = ("gemma3",)
    listed = False
    looks_around = ("full_attention", "sliding_attention")

    def beside(self, ids_BL: Tensor, start_B: Tensor | None = None) -> dict[str, Tensor]:
        """Which tokens are the picture's."""
        return {"token_type_ids": (ids_BL == self.image_token_id).int()}


class Gemma4(Family):
    """Gemma 4: of the larger ones image tokens see one another in windowed layers; the smaller ones have embeddings in
    every layer."""

    model_types = ("gemma4",)
    places: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **Family.places,
        "projector": ("model.embed_vision",),
        "embeddings": (*Family.places["embeddings"], "model.language_model.embed_tokens_per_layer"),
    }
    softcaps = True

    @property
    def looks_around(self) -> tuple[str, ...]:  # type: ignore[override]
        """Windowed layers, if the configuration asks for it."""
        wanted = self.config.get_text_config().use_bidirectional_attention == "vision"
        return ("sliding_attention",) if wanted else ()

    @property
    def fixed_side(self) -> int | None:
        """The side that every square is resized to, by the processor's budget of tokens."""
        images = self.processor.image_processor
        step = images.patch_size * images.pooling_kernel_size
        return int(images.max_soft_tokens**0.5) * step

    def beside(self, ids_BL: Tensor, start_B: Tensor | None = None) -> dict[str, Tensor]:
        """Which tokens are the picture's."""
        return {"mm_token_type_ids": (ids_BL == self.image_token_id).int()}

    def beyond(
        self, model: Any, visual: VisualTokens, embedded_RLD: Tensor, ids_RL: Tensor, image_RL: Tensor, image_I: Tensor
    ) -> dict[str, Any]:
        """The smaller ones' embeddings for every layer; a padding token's where the picture stands."""
        text = self.config.get_text_config()
        if not text.hidden_size_per_layer_input:
            return {}
        known_RL = ids_RL.masked_fill(image_RL, text.pad_token_id)
        return {"per_layer_inputs": self.language(model).get_per_layer_inputs(known_RL, None)}


class PaliGemma(Family):
    """PaliGemma and PaliGemma 2. The processor puts a start token behind the picture and a line break behind the
    prompt."""

    model_types = ("paligemma",)
    listed = False
    softcaps = True
    sees_question = True

    @property
    def unpackable(self) -> str | None:
        """A picture's tokens see the question."""
        return "its image tokens see the question, so that no two questions share them"

    @cached_property
    def frame(self) -> Frame:
        """As every family's; the line break that ends a prompt goes from the prefix to where the answer begins."""
        cut = Frame.cut(self.processor, self.image_token_id, self.placeholder, self.side)
        ends = len(cut.ids("\n"))
        (before, between), (again, later) = cut.first, cut.later
        return replace(
            cut, prefix_ids=cut.prefix_ids[:-ends], first=(before, f"{between}\n"), later=(again, f"{later}\n")
        )

    def beside(self, ids_BL: Tensor, start_B: Tensor | None = None) -> dict[str, Tensor]:
        """0 in the prompt, 1 from the answer on."""
        place_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        start_B1 = torch.full((len(ids_BL), 1), ids_BL.shape[1]) if start_B is None else start_B[:, None]
        return {"token_type_ids": (place_L >= start_B1.to(ids_BL.device)).int()}
