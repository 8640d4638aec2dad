"""A family that nobody wrote an adapter for: modules by transformers' own attributes, and the plain path alone, which
is tried on one picture before it is used."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from facemllm.errors import UserError, one_line
from facemllm.model.families.base import Family

_KINDS = ("token_type_ids", "mm_token_type_ids")


class Generic(Family):
    """Any model of `AutoModelForImageTextToText` whose forward pass takes `mm_encoder_outputs`."""

    feature_parts = ()
    softcaps = True
    sees_question = True  # for all that is known

    @classmethod
    def parts(cls, model: Any) -> Mapping[str, tuple[str, ...]]:
        """The decoder, the tower and the embeddings, by what `get_decoder` and its like return; the rest joins them."""
        names = {id(module): name for name, module in model.named_modules()}
        head, words = model.get_output_embeddings(), model.get_input_embeddings()
        found = {"tower": (model.base_model.get_encoder("image"),), "embeddings": (words, head)}
        found["language"] = (model.base_model.get_decoder(),)
        return {part: tuple(names[id(m)] for m in ones if id(m) in names) for part, ones in found.items()}

    def image_outputs(self, model: Any, inputs: Mapping[str, Tensor]) -> Any:
        """As every family's; how the forward pass takes tokens is how they come."""
        found = super().image_outputs(model, inputs)
        self.listed = not isinstance(found.pooler_output, Tensor)  # type: ignore[misc]
        return found

    @property
    def unpackable(self) -> str | None:
        """Nobody proved it."""
        return f"no adapter says how the attention of {self.config.model_type} takes a block mask"

    @cached_property
    def _asked(self) -> Mapping[str, Tensor]:
        """What the processor makes of one grey picture without words."""
        grey = Image.new("RGB", (self.side, self.side), (128, 128, 128))
        return dict(self.processor(images=[[grey]], text=[self.placeholder], return_tensors="pt"))

    def beside(self, ids_BL: Tensor, start_B: Tensor | None = None) -> dict[str, Tensor]:
        """Kinds of tokens where the processor tells them, and what it says of a picture's size, a row each."""
        image_BL = (ids_BL == self.image_token_id).int()
        sizes = {n: v for n, v in self._asked.items() if n.startswith("image_") and isinstance(v, Tensor)}
        found = {n: v.to(ids_BL.device).expand(len(ids_BL), *v.shape[1:]) for n, v in sizes.items()}
        return found | {name: image_BL for name in _KINDS if name in self._asked}

    @torch.no_grad()
    def check(self, model: Any, name: str) -> None:
        """As every family's; and logits have to be those of the model's own forward pass on its processor's inputs."""
        kind = type(model).__name__
        lacking = [part for part in ("tower", "language") if not self.parts(model).get(part)]
        takes = inspect.signature(type(model.base_model).forward).parameters
        if not hasattr(model.base_model, "get_image_features") or "mm_encoder_outputs" not in takes:
            lacking.append("image tokens (get_image_features and mm_encoder_outputs)")
        if lacking:
            raise UserError(f"cannot use {name}: no adapter is written for {kind}, which hides its {lacking[0]}")
        super().check(model, name)
        asked = {n: v.to(model.device) for n, v in self._asked.items() if n != "labels"}
        try:
            wanted = model.eval()(**asked).logits.float()
            visual = self.visual(model, self.features(model, self.example))
            found = self.logits(model, self.plain(model, visual, asked["input_ids"], asked["attention_mask"]))
        except Exception as error:
            raise UserError(f"cannot use {name}: no adapter is written for {kind}: {one_line(error)}") from error
        if not torch.allclose(found, wanted, atol=1e-3 if wanted.dtype == torch.float32 else 1e-1):
            raise UserError(
                f"cannot use {name}: no adapter is written for {kind}, whose logits are not those of a language "
                "model on image tokens put in their places"
            )
