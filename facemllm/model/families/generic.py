"""A family that nobody wrote an adapter for: modules by transformers' own attributes, and the plain path alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from facemllm.errors import UserError
from facemllm.model.families.base import Family


class Generic(Family):
    """Any model of `AutoModelForImageTextToText` whose forward pass takes `mm_encoder_outputs`."""

    feature_parts = ()

    @classmethod
    def parts(cls, model: Any) -> Mapping[str, tuple[str, ...]]:
        """The decoder, the tower and the embeddings, by what `get_decoder` and its like return; the rest joins them."""
        names = {id(module): name for name, module in model.named_modules()}
        head, words = model.get_output_embeddings(), model.get_input_embeddings()
        found = {"tower": (model.base_model.get_encoder("image"),), "embeddings": (words, head)}
        found["language"] = (model.base_model.get_decoder(),)
        return {part: tuple(names[id(m)] for m in ones if id(m) in names) for part, ones in found.items()}

    def features(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """As every family's; how the forward pass takes tokens is how they come."""
        if not hasattr(model.model, "get_image_features"):
            raise UserError(f"{type(model).__name__} has no get_image_features")
        found = model.model.get_image_features(**inputs, return_dict=True).pooler_output
        self.listed = not isinstance(found, Tensor)  # type: ignore[misc]
        return self._stacked(found, inputs)

    @property
    def unpackable(self) -> str | None:
        """Nobody proved it."""
        return f"no adapter says how the attention of {self.config.model_type} takes a block mask"
