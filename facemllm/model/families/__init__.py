"""Families of image-text models: what is particular to each architecture, behind one interface (`base.Family`).

`family_of(config, processor)` gives the one that a model belongs to. A model type that is not in `FAMILIES` gets
`Generic`, which finds its modules by transformers' own attributes and computes by the model's own forward pass alone.
"""

from __future__ import annotations

from typing import Any

from facemllm.model.families.base import Family
from facemllm.model.families.gemma import Gemma3, Gemma4, PaliGemma
from facemllm.model.families.generic import Generic
from facemllm.model.families.llava import Llava
from facemllm.model.families.qwen import QwenVL
from facemllm.model.families.tiles import Idefics, InternVL, LlavaNext, LlavaOnevision

FAMILIES: dict[str, type[Family]] = {
    model_type: family
    for family in (Llava, LlavaNext, LlavaOnevision, QwenVL, Idefics, InternVL, Gemma3, Gemma4, PaliGemma)
    for model_type in family.model_types
}
"""By `model_type`."""


def family_class(config: Any) -> type[Family]:
    """The family of a configuration."""
    return FAMILIES.get(config.model_type, Generic)


def family_of(config: Any, processor: Any) -> Family:
    """The family of a model, with its processor. Cheap: no weights are touched."""
    return family_class(config)(config, processor)


__all__ = ["FAMILIES", "Family", "Generic", "Llava", "family_class", "family_of"]
