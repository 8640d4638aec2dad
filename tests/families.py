"""Small models of every family, as a user has them: `small("qwen2_5_vl", folder)` writes config.json, safetensors,
processor files and a chat template. Two layers, random weights, a tokenizer trained on a few sentences.

`SIDES[family]` is the `model.image_size` to use; `missing(family)` names a package that the family's processor needs
and that is not installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from facemllm.model.families.opening import UnopenedVideos, without_videos

TEXT = ["Is there a beard? yes, no", "What is the hair color? brown, black, grey", "Assistant: user: How old is she?"]
HIDDEN = 32
LANGUAGE: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2}
LANGUAGE |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024}
TOWER: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}

_CONTENT = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
)
_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}" + _CONTENT + "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_QWEN = "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}" + _CHATML
_SMOLVLM = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    + _CONTENT
    + "<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + "
    "'\n' }}" + _CONTENT + "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_VICUNA = (
    "{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}"
    + _CONTENT
    + "{{ ' ' if m['role'] == 'user' else eos_token }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
PALIGEMMA = (
    "{% for m in messages %}" + _CONTENT + "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def tokenizer(special: list[str], *, eos: str, bos: str | None = None, template: str, **roles: str) -> Any:
    """A byte-level tokenizer with special tokens, some of which have `roles` by which processors ask for them."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    core.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in ["<pad>", *special]])
    named = {"extra_special_tokens": roles} if roles else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, bos_token=bos, pad_token="<pad>", chat_template=template, **named
    )


def _ids(words: Any, **names: str) -> dict[str, int]:
    return {name: words.convert_tokens_to_ids(token) for name, token in names.items()}


def _videos(processor_type: str, **settings: Any) -> Any:
    return UnopenedVideos(video_processor_type=processor_type, **settings)


def _llava(next_: bool) -> tuple[Any, Any]:
    words = tokenizer(["<s>", "</s>", "<image>"], eos="</s>", template=_VICUNA.replace("IMAGE", "<image>\n"))
    vision = hf.CLIPVisionConfig(image_size=32, patch_size=8, **TOWER)
    text = hf.LlamaConfig(vocab_size=len(words), **LANGUAGE)
    more: dict[str, Any] = {"image_token_index": words.convert_tokens_to_ids("<image>")}
    square = {"height": 32, "width": 32}
    shape = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if not next_:
        images: Any = hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square)
        processor: Any = hf.LlavaProcessor(image_processor=images, tokenizer=words, image_token="<image>", **shape)
        config: Any = hf.LlavaConfig(vision_config=vision, text_config=text, **more)
        return hf.LlavaForConditionalGeneration(config), processor
    points = [[32, 64], [64, 32], [64, 64]]
    images = hf.LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size=square, image_grid_pinpoints=points)
    processor = hf.LlavaNextProcessor(image_processor=images, tokenizer=words, **shape)
    config = hf.LlavaNextConfig(vision_config=vision, text_config=text, image_grid_pinpoints=points, **more)
    return hf.LlavaNextForConditionalGeneration(config), processor


def _llava_onevision() -> tuple[Any, Any]:
    template = _CHATML.replace("IMAGE", "<image>\n")
    words = tokenizer(["<|im_start|>", "<|im_end|>", "<image>", "<video>"], eos="<|im_end|>", template=template)
    vision = hf.SiglipVisionConfig(image_size=32, patch_size=8, vision_use_head=False, **TOWER)
    text = hf.Qwen2Config(vocab_size=len(words) + 5, **LANGUAGE)
    points = [[32, 32], [32, 64], [64, 32], [64, 64]]
    ids = _ids(words, image_token_index="<image>", video_token_index="<video>")
    images = hf.LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, image_grid_pinpoints=points)
    processor = without_videos(hf.LlavaOnevisionProcessor)(
        image_processor=images,
        tokenizer=words,
        video_processor=_videos("LlavaOnevisionVideoProcessor"),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )
    config = hf.LlavaOnevisionConfig(vision_config=vision, text_config=text, image_grid_pinpoints=points, **ids)
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


_QWEN_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def _qwen(generation: str, width: int = HIDDEN) -> tuple[Any, Any]:
    template = _QWEN.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    words = tokenizer(_QWEN_TOKENS, eos="<|im_end|>", template=template)
    patch = 14 if generation == "2_5" else 16
    images = hf.Qwen2VLImageProcessorPil(patch_size=patch, size={"shortest_edge": 56 * 56, "longest_edge": 10**6})
    ids = _ids(words, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>")
    ids |= _ids(words, vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>")
    head = width // LANGUAGE["num_attention_heads"]
    text: dict[str, Any] = LANGUAGE | {"vocab_size": len(words) + 5, "hidden_size": width}
    vision: dict[str, Any] = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    vision |= {"patch_size": patch, "out_hidden_size": width}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [head // 8, head * 3 // 16, head * 3 // 16]}
    if generation == "2_5":
        config: Any = hf.Qwen2_5_VLConfig(
            text_config=text | {"rope_parameters": rope},
            vision_config=vision | {"window_size": 56, "fullatt_block_indexes": [1]},
            **ids,
        )
        model: Any = hf.Qwen2_5_VLForConditionalGeneration(config)
        return model, _qwen_processor(hf.Qwen2_5_VLProcessor, images, words, "Qwen2VLVideoProcessor")
    vision["num_position_embeddings"] = 64
    rope["mrope_interleaved"] = True
    if generation == "3":
        text |= {"head_dim": head, "rope_parameters": rope}
        config = hf.Qwen3VLConfig(text_config=text, vision_config=vision | {"deepstack_visual_indexes": [0, 1]}, **ids)
        model = hf.Qwen3VLForConditionalGeneration(config)
    else:
        text |= {"head_dim": 32, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
        text |= {"linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]}
        text["rope_parameters"] = rope | {"partial_rotary_factor": 0.5}
        config = hf.Qwen3_5Config(text_config=text, vision_config=vision, **ids)
        model = hf.Qwen3_5ForConditionalGeneration(config)
    return model, _qwen_processor(hf.Qwen3VLProcessor, images, words, "Qwen3VLVideoProcessor")


def _qwen_processor(kind: Any, images: Any, words: Any, videos: str) -> Any:
    parts = {"image_processor": images, "tokenizer": words, "video_processor": _videos(videos, merge_size=2)}
    return without_videos(kind)(**parts, chat_template=words.chat_template)


def _idefics(smol: bool) -> tuple[Any, Any]:
    special = ["<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>", "<image>"]
    special += [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    words = tokenizer(special, eos="<end_of_utterance>", template=_SMOLVLM.replace("IMAGE", "<image>"))
    sizes = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}, "do_image_splitting": True}
    prefix = "SmolVLM" if smol else "Idefics3"
    images = getattr(hf, f"{prefix}ImageProcessorPil")(**sizes)
    parts: dict[str, Any] = {"image_processor": images, "tokenizer": words, "image_seq_len": 4}
    if smol:
        parts["video_processor"] = _videos("SmolVLMVideoProcessor", num_frames=8, fps=1)
    processor = without_videos(getattr(hf, f"{prefix}Processor"))(**parts, chat_template=words.chat_template)
    vision = TOWER | {"image_size": 32, "patch_size": 8}
    text = hf.LlamaConfig(vocab_size=len(words) + 5, pad_token_id=words.pad_token_id, **LANGUAGE)
    config = getattr(hf, f"{prefix}Config")(
        vision_config=vision, text_config=text, scale_factor=2, image_token_id=words.convert_tokens_to_ids("<image>")
    )
    return getattr(hf, f"{prefix}ForConditionalGeneration")(config), processor


def _internvl(width: int = HIDDEN, tower: int = TOWER["hidden_size"]) -> tuple[Any, Any]:
    roles = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    roles["video_token"] = "<video>"
    special = ["<|im_start|>", "<|im_end|>", *roles.values()]
    words = tokenizer(special, eos="<|im_end|>", template=_CHATML.replace("IMAGE", "<IMG_CONTEXT>\n"), **roles)
    images = hf.GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=4)
    videos = _videos("InternVLVideoProcessor")
    parts = {"image_processor": images, "tokenizer": words, "video_processor": videos, "image_seq_length": 4}
    processor = without_videos(hf.InternVLProcessor)(**parts, chat_template=words.chat_template)
    vision = hf.InternVLVisionConfig(image_size=[32, 32], patch_size=[8, 8], **TOWER | {"hidden_size": tower})
    text = hf.Qwen2Config(vocab_size=len(words) + 5, **LANGUAGE | {"hidden_size": width})
    context = words.convert_tokens_to_ids("<IMG_CONTEXT>")
    config = hf.InternVLConfig(vision_config=vision, text_config=text, image_token_id=context, image_seq_length=4)
    return hf.InternVLForConditionalGeneration(config), processor


_GEMMA_TEXT = {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24}


def _gemma3() -> tuple[Any, Any]:
    roles = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    special = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", *roles.values()]
    template = _GEMMA.replace("IMAGE", "<start_of_image>")
    words = tokenizer(special, eos="<eos>", bos="<bos>", template=template, **roles)
    images = hf.Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    processor = hf.Gemma3Processor(images, words, image_seq_length=4, chat_template=template)
    ids = _ids(words, pad_token_id="<pad>", eos_token_id="<eos>", bos_token_id="<bos>")
    text = LANGUAGE | _GEMMA_TEXT | {"vocab_size": len(words), "query_pre_attn_scalar": 16} | ids
    more = _ids(words, boi_token_index="<start_of_image>", eoi_token_index="<end_of_image>")
    more |= _ids(words, image_token_index="<image_soft_token>")
    vision = TOWER | {"image_size": 32, "patch_size": 8, "vision_use_head": False, "model_type": "siglip_vision_model"}
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **more)
    return hf.Gemma3ForConditionalGeneration(config), processor


def _gemma4(large: bool) -> tuple[Any, Any]:
    roles = {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>"}
    roles |= {"boa_token": "<|audio>", "eoa_token": "<audio|>", "audio_token": "<|audio|>"}
    special = ["<bos>", "<eos>", "<|turn>", "<turn|>", "<|video|>", *roles.values()]
    template = _GEMMA.replace("IMAGE", "\n\n<|image|>\n\n").replace("<start_of_turn>", "<|turn>")
    template = template.replace("<end_of_turn>", "<turn|>")
    words = tokenizer(special, eos="<eos>", bos="<bos>", template=template, **roles)
    images = hf.Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70)
    parts: dict[str, Any] = {"image_processor": images, "tokenizer": words}
    parts |= {"video_processor": _videos("Gemma4VideoProcessor"), "feature_extractor": hf.Gemma4AudioFeatureExtractor()}
    processor = without_videos(hf.Gemma4Processor)(**parts, chat_template=template)
    ids = _ids(words, pad_token_id="<pad>", eos_token_id="<eos>", bos_token_id="<bos>")
    text = LANGUAGE | _GEMMA_TEXT | {"vocab_size": len(words), "final_logit_softcapping": 3.0} | ids
    text |= {"global_head_dim": 16, "vocab_size_per_layer_input": len(words)}
    text |= (
        {"use_bidirectional_attention": "vision", "hidden_size_per_layer_input": 0}
        if large
        else {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
    )
    more = _ids(words, boi_token_id="<|image>", eoi_token_id="<image|>", image_token_id="<|image|>")
    more |= _ids(words, video_token_id="<|video|>", audio_token_id="<|audio|>")
    vision = TOWER | {"patch_size": 4, "num_key_value_heads": 2, "head_dim": 12, "position_embedding_size": 128}
    config = hf.Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **more)
    return hf.Gemma4ForConditionalGeneration(config), processor


def _paligemma() -> tuple[Any, Any]:
    words = tokenizer(
        ["<bos>", "<eos>", "<image>"],
        eos="<eos>",
        bos="<bos>",
        template=PALIGEMMA.replace("IMAGE", "<image>"),
        image_token="<image>",
    )
    images = hf.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    processor = hf.PaliGemmaProcessor(images, words, chat_template=words.chat_template)
    ids = _ids(words, pad_token_id="<pad>", eos_token_id="<eos>", bos_token_id="<bos>")
    text = LANGUAGE | _GEMMA_TEXT | {"vocab_size": len(words), "query_pre_attn_scalar": 16, "model_type": "gemma2"}
    text |= {"final_logit_softcapping": 3.0} | ids
    vision = TOWER | {"image_size": 32, "patch_size": 8, "vision_use_head": False, "model_type": "siglip_vision_model"}
    vision["projection_dim"] = HIDDEN
    config = hf.PaliGemmaConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=HIDDEN,
        hidden_size=HIDDEN,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    return hf.PaliGemmaForConditionalGeneration(config), processor


_BUILDERS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "llava": lambda: _llava(next_=False),
    "llava_next": lambda: _llava(next_=True),
    "llava_onevision": _llava_onevision,
    "qwen2_5_vl": partial(_qwen, "2_5"),
    "qwen3_vl": partial(_qwen, "3"),
    "qwen3_5": partial(_qwen, "3_5"),
    "idefics3": lambda: _idefics(smol=False),
    "smolvlm": lambda: _idefics(smol=True),
    "internvl": _internvl,
    "gemma3": _gemma3,
    "gemma4": lambda: _gemma4(large=True),
    "gemma4_small": lambda: _gemma4(large=False),
    "paligemma": _paligemma,
}
FAMILIES = tuple(_BUILDERS)
SIDES = dict.fromkeys(FAMILIES, 32) | {"llava_next": 48, "llava_onevision": 48, "qwen2_5_vl": 112}
SIDES |= {"qwen3_vl": 96, "qwen3_5": 96, "gemma4": 96, "gemma4_small": 96}
_NEEDS = {"smolvlm": "num2words"}


def missing(family: str) -> str | None:
    """A package that the family's processor needs and that is not there."""
    needed = _NEEDS.get(family)
    return needed if needed and importlib.util.find_spec(needed) is None else None


def build(family: str, seed: int = 0, **sizes: int) -> tuple[Any, Any]:
    """(model, processor), not written; Qwen-VL and InternVL may have another `width`. Weights are larger than
    transformers draws them, so that pictures matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = _BUILDERS[family](**sizes)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if not weight.any():  # projections that training starts from nothing
                    weight.normal_(std=0.3)
                elif weight.ndim > 1 and "embed_tokens" not in name and "lm_head" not in name:
                    weight.mul_(4.0)
    words = processor.tokenizer
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = words.pad_token_id, words.eos_token_id
    return model.eval(), processor


def small(family: str, folder: Path, seed: int = 0, **sizes: int) -> Path:
    """Write a small model of the family to a folder, which is returned."""
    model, processor = build(family, seed, **sizes)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


FEW = ("llava", "qwen2_5_vl", "gemma3")


def all_families() -> Any:
    """Parametrises a test by `name`: a few families always, all of them under `make test-families`."""

    def one(name: str) -> Any:
        marks = [] if name in FEW else [pytest.mark.families]
        if package := missing(name):
            marks.append(pytest.mark.skip(reason=f"its processor needs {package}"))
        return pytest.param(name, marks=marks, id=name)

    return pytest.mark.parametrize("name", [one(name) for name in FAMILIES])
