"""Shapes of published size with random weights, for speed alone.

`llava-1b`: CLIP ViT-L/14 at 336 px and a language model of Llama 3.2 1B's shape, 1.54 B parameters. `dry` runs the same
code in seconds on a CPU. The tokenizer is the words of the table; the vocabulary has the published size all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

SHAPES: dict[str, dict[str, Any]] = {
    "llava-1b": {
        "vision": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
        "text": {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
        },
    },
    "dry": {
        "vision": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
        },
        "text": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 4096,
            "max_position_embeddings": 2048,
        },
    },
}


def write_processor(shape: Mapping[str, Any], words: tuple[Iterable[str], Iterable[str]], folder: Path) -> None:
    """Write a LLaVA processor of that shape for the words of a table (texts, closed answers)."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    from facemllm.model.tiny import CHAT_TEMPLATE, IMAGE, build_tokenizer

    side = shape["vision"]["image_size"]
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(*words),
        patch_size=shape["vision"]["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def read_processor(folder: Path) -> Any:
    """What `write_processor` wrote."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder, local_files_only=True)


def build(shape: Mapping[str, Any], processor: Any, seed: int) -> Any:
    """A LLaVA model of that shape with random weights, float32; on the GPU where there is one, which is faster."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from facemllm.model.tiny import EOS, IMAGE, PAD

    vocabulary = processor.tokenizer.get_vocab()
    text = {**shape["text"], "vocab_size": max(shape["text"]["vocab_size"], len(processor.tokenizer))}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape["vision"]),
        text_config=LlamaConfig(
            **text, pad_token_id=vocabulary[PAD], eos_token_id=vocabulary[EOS], tie_word_embeddings=True
        ),
        image_token_index=vocabulary[IMAGE],
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return LlavaForConditionalGeneration(config)
