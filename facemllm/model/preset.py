"""Models to start from: the embedded `tiny` preset, built from scratch, a published LLaVA-family checkpoint (`hub`), or
a published vision tower and language model (`parts`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, Qwen2Config

from facemllm.core.hub import fetched
from facemllm.errors import UserError
from facemllm.model.loading import load_model
from facemllm.model.parts import assemble
from facemllm.model.tokenizer import BOS, CHAT_TEMPLATE, EOS, IMAGE, PAD, build_tokenizer
from facemllm.model.tower import GRID, FaceTowerConfig
from facemllm.settings import Model

__all__ = ["build_tiny", "load_base", "load_model"]

WIDTH, LAYERS, HEADS, FEED_FORWARD, CONTEXT = 192, 3, 3, 512, 1024


def build_tiny(settings: Model, texts: Iterable[str], answers: Iterable[str], seed: int) -> tuple[Any, Any]:
    """The 3 M parameter preset with random weights: residual tower, two-layer projector, Qwen2 of three layers.

    `texts` is the training split's text, `answers` its closed answers; the same sets and seed give the same bytes.
    Returns (LlavaForConditionalGeneration, LlavaProcessor).
    """
    tokenizer = build_tokenizer(texts, answers)
    side = settings.image_size
    images = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=True,
    )
    # the processor counts (side // patch)^2 + extra image tokens: the 3x3 grid and the global mean
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=side // GRID,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )
    vocabulary = tokenizer.get_vocab()
    ids = {"pad": vocabulary[PAD], "bos": vocabulary[BOS], "eos": vocabulary[EOS]}
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=ids["pad"],
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
    )
    config = LlavaConfig(
        vision_config=FaceTowerConfig(image_size=side),
        text_config=text,
        image_token_index=vocabulary[IMAGE],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        # fan-in sized weights, not transformers' normal(0, 0.02): the tower behind is untrained and needs its gradient
        for linear in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
            linear.reset_parameters()
    for name in ("pad", "bos", "eos"):
        setattr(model.generation_config, f"{name}_token_id", ids[name])
    model.generation_config.do_sample = False
    return model, processor


def load_base(settings: Model, seed: int = 0, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The model and processor that presets `hub` and `parts` start from: hub ids or folders, which `HF_HUB_OFFLINE`
    takes from the cache alone. `seed` draws what `parts` lacks. Raises UserError."""
    if settings.preset == "parts":
        return assemble(str(settings.tower), str(settings.language), seed, dtype=dtype)
    if settings.base is None:
        raise UserError("model.base is empty; preset: hub needs the hub id or folder of a LLaVA-family checkpoint")
    return load_model(fetched(settings.base, "model.base"), dtype=dtype)
