"""Models to start from: the embedded `tiny` preset, built from scratch, or a published LLaVA-family checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
)

from facemllm.errors import UserError
from facemllm.model.tokenizer import BOS, CHAT_TEMPLATE, EOS, IMAGE, PAD, build_tokenizer
from facemllm.model.tower import GRID, FaceTowerConfig
from facemllm.settings import Model

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


def load_model(folder: Path | str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a model directory and its processor, from safetensors and local files only.

    Raises UserError in one line when the folder holds no loadable LLaVA-layout model.
    """
    return _load(str(folder), device, dtype, local=True)


def load_base(settings: Model, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load the checkpoint of preset `hub`: a hub id or a folder. Offline (HF_HUB_OFFLINE) it must be cached."""
    if settings.base is None:
        raise UserError("model.base is empty; preset: hub needs the hub id or folder of a LLaVA-family checkpoint")
    local = Path(settings.base).exists() or os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    return _load(settings.base, device, dtype, local=local)


def _load(base: str, device: str, dtype: torch.dtype, *, local: bool) -> tuple[Any, Any]:
    folder = Path(base)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        why = "its weights are pickled; only safetensors are loaded" if pickled else "it holds no *.safetensors file"
        raise UserError(f"cannot load the model {base}: {why}")
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(
            base, dtype=dtype, use_safetensors=True, local_files_only=local, trust_remote_code=False
        )
        processor = AutoProcessor.from_pretrained(base, local_files_only=local, trust_remote_code=False)
    except Exception as error:  # transformers raises a dozen kinds, from OSError to safetensors' own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"cannot load the model {base}: {reason}") from error
    inner = getattr(model, "model", None)
    missing = [n for n in ("vision_tower", "multi_modal_projector", "language_model") if not hasattr(inner, n)]
    if missing or getattr(processor, "image_processor", None) is None:
        kind = type(model).__name__
        raise UserError(f"cannot use {base}: {kind} has no LLaVA layout (missing {', '.join(missing) or 'processor'})")
    model.to(device)
    return model, processor
