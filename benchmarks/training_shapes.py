"""Shapes of published size with random weights, for speed alone.

`llava-1b`: CLIP ViT-L/14 at 336 px and a language model of Llama 3.2 1B's shape, 1.54 B parameters. `qwen-vl-3b`:
Qwen2.5-VL 3B at 336 px, 144 tokens a picture, 3.75 B parameters. `dry` and `qwen-dry` run the same code in seconds on a
CPU. The tokenizer is the words of the table; the vocabulary has the published size all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch


def _sizes(hidden: int, inner: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, **more}


def _qwen_vision(depth: int, hidden: int, inner: int, heads: int, out: int, **more: Any) -> dict[str, Any]:
    sizes = {"depth": depth, "hidden_size": hidden, "intermediate_size": inner}
    return {**sizes, "num_heads": heads, "out_hidden_size": out, **more}


def _words(vocabulary: int, positions: int, key_value_heads: int, **more: Any) -> dict[str, Any]:
    words = {"vocab_size": vocabulary, "max_position_embeddings": positions}
    return {**words, "num_key_value_heads": key_value_heads, **more}


def _rope(theta: float, *section: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, "mrope_section": [*section]}


SHAPES: dict[str, dict[str, Any]] = {
    "llava-1b": {
        "vision": _sizes(1024, 4096, 24, 16, image_size=336, patch_size=14),
        "text": _sizes(2048, 8192, 16, 32, **_words(128256, 8192, 8, head_dim=64)),
    },
    "dry": {
        "vision": _sizes(64, 128, 3, 4, image_size=56, patch_size=14),
        "text": _sizes(64, 128, 2, 4, **_words(4096, 2048, 2, head_dim=16)),
    },
    "qwen-vl-3b": {
        "side": 336,
        "vision": _qwen_vision(32, 1280, 3420, 16, 2048),
        "text": _sizes(2048, 11008, 36, 16, **_words(151936, 128000, 2, rope_parameters=_rope(1e6, 16, 24, 24))),
    },
    "qwen-dry": {
        "side": 112,
        "vision": _qwen_vision(2, 32, 64, 2, 64, fullatt_block_indexes=[1]),
        "text": _sizes(64, 128, 2, 4, **_words(4096, 2048, 2, rope_parameters=_rope(1e4, 2, 3, 3))),
    },
}
_VISION = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
_VISION |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}


def write_processor(shape: Mapping[str, Any], words: tuple[Iterable[str], Iterable[str]], folder: Path) -> None:
    """Write a processor of that shape for the words of a table (texts, closed answers)."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    from facemllm.model.tiny import CHAT_TEMPLATE, IMAGE, build_tokenizer

    if "side" in shape:
        _qwen_processor(build_tokenizer(*words)).save_pretrained(folder)
        return
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


def _qwen_processor(tokenizer: Any) -> Any:
    from transformers import AddedToken, Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil

    from facemllm.model.families.opening import UnopenedVideos, without_videos
    from facemllm.model.tiny import CHAT_TEMPLATE, IMAGE

    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in _VISION.values()])
    tokenizer.chat_template = CHAT_TEMPLATE.replace(IMAGE, "<|vision_start|><|image_pad|><|vision_end|>")
    videos = UnopenedVideos(video_processor_type="Qwen2VLVideoProcessor", merge_size=2)
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 10**6})
    return without_videos(Qwen2_5_VLProcessor)(
        image_processor=images, tokenizer=tokenizer, video_processor=videos, chat_template=tokenizer.chat_template
    )


def read_processor(folder: Path) -> Any:
    """What `write_processor` wrote."""
    from facemllm.model.families.opening import open_processor

    return open_processor(folder)


def build(shape: Mapping[str, Any], processor: Any, seed: int) -> Any:
    """A model of that shape with random weights, float32; on the GPU where there is one, which is faster."""
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return _qwen(shape, processor) if "side" in shape else _llava(shape, processor)


def _qwen(shape: Mapping[str, Any], processor: Any) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from facemllm.model.families.base import SIDE

    tokenizer = processor.tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _VISION.items()}
    own = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**shape["text"], **own, "vocab_size": max(shape["text"]["vocab_size"], len(tokenizer))}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=shape["vision"], tie_word_embeddings=True, **ids)
    setattr(config, SIDE, shape["side"])
    return Qwen2_5_VLForConditionalGeneration(config)


def _llava(shape: Mapping[str, Any], processor: Any) -> Any:
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
    return LlavaForConditionalGeneration(config)
