"""What a family of image-text models has to say, and how its rows are computed.

Two paths lead to the same last hidden states. `plain`: one conversation a row, padded on the right, through the model's
own forward pass with its own masks and positions. `packed`: many questions of many faces in a row, under the block mask
of `facemllm.model.forward`, straight through the language model; only where `unpackable` has nothing to say.

A picture is (S, S, 3) uint8, S being the family's `side`; the processor's own image processor makes the model's tensors
of it, so every picture becomes the same number of tokens.

Shapes: B pictures or rows, S side, N image tokens of a picture, D width of the language model, F of a feature, R packed
rows, L tokens of a row, P of the prefix, I image tokens of all pictures, K picked places, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from facemllm.errors import UserError, refusing
from facemllm.model.face_mllm import VisualTokens
from facemllm.model.forward import as_taken, row_mask
from facemllm.model.inputs import Frame, ImageLike, square_pixels

SIDE = "prepared_image_size"
"""Key of config.json: the side of the pictures that a model of ours was trained on, where its processor takes any."""

_OF_TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"}
_NO_BLOCKS = {"linear_attention": "carries a state from token to token", "chunked_attention": "cuts rows into chunks"}
_FULL, _WINDOWED = "full_attention", "sliding_attention"


class Family:
    """One architecture family, for a configuration and a processor of it. The class attributes are what most families
    share: tokens of `get_image_features` in the places of the image token, then a causal language model."""

    model_types: ClassVar[tuple[str, ...]] = ()
    places: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "tower": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector",),
        "embeddings": ("model.language_model.embed_tokens", "lm_head"),
        "language": ("model.language_model",),
    }
    """Full names of the modules and parameters of each part that a stage may train; the longest name decides."""
    listed: ClassVar[bool] = True
    """Whether the model's forward pass takes image tokens picture by picture, or as one tensor (B, N, D)."""
    looks_around: tuple[str, ...] = ()
    """Kinds of layers in which the tokens of a picture see one another in both directions."""
    softcaps: ClassVar[bool] = False
    """Whether logits are capped by the text configuration's `final_logit_softcapping`."""
    any_size: ClassVar[bool] = False
    """Whether the tower may be shown smaller pictures than the processor makes."""
    sees_question: ClassVar[bool] = False
    """Whether a picture's tokens see the question behind them."""
    feature_parts: ClassVar[tuple[str, ...]] = ("tower", "projector")
    """The parts that `features` depends on: it may be kept where all of these are frozen."""

    def __init__(self, config: Any, processor: Any) -> None:
        self.config, self.processor = config, processor
        self.image_token_id = int(config.image_token_id)

    @classmethod
    def parts(cls, model: Any) -> Mapping[str, tuple[str, ...]]:
        """Full names of modules and parameters by part; a model need not have all of them."""
        return cls.places

    @property
    def side(self) -> int:
        """Side of prepared pictures, pixels: the processor's where it makes every picture of one size, else the one
        that config.json notes (`SIDE`), else `natural_side`."""
        return self.fixed_side or int(getattr(self.config, SIDE, None) or self.natural_side)

    @property
    def fixed_side(self) -> int | None:
        """The one side to which the processor resizes every picture; None where it takes what comes."""
        size = getattr(self.processor.image_processor, "size", None) or {}
        height, width = size.get("height"), size.get("width")
        return int(height) if height and height == width else None

    @property
    def natural_side(self) -> int:
        """The side for a checkpoint that notes none."""
        return 448

    def why_unfit(self, side: int) -> str | None:
        """Why the processor would not take pictures of this side as they are; None if it does."""
        return None

    @property
    def placeholder(self) -> str:
        """What the chat template writes for a picture, and the processor replaces."""
        return str(self.processor.image_token)

    @property
    def prepared_by(self) -> list[str]:
        """What decides the pixels that `pixels` makes of a picture."""
        return ["square", str(self.side)]

    @property
    def processed_by(self) -> list[Any]:
        """What else than pixels, rescaling and normalisation decides what `inputs` makes of them."""
        settings = self.processor.image_processor.to_dict()
        return [self.image_count, sorted((name, str(value)) for name, value in settings.items())]

    @cached_property
    def frame(self) -> Frame:
        """The chat template as ids. Raises UserError when it cannot be cut."""
        return Frame.cut(self.processor, self.image_token_id, self.placeholder, self.side)

    @cached_property
    def example(self) -> dict[str, Tensor]:
        """`inputs` of one grey picture: what does not depend on the picture, such as its grid."""
        return self.inputs(np.full((1, self.side, self.side, 3), 128, np.uint8))

    @property
    def unpackable(self) -> str | None:
        """Why questions cannot share a row, in words; None where they can."""
        kinds = set(getattr(self.config.get_text_config(), "layer_types", None) or ())
        found = [f"{kind} {why}" for kind, why in _NO_BLOCKS.items() if kind in kinds]
        return f"its {found[0]}" if found else None

    @property
    def packs(self) -> bool:
        """Whether `packed` can be used."""
        return self.unpackable is None

    @property
    def longest(self) -> int | None:
        """Most tokens that the language model reads; None where its configuration does not say."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def pixels(self, image: ImageLike) -> NDArray[np.uint8]:
        """A picture cut to a square about its centre and resized, (S, S, 3); one of that shape stays as it is."""
        if isinstance(image, np.ndarray) and image.shape == (self.side, self.side, 3):
            return image
        return square_pixels(image, self.side)

    def inputs(self, pixels_BSSC: NDArray[np.uint8] | Tensor) -> dict[str, Tensor]:
        """What the processor makes of prepared pictures, text left out, on the pictures' device. Values that are no
        whole numbers, as of changed pictures, are rounded."""
        device = pixels_BSSC.device if isinstance(pixels_BSSC, Tensor) else torch.device("cpu")
        if isinstance(pixels_BSSC, Tensor):
            pixels_BSSC = pixels_BSSC.round().clamp(0, 255).to("cpu", torch.uint8).numpy()
        images = [[Image.fromarray(one)] for one in pixels_BSSC]
        found = self.processor(images=images, text=[self.placeholder] * len(images), return_tensors="pt")
        return {name: value.to(device) for name, value in found.items() if name not in _OF_TEXT}

    def features(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Of every picture what may be kept while `feature_parts` are frozen (B, N, F); here its tokens, with what the
        deeper layers are given of it beside them."""
        found = self.image_outputs(model, inputs)
        deep = [self._stacked(one) for one in getattr(found, "deepstack_features", None) or ()]
        return torch.cat([self._stacked(found.pooler_output), *deep], dim=-1)

    def image_outputs(self, model: Any, inputs: Mapping[str, Tensor]) -> Any:
        """What transformers' `get_image_features` gives, in the model's precision."""
        inputs = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        return model.base_model.get_image_features(**inputs, return_dict=True)

    def _stacked(self, tokens: Any) -> Tensor:
        """Tokens, picture by picture or tile by tile, as (B, N, D)."""
        if not isinstance(tokens, Tensor):
            return torch.stack(list(tokens))
        return tokens.view(-1, self.image_count, tokens.shape[-1])

    @cached_property
    def image_count(self) -> int:
        """N: image tokens of a picture, as the processor writes them."""
        return self.frame.prefix_ids.count(self.image_token_id)

    def visual(self, model: Any, features_BNF: Tensor, maps_BSS: Tensor | None = None) -> VisualTokens:
        """From features to what the language model sees."""
        width = self.config.get_text_config().hidden_size
        tokens_BND, *deep = features_BNF.split(width, dim=-1)
        return VisualTokens(tokens_BND, (tokens_BND,), None, tuple(deep))

    def plain(
        self, model: Any, visual: VisualTokens, ids_BL: Tensor, mask_BL: Tensor, start_B: Tensor | None = None
    ) -> Tensor:
        """Last hidden states (B, L, D) of one conversation a row, about the picture at the same place in `visual`.
        `mask_BL` is 1 where a token stands, 0 behind; `start_B` is where a row's first answer begins, for families that
        read what stands before it in both directions."""
        return torch.as_tensor(self._pass(model, visual, ids_BL, mask_BL, start_B).last_hidden_state)

    def begun(self, model: Any, visual: VisualTokens, ids_BL: Tensor) -> tuple[Tensor, Any]:
        """Last hidden states (B, L, D) of rows without answers, all of one length, and the cache that stands for them:
        the model's own."""
        found = self._pass(model, visual, ids_BL, torch.ones_like(ids_BL), None, use_cache=True)
        return torch.as_tensor(found.last_hidden_state), found.past_key_values

    def continued(self, model: Any, ids_BL: Tensor, cache: Any) -> Tensor:
        """Last hidden states (B, L, D) of tokens that follow what a cache stands for, which grows by them."""
        found = model.base_model(input_ids=ids_BL, past_key_values=cache, use_cache=True)
        return torch.as_tensor(found.last_hidden_state)

    def _pass(
        self,
        model: Any,
        visual: VisualTokens,
        ids_BL: Tensor,
        mask_BL: Tensor,
        start_B: Tensor | None,
        use_cache: bool = False,
    ) -> Any:
        """What the model's own forward pass gives."""
        tokens: Any = list(visual.tokens_BND) if self.listed else visual.tokens_BND
        image = BaseModelOutputWithPooling(pooler_output=tokens)
        if visual.deep:
            image["deepstack_features"] = [list(one) for one in visual.deep]
        return model.base_model(
            input_ids=ids_BL,
            attention_mask=mask_BL,
            mm_encoder_outputs={"image": image},
            use_cache=use_cache,
            **self.beside(ids_BL, start_B),
        )

    def beside(self, ids_BL: Tensor, start_B: Tensor | None = None) -> dict[str, Tensor]:
        """What the model's forward pass takes beside ids, mask and image: kinds of tokens, grids."""
        return {}

    def packed(
        self,
        model: Any,
        visual: VisualTokens,
        ids_RL: Tensor,
        face_RL: Tensor,
        block_RL: Tensor,
        position_RL: Tensor,
        image_I: Tensor,
        branch_RL: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states of packed rows, flattened (R * L, D), see `model.forward`. `position_RL` counts tokens
        of a conversation, `image_I` are the flat places of the image tokens, picture after picture."""
        tokens_ID = visual.tokens_BND.flatten(0, 1)
        embedded_RLD = model.get_input_embeddings()(self._known(ids_RL)).to(tokens_ID.dtype)
        flat_ID = embedded_RLD.flatten(0, 1).index_copy(0, image_I, tokens_ID)
        image_RL = torch.zeros_like(face_RL, dtype=torch.bool).flatten()
        image_RL = image_RL.index_fill(0, image_I, True).view_as(face_RL)
        mask_R1LL = row_mask(face_RL, block_RL, branch_RL)
        around_R1LL = mask_R1LL | _same_picture(image_RL, face_RL)[:, None] if self.looks_around else mask_R1LL
        more = self.beyond(model, visual, embedded_RLD, ids_RL, image_RL, image_I)
        found = self.language(model)(
            inputs_embeds=flat_ID.view_as(embedded_RLD),
            attention_mask=self.masks(model, mask_R1LL, around_R1LL, position_RL, flat_ID.dtype),
            position_ids=self.positions(model, position_RL),
            use_cache=False,
            **more,
        )
        return torch.as_tensor(found.last_hidden_state).flatten(0, 1)

    def masks(self, model: Any, mask_R1LL: Tensor, around_R1LL: Tensor, position_RL: Tensor, dtype: torch.dtype) -> Any:
        """A boolean mask as the language model takes it, by kind of layer where some see but the last tokens;
        `around_R1LL` is that of layers in which a picture's tokens see one another."""
        text = self.config.get_text_config()
        kinds = {_FULL: mask_R1LL}
        if windowed := _WINDOWED in (getattr(text, "layer_types", None) or ()):
            kinds[_WINDOWED] = mask_R1LL
        kinds |= {kind: around_R1LL for kind in self.looks_around if kind in kinds}
        if not windowed:
            return as_taken(model, kinds[_FULL], dtype)
        near_RLL = position_RL[:, :, None] - position_RL[:, None, :] < text.sliding_window
        kinds[_WINDOWED] = kinds[_WINDOWED] & near_RLL[:, None]
        return {kind: as_taken(model, mask, dtype) for kind, mask in kinds.items()}

    def positions(self, model: Any, position_RL: Tensor) -> Tensor:
        """Positions that the language model takes, of tokens counted along their conversation."""
        return position_RL

    def beyond(
        self, model: Any, visual: VisualTokens, embedded_RLD: Tensor, ids_RL: Tensor, image_RL: Tensor, image_I: Tensor
    ) -> dict[str, Any]:
        """What the language model takes beyond embeddings, mask and positions."""
        return {}

    def _known(self, ids: Tensor) -> Tensor:
        """Ids that the embeddings have a row for: some families' image token has none."""
        if self.image_token_id < self.config.get_text_config().vocab_size:
            return ids
        return ids.masked_fill(ids == self.image_token_id, 0)

    def logits(self, model: Any, states_KD: Tensor) -> Tensor:
        """Logits over the vocabulary (K, V), float32, of picked states."""
        logits_KV = model.get_output_embeddings()(states_KD)
        cap = getattr(self.config.get_text_config(), "final_logit_softcapping", None) if self.softcaps else None
        return (torch.tanh(logits_KV / cap) * cap if cap else logits_KV).float()

    @classmethod
    def language(cls, model: Any) -> Any:
        """The language model without its head."""
        return model.get_submodule(cls.parts(model)["language"][0])

    @classmethod
    def tower(cls, model: Any) -> Any:
        """The vision tower."""
        return model.get_submodule(cls.parts(model)["tower"][0])

    @classmethod
    def module_of(cls, model: Any) -> Callable[[str], str]:
        """The part that a parameter or buffer of the model belongs to, by its full name, wrappers' prefixes included.
        What belongs to none joins picture and text: it counts as projector."""
        return partial(_part_of, parts=cls.parts(model))

    @classmethod
    def lora_targets(cls, model: Any) -> list[str]:
        """Names of the linear layers of the language model: those that adapters go into."""
        module_of = cls.module_of(model)
        linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        return [name for name in linear if module_of(name) == "language"]

    def check(self, model: Any, name: str) -> None:
        """Raises UserError unless the processor writes as many image tokens as the model makes of a picture, and the
        language model reads them: one pass over a grey picture."""
        with torch.no_grad(), refusing(f"cannot use {name}: its processor does not fit the model"):
            features_BNF = self.features(model, {n: v.to(model.device) for n, v in self.example.items()})
            written, made = self.image_count, features_BNF.shape[1]
        if written != made:
            raise UserError(
                f"cannot use {name}: its processor writes {written} image tokens for a picture of {self.side} pixels "
                f"and its vision tower makes {made}; see its processor_config.json"
            )
        with torch.no_grad(), refusing(f"cannot use {name}: its language model does not read its image tokens"):
            ids_1P = torch.tensor([self.frame.prefix_ids], device=model.device)
            states_1PD = self.plain(model, self.visual(model, features_BNF), ids_1P, torch.ones_like(ids_1P))
            logits_1V = self.logits(model, states_1PD[:, -1])
        if logits_1V.isnan().any():
            raise UserError(
                f"cannot use {name}: of a grey picture it computes no numbers (NaN); its weights are damaged, or what "
                "its processor does to pictures is (image_std, rescale_factor)"
            )


def _part_of(name: str, parts: Mapping[str, tuple[str, ...]]) -> str:
    """The part whose longest name is in a full name."""
    whole = f".{name}."
    found = [(len(one), part) for part, names in parts.items() for one in names if f".{one}." in whole]
    return max(found)[1] if found else "projector"


def _same_picture(image_RL: Tensor, face_RL: Tensor) -> Tensor:
    """Pairs of image tokens (R, L, L) that stand in one run of image tokens of one face."""
    starts_RL = image_RL & ~torch.nn.functional.pad(image_RL, (1, 0))[:, :-1]
    run_RL = starts_RL.cumsum(1) * image_RL
    both_RLL = (run_RL[:, :, None] == run_RL[:, None, :]) & image_RL[:, :, None]
    return both_RLL & (face_RL[:, :, None] == face_RL[:, None, :])
