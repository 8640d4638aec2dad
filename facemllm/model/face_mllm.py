"""LLaVA with FaceInsight's two branches, registered with transformers: configuration, model, and processor;
and giving a LLaVA model the branches that the settings ask for (`extend`).

Everything the language model sees of a face comes out of `get_image_features`, in this order: the image's tokens (with
the map's added to them, or behind them), then the soft prompt. So the image placeholder merely stands for more tokens,
and generation, its cache, left padding and packing are LLaVA's own. Without either branch a model is plain LLaVA.

Shapes: B faces, S image side, N tokens, A characteristics, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import BatchFeature, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel

from facemllm.errors import UserError
from facemllm.model.branches import NO_MAP, NO_WORD, KnowledgeBranch, SegmentationBranch
from facemllm.model.inputs import MapLike, face_map
from facemllm.settings import Model
from facemllm.settings.train import Segmentation, is_grid

_SHAPE = ("side", "patch", "width", "layers", "heads")


@strict
class FaceMllmConfig(LlavaConfig):
    """A LLaVA configuration and that of the branches, None where there is none. `segmentation_config` holds `mode` and
    the arguments of `SegmentationBranch`, `knowledge_config` those of `KnowledgeBranch`."""

    model_type = "face_mllm"

    segmentation_config: dict[str, Any] | None = None
    knowledge_config: dict[str, Any] | None = None


@dataclass(frozen=True)
class VisualTokens:
    """A face as the language model will see it: all its tokens (B, N, D), those of each view of it (image and map, one
    where they are added), the scores of its characteristics (B, A), log-odds, None without the knowledge branch, and
    what some models add to its tokens in deeper layers, (B, N, D) a layer."""

    tokens_BND: Tensor
    views: tuple[Tensor, ...]
    scores_BA: Tensor | None
    deep: tuple[Tensor, ...] = ()

    @property
    def flat_BNF(self) -> Tensor:
        """All of a face that its rows need, as one tensor."""
        return torch.cat([self.tokens_BND, *self.deep], -1) if self.deep else self.tokens_BND

    @classmethod
    def of_flat(cls, flat_BNF: Tensor, width: int) -> VisualTokens:
        """The tokens, `width` wide, that `flat_BNF` was made of."""
        tokens_BND, *deep = flat_BNF.split(width, -1)
        return cls(tokens_BND, (), None, tuple(deep))

    def rows(self, index: Sequence[int] | Tensor) -> VisualTokens:
        """These faces, in this order; one may be there more than once."""
        scores = None if self.scores_BA is None else self.scores_BA[index]
        views, deep = (tuple(one[index] for one in ones) for ones in (self.views, self.deep))
        return VisualTokens(self.tokens_BND[index], views, scores, deep)


class FaceMllmModel(LlavaModel):
    """LLaVA's model with the branches between projector and language model."""

    config_class = FaceMllmConfig

    def __init__(self, config: FaceMllmConfig) -> None:
        super().__init__(config)
        self.make_branches()
        self.post_init()

    def make_branches(self) -> None:
        """New branches, as the configuration has them."""
        chosen = self.config.segmentation_config
        if chosen is not None:
            self.mode = chosen["mode"]
            self.segmentation = SegmentationBranch(**{name: chosen[name] for name in chosen if name != "mode"})
        if self.config.knowledge_config is not None:
            self.knowledge = KnowledgeBranch(**self.config.knowledge_config)

    @property
    def additional_tokens(self) -> int:
        """Tokens of a face beyond those of its image."""
        segmentation, knowledge = self.config.segmentation_config or {}, self.config.knowledge_config or {}
        appended = segmentation["tokens"] if segmentation.get("mode") == "append" else 0
        return int(appended + knowledge.get("prompt_tokens", 0))

    def join(self, image_BND: Tensor, segmentation: Tensor | None) -> VisualTokens:
        """Projected image tokens and maps (B, S, S) uint8, None if no face has one, as the language model sees them."""
        views: tuple[Tensor, ...] = (image_BND,)
        if self.config.segmentation_config is not None:
            if segmentation is None:
                segmentation = torch.full((len(image_BND), 1, 1), NO_MAP, dtype=torch.uint8, device=image_BND.device)
            map_BND = self.segmentation(segmentation).to(image_BND.dtype)
            views = (image_BND, map_BND) if self.mode == "append" else (image_BND + map_BND,)
        visual_BND = torch.cat(views, 1)
        if self.config.knowledge_config is None:
            return VisualTokens(visual_BND, views, None)
        scores_BA, prompt_BPD = self.knowledge(visual_BND, self.get_input_embeddings().weight)
        return VisualTokens(torch.cat([visual_BND, prompt_BPD.to(visual_BND.dtype)], 1), views, scores_BA)

    def get_image_features(
        self, pixel_values: Tensor, segmentation: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """As LLaVA's; `pooler_output` holds every face's tokens, `attentions` is unused."""
        outputs = super().get_image_features(pixel_values=pixel_values, **kwargs | {"return_dict": True})
        outputs.pooler_output = list(self.join(torch.stack(list(outputs.pooler_output)), segmentation).tokens_BND)
        return outputs

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        segmentation: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As LLaVA's; `segmentation` (B, S, S) uint8 are the maps of the images in `pixel_values`."""
        if pixel_values is not None:
            features = self.get_image_features(
                pixel_values=pixel_values,
                segmentation=segmentation,
                vision_feature_layer=kwargs.pop("vision_feature_layer", None),
                vision_feature_select_strategy=kwargs.pop("vision_feature_select_strategy", None),
            )
            mm_encoder_outputs = {"image": features}
        return super().forward(input_ids=input_ids, mm_encoder_outputs=mm_encoder_outputs, **kwargs)


class FaceMllmForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA for generation with the branches; takes `segmentation` beside `pixel_values`."""

    config_class = FaceMllmConfig

    def __init__(self, config: FaceMllmConfig) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)  # LLaVA's own would build its model in vain
        self.model = FaceMllmModel(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """Tokens of the faces, as the language model sees them."""
        return self.model.get_image_features(pixel_values=pixel_values, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        segmentation: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As LLaVA's; `segmentation` (B, S, S) uint8 are the maps of the images in `pixel_values`."""
        return super().forward(input_ids=input_ids, pixel_values=pixel_values, segmentation=segmentation, **kwargs)


class FaceMllmProcessor(LlavaProcessor):
    """`processor(images=..., segmentation=..., text=...)`: one map an image, PNG bytes or class numbers, None for none.
    `withheld_classes` are never shown to the model (see `facemllm.model.inputs`)."""

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


@dataclass(frozen=True)
class Graph:
    """The characteristics of the knowledge branch: names, the words each stands for, and their matrix C (A, A)."""

    names: tuple[str, ...]
    words: tuple[str, ...]
    matrix_AA: NDArray[np.floating[Any]]


def extend(
    model: Any, processor: Any, settings: Model, graph: Graph | None, withheld_classes: Sequence[int], seed: int
) -> tuple[Any, Any]:
    """The model and its processor with the branches that the settings ask for; as they are if none is asked for.
    `graph` is needed when `knowledge.enabled`; the map classes `withheld_classes` are never shown. The base's weights
    are shared, not copied; the branches' start from `seed`. Raises UserError for a model other than LLaVA."""
    chosen, knows = settings.segmentation, settings.knowledge
    if chosen.mode == "none" and not knows.enabled:
        return model, processor
    if type(model) is not LlavaForConditionalGeneration:
        raise UserError(
            f"model.segmentation and model.knowledge extend LLaVA models (LlavaForConditionalGeneration); "
            f"{settings.base or 'this base'} is a {type(model).__name__}: set mode: none and enabled: false"
        )
    text: Any = model.config.text_config
    width = text.hidden_size
    segmentation = _segmentation_config(chosen, processor, width)
    knowledge, ids = _knowledge_config(settings, processor, graph, width)
    plain = {name: value for name, value in model.config.to_dict().items() if name != "model_type"}
    config = FaceMllmConfig(**plain, segmentation_config=segmentation, knowledge_config=knowledge)
    with torch.device("meta"):
        extended = FaceMllmForConditionalGeneration(config)
    for name in ("vision_tower", "multi_modal_projector", "language_model"):
        setattr(extended.model, name, getattr(model.model, name))
    extended.lm_head = model.lm_head
    extended.generation_config = model.generation_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        extended.model.make_branches()
    if knowledge is not None and graph is not None:
        extended.model.knowledge.graph.copy_(torch.from_numpy(graph.matrix_AA))
        padded = [row + [NO_WORD] * (knowledge["words"] - len(row)) for row in ids]
        extended.model.knowledge.words.copy_(torch.tensor(padded))
    return extended, FaceMllmProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        num_additional_image_tokens=processor.num_additional_image_tokens + extended.model.additional_tokens,
        image_token=processor.image_token,
        chat_template=processor.chat_template,
        withheld_classes=sorted(withheld_classes),
    )


def _segmentation_config(chosen: Segmentation, processor: Any, width: int) -> dict[str, Any] | None:
    if chosen.mode == "none":
        return None
    tokens = chosen.tokens if chosen.mode == "append" else _image_tokens(processor)
    if not is_grid(tokens):
        raise UserError(
            f"model.segmentation.mode: add needs a token of the image for each of the map's; the {tokens} tokens "
            "of this tower are neither a square nor a square and one: set mode: append"
        )
    return {"mode": chosen.mode, **chosen.model_dump(include=set(_SHAPE)), "tokens": tokens, "output": width}


def _knowledge_config(
    settings: Model, processor: Any, graph: Graph | None, width: int
) -> tuple[dict[str, Any] | None, list[list[int]]]:
    """The knowledge branch's configuration, and the word ids of each characteristic."""
    knows = settings.knowledge
    if not knows.enabled:
        return None, []
    if graph is None or not graph.names:
        raise UserError(
            f"model.knowledge: the training data answer no closed question of {', '.join(knows.tasks)} in more "
            "than one way; name other tasks in model.knowledge.tasks or set enabled: false"
        )
    ids = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in graph.words]
    shape = {"layers": knows.gcn_layers, "prompt_tokens": knows.prompt_tokens}
    return {"names": list(graph.names), "words": max(map(len, ids)), "width": width, **shape}, ids


def asked(settings: Model, withheld_classes: Sequence[int]) -> dict[str, Any]:
    """The branches that settings ask for, in the words of `branches_of`."""
    knows = settings.knowledge
    knowledge = {"layers": knows.gcn_layers, "prompt_tokens": knows.prompt_tokens} if knows.enabled else None
    segmentation = settings.segmentation.model_dump()
    return _in_words(segmentation if segmentation["mode"] != "none" else None, knowledge, withheld_classes)


def branches_of(model: Any, processor: Any) -> dict[str, Any]:
    """The branches that a model has, by the settings that made them; what a branch is like only if it is there."""
    segmentation, knowledge = (getattr(model.config, f"{name}_config", None) for name in ("segmentation", "knowledge"))
    return _in_words(segmentation, knowledge, getattr(processor, "withheld_classes", ()))


def _in_words(
    segmentation: dict[str, Any] | None, knowledge: dict[str, Any] | None, withheld_classes: Sequence[int]
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "model.segmentation.mode": segmentation["mode"] if segmentation else "none",
        "model.knowledge.enabled": knowledge is not None,
    }
    if segmentation:
        own = (*_SHAPE, "tokens") if segmentation["mode"] == "append" else _SHAPE
        found |= {f"model.segmentation.{name}": segmentation[name] for name in own}
        found["map classes withheld for reformat.held_out"] = sorted(withheld_classes) or None
    if knowledge:
        found["model.knowledge.gcn_layers"] = knowledge["layers"]
        found["model.knowledge.prompt_tokens"] = knowledge["prompt_tokens"]
    return found


def _image_tokens(processor: Any) -> int:
    size = processor.image_processor.crop_size or processor.image_processor.size
    patches = (size["height"] // processor.patch_size) * (size["width"] // processor.patch_size)
    cut = processor.vision_feature_select_strategy == "default"
    return int(patches + processor.num_additional_image_tokens - cut)
