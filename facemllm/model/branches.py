"""Giving a LLaVA-layout model FaceInsight's branches: from base and settings to `FaceMllmForConditionalGeneration`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlavaForConditionalGeneration

from facemllm.errors import UserError
from facemllm.model.face_mllm import FaceMllmConfig, FaceMllmForConditionalGeneration, FaceMllmProcessor
from facemllm.model.knowledge import NO_WORD, KnowledgeBranch
from facemllm.model.segmentation import SegmentationBranch
from facemllm.settings import Model
from facemllm.settings.train import Segmentation, is_grid

_SHAPE = ("side", "patch", "width", "layers", "heads")


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
    are shared, not copied; the branches' start from `seed`. Raises UserError for a model other than LLaVA.
    """
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
    more = chosen.tokens if chosen.mode == "append" else 0
    more += knows.prompt_tokens if knows.enabled else 0
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
        if segmentation is not None:
            shape = {name: value for name, value in segmentation.items() if name != "mode"}
            extended.model.segmentation = SegmentationBranch(**shape)
        if knowledge is not None and graph is not None:
            extended.model.knowledge = KnowledgeBranch(**knowledge)
            extended.model.knowledge.graph.copy_(torch.from_numpy(graph.matrix_AA))
            padded = [row + [NO_WORD] * (knowledge["words"] - len(row)) for row in ids]
            extended.model.knowledge.words.copy_(torch.tensor(padded))
    return extended, _processor(processor, more, withheld_classes)


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


def _processor(processor: Any, more: int, withheld_classes: Sequence[int]) -> FaceMllmProcessor:
    return FaceMllmProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        num_additional_image_tokens=processor.num_additional_image_tokens + more,
        image_token=processor.image_token,
        chat_template=processor.chat_template,
        withheld_classes=sorted(withheld_classes),
    )
