"""LLaVA-1.5 and the models of ours that extend it (`face_mllm`): pixels normalised on their device, a tower whose
features stand before the projector, and the branches beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModel

from facemllm.errors import UserError, refusing
from facemllm.model.face_mllm import VisualTokens
from facemllm.model.families.base import Family
from facemllm.model.forward import tower_features, visual_tokens
from facemllm.model.inputs import ImageLike, face_pixels, normalise


class Llava(Family):
    """LLaVA's layout."""

    model_types = ("llava", "face_mllm")
    places: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **Family.places,
        "segmentation": ("model.segmentation",),
        "knowledge": ("model.knowledge",),
    }
    any_size = True
    feature_parts = ("tower",)

    @property
    def prepared_by(self) -> list[str]:
        """The settings by which the processor resizes and cuts."""
        return cut_by(self.processor.image_processor)

    @property
    def processed_by(self) -> list[Any]:
        """Nothing else."""
        return []

    @property
    def fixed_side(self) -> int | None:
        """What the processor cuts pictures to."""
        images = self.processor.image_processor
        side = (images.crop_size or images.size).get("height")
        return int(side) if side else None

    def pixels(self, image: ImageLike) -> NDArray[np.uint8]:
        """A picture as the processor resizes and cuts it."""
        if isinstance(image, np.ndarray) and image.shape == (self.side, self.side, 3):
            return image
        return face_pixels(image, self.processor.image_processor)

    def inputs(self, pixels_BSSC: NDArray[np.uint8] | Tensor) -> dict[str, Tensor]:
        """Normalised pixels, computed where the pictures are."""
        pixels = pixels_BSSC if isinstance(pixels_BSSC, Tensor) else torch.from_numpy(pixels_BSSC)
        return {"pixel_values": normalise(pixels, self.processor.image_processor)}

    def features(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """The tower's selected layers, before the projector."""
        return tower_features(model, inputs["pixel_values"])

    def visual(self, model: Any, features_BNF: Tensor, maps_BSS: Tensor | None = None) -> VisualTokens:
        """Projected tokens, and what the branches add."""
        return visual_tokens(model, features_BNF, maps_BSS)

    def check(self, model: Any, name: str) -> None:
        """As every family's, by shapes alone: no weights, no time."""
        with refusing(f"cannot use {name}: its processor does not fit its vision tower"):
            with torch.device("meta"):
                tower = AutoModel.from_config(model.config.vision_config).eval()
                outputs = tower(self.example["pixel_values"].to("meta"), output_hidden_states=True, return_dict=True)
            chosen = model.config.vision_feature_layer
            made = outputs.hidden_states[chosen if isinstance(chosen, int) else chosen[0]].shape[1]
        made -= model.config.vision_feature_select_strategy == "default"
        made += getattr(model.model, "additional_tokens", 0)
        if (written := self.image_count) != made:
            raise UserError(
                f"cannot use {name}: its processor writes {written} image tokens and its vision tower makes {made}; "
                "see patch_size, num_additional_image_tokens, vision_feature_select_strategy in processor_config.json"
            )


def cut_by(image_processor: Any) -> list[str]:
    """The settings of an image processor that decide its pixels, before they are rescaled and normalised. The rest of
    its fields differ between a fresh and a loaded one."""
    fields = ("size", "crop_size", "resample", "do_resize", "do_center_crop", "do_convert_rgb")
    return [type(image_processor).__name__, *(str(getattr(image_processor, field, None)) for field in fields)]
