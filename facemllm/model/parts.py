"""Models to start from: a published image-text model, or one of published parts: any vision tower and any
Llama-shaped language model of transformers.

The projector of such a model is new. Its tokenizer gains what it lacks: the image token, a padding and an end token,
and a chat template that puts the image before the text.
"""

from __future__ import annotations

from math import isqrt
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from facemllm.core.files import fetched
from facemllm.errors import UserError, one_line, refusing
from facemllm.model.pretrained import load_model, load_part, read_config
from facemllm.settings import Model

IMAGE, PAD, EOS = "<image>", "<pad>", "</s>"

_FLATTENED = (
    "{%- set flat = namespace(messages=[]) -%}{%- for message in messages -%}{%- set text = namespace(of='') -%}"
    "{%- if message['content'] is string -%}{%- set text.of = message['content'] -%}{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{%- set text.of = text.of + '<image>\\n' -%}"
    "{%- endfor -%}{%- for part in message['content'] if part['type'] == 'text' -%}"
    "{%- set text.of = text.of + part['text'] -%}{%- endfor -%}{%- endif -%}"
    "{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': text.of}] -%}{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)
"""Stands before a template of plain text and hands it the messages with every image as a token before its text."""

_PLAIN = (  # Vicuna's, as LLaVA-1.5 has it
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {{ message['content'] }} "
    "{% else %}ASSISTANT: {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def load_base(settings: Model, seed: int = 0) -> tuple[Any, Any]:
    """The model and processor that presets `hub` and `parts` start from: hub ids or folders, which `HF_HUB_OFFLINE`
    takes from the cache alone. `seed` draws what `parts` lacks. Raises UserError."""
    if settings.preset == "parts":
        return assemble(str(settings.tower), str(settings.language), seed)
    if settings.base is None:
        raise UserError("model.base is empty; preset: hub needs the hub id or folder of an image-text model")
    return load_model(fetched(settings.base, "model.base"), image_size=settings.image_size)


def assemble(tower: str, language: str, seed: int) -> tuple[Any, Any]:
    """Tower and language model, each a hub id or a folder, as LlavaForConditionalGeneration and LlavaProcessor. The
    projector's weights and new rows of the embeddings are drawn from `seed`. Towers of patch size p give a token a
    patch; a class token is dropped, and the layer before the last read, as LLaVA-1.5 does. Raises UserError."""
    tower_folder, language_folder = fetched(tower, "model.tower"), fetched(language, "model.language")
    eyes = _tower(tower_folder)
    images = _opened(AutoImageProcessor, tower_folder, "processor of images (preprocessor_config.json)")
    tokenizer = _tokenizer(language_folder)
    speaker = load_part(AutoModelForCausalLM, language_folder, read_config(language_folder))
    if not hasattr(speaker.base_model, "embed_tokens"):
        raise UserError(f"cannot use {language}: {type(speaker).__name__} has no Llama-shaped decoder")
    size = images.crop_size or images.size
    side = size.height
    if not side or side != size.width:
        raise UserError(f"cannot use {tower}: its image processor has no fixed square size")
    tokens, layers = _shape(eyes, side, tower)
    grid = isqrt(tokens)
    has_class = tokens == grid * grid + 1 and getattr(eyes.config, "patch_size", None) is not None
    probe = torch.tensor([tokenizer("is there a face?")["input_ids"]])
    with torch.no_grad():
        expected = speaker(input_ids=probe).logits
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if len(tokenizer) > speaker.get_input_embeddings().num_embeddings:
            speaker.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        config = LlavaConfig(
            vision_config=eyes.config,
            text_config=speaker.config,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
            image_seq_length=tokens - has_class,
            vision_feature_select_strategy="default" if has_class else "full",
            vision_feature_layer=-2 if has_class and layers > 1 else -1,
            tie_word_embeddings=speaker.config.tie_word_embeddings,
        )
        model = _joined(config, eyes, speaker)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    with torch.no_grad():
        found = model(input_ids=probe).logits[..., : expected.shape[-1]]
    if getattr(model.lm_head, "bias", None) is not None or not torch.allclose(found, expected, atol=1e-4, rtol=1e-3):
        raise UserError(
            f"cannot use {language}: {type(speaker).__name__} changes its logits in a way that LLaVA's layout has not"
        )
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=side // grid,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=tokens - grid * grid,
        image_token=IMAGE,
        chat_template=_FLATTENED + (tokenizer.chat_template or _PLAIN),
    )
    return model, processor


def _joined(config: LlavaConfig, eyes: Any, speaker: Any) -> Any:
    """The parts themselves, not copies, around a projector drawn by its fan-in."""
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    projector = model.model.multi_modal_projector.to_empty(device="cpu")
    for linear in (projector.linear_1, projector.linear_2):
        linear.reset_parameters()
    model.model.vision_tower, model.model.language_model = eyes, speaker.base_model
    model.lm_head = speaker.get_output_embeddings()
    model.generation_config = speaker.generation_config
    return model.eval()


def _tower(folder: Path) -> Any:
    """The tower of a folder that holds one, alone or beside a text encoder (CLIP, SigLIP)."""
    config = read_config(folder)
    config = getattr(config, "vision_config", config)
    tower = load_part(AutoModel, folder, config, beside=True)
    if tower.main_input_name != "pixel_values" or not isinstance(getattr(config, "hidden_size", None), int):
        raise UserError(f"cannot use {folder}: {config.model_type} is no vision tower with tokens of one hidden_size")
    return tower


def _opened(kind: Any, folder: Path, what: str) -> Any:
    with refusing(f"cannot use {folder}: it has no {what}"):
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _tokenizer(folder: Path) -> Any:
    tokenizer = _opened(AutoTokenizer, folder, "tokenizer that can be read")
    lacking = {"pad_token": PAD, "eos_token": EOS}
    tokenizer.add_special_tokens({name: token for name, token in lacking.items() if getattr(tokenizer, name) is None})
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    tokenizer.padding_side = "left"
    return tokenizer


def _shape(tower: Any, side: int, name: str) -> tuple[int, int]:
    """Tokens that a tower makes of an image of `side` pixels, and how many layers can be read."""
    try:
        with torch.device("meta"):  # shapes alone
            shadow = AutoModel.from_config(AutoConfig.for_model(**tower.config.to_dict()))
            outputs = shadow(torch.zeros(1, 3, side, side), output_hidden_states=True, return_dict=True)
        _, tokens, width = outputs.hidden_states[-1].shape
    except Exception as error:
        raise UserError(
            f"cannot use {name}: it makes no tokens of an image of {side} pixels: {one_line(error, 200)}"
        ) from error
    if width != tower.config.hidden_size:
        raise UserError(f"cannot use {name}: its tokens are {width} wide, its hidden_size {tower.config.hidden_size}")
    return tokens, len(outputs.hidden_states)
