"""The processor of a model with a segmentation branch: LLaVA's, which takes maps of face parts too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, LlavaProcessor

from facemllm.errors import UserError
from facemllm.model.maps import MapLike, face_map


class FaceMllmProcessor(LlavaProcessor):
    """`processor(images=..., segmentation=..., text=...)`: one map an image, PNG bytes or class numbers, None for none.

    `withheld_classes` are never shown to the model (see `facemllm.model.maps`).
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        withheld_classes: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        # spelled out: transformers reads from this signature which parts to load
        self.withheld_classes = list(withheld_classes)
        super().__init__(
            image_processor=image_processor,
            tokenizer=tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )

    def __call__(self, images: Any = None, text: Any = None, segmentation: Any = None, **kwargs: Any) -> BatchFeature:
        """As LLaVA's; with `segmentation`, the result holds `segmentation` (images, S, S) uint8. Raises UserError."""
        features = super().__call__(images=images, text=text, **kwargs)
        if segmentation is not None:
            maps: Sequence[MapLike | None] = segmentation if isinstance(segmentation, list | tuple) else [segmentation]
            read = [face_map(one, self.image_processor, self.withheld_classes) for one in maps]
            if len(read) != (count := len(features.get("pixel_values", ()))):
                raise UserError(f"{len(read)} segmentation maps for {count} images; give one an image, None for none")
            features["segmentation"] = torch.from_numpy(np.stack(read))
        return features
