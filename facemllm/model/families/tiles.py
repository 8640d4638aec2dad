"""Families whose processor cuts a picture into tiles: LLaVA-NeXT, LLaVA-OneVision, SmolVLM and Idefics3, InternVL. How
many a square becomes depends on its side alone, so every picture has as many tokens as the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from facemllm.model.families.base import Family


class LlavaNext(Family):
    """LLaVA-NeXT: the whole picture and tiles of it, a learned token at the end of each line."""

    model_types = ("llava_next",)
    places: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **Family.places,
        "projector": ("model.multi_modal_projector", "model.image_newline"),
    }

    @property
    def fixed_side(self) -> int | None:
        """None: what a picture becomes depends on its size."""
        return None

    @property
    def natural_side(self) -> int:
        """A tile's side."""
        return int(self.config.vision_config.image_size)


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision."""

    model_types = ("llava_onevision",)


class Idefics(Family):
    """SmolVLM and Idefics3: every picture is enlarged to the processor's longest edge, then cut."""

    model_types = ("idefics3", "smolvlm")
    places: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "tower": ("model.vision_model",),
        "projector": ("model.connector",),
        "embeddings": ("model.text_model.embed_tokens", "lm_head"),
        "language": ("model.text_model",),
    }

    @property
    def natural_side(self) -> int:
        """A tile's side: a picture of it is enlarged, and loses nothing."""
        return int(self.config.vision_config.image_size)


class InternVL(Family):
    """InternVL: a square is one tile."""

    model_types = ("internvl",)
    listed = False
