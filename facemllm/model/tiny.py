"""The embedded `tiny` preset, built from scratch: a residual convolutional tower, a word tokenizer, and Qwen2.

Tower: 96 px, each picture standardised -> 3x3 grid of 256 channels -> 10 tokens: the global mean, then the grid in
reading order, each through one LayerNorm. A plain patch ViT of the same size learns nothing from a few thousand faces
in minutes; this does (docs/training.md). It stands in LLaVA's layout with `vision_feature_select_strategy="full"`.

Tokenizer, from the training split's text: every closed answer ("turned 25 degrees left", "brown hair") is one token, so
that an option is scored in one position; a word of several texts is one token too. Any other word is spelled in pieces
that words of the text share (`pieces`; `##` marks a continuation), at worst in characters, so there is never an unknown
token. Text is lower-cased and reduced to printable ASCII.

Shapes: B batch, C channels, S image side in pixels, G grid side, D width of a token, N = 10 tokens.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

from facemllm.model import pieces
from facemllm.model.branches import pooled
from facemllm.settings import Model

GRID = 3
TOKENS = GRID * GRID + 1
WIDTH, LAYERS, HEADS, FEED_FORWARD, CONTEXT = 192, 3, 3, 512, 1024

PAD, BOS, EOS, IMAGE, USER, ASSISTANT = "<pad>", "<s>", "</s>", "<image>", "<|user|>", "<|assistant|>"
SPECIAL = (PAD, BOS, EOS, IMAGE, USER, ASSISTANT)
_CHARACTERS = [chr(code) for code in range(0x21, 0x7F) if not chr(code).isupper()]
_FLATTEST = 1e-2  # standard deviation of a picture of one colour, on the scale -1..1
_FEWEST = 3  # distinct texts that a word needs to be a token
_PIECE = r"[a-z0-9'\-]{1,32}|[^\s]"  # a bounded word or one sign: spelling stays linear in the text's length

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is not string %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}{% endif %}"
    "{{ '<|user|>' if message['role'] == 'user' else '<|assistant|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class FaceTowerConfig(PretrainedConfig):
    """Widths of the stem and of the four residual stages; the last width is the width of a token. `standardize` takes
    every picture's own mean and spread off it (`standardized`)."""

    model_type = "face_tower"

    def __init__(
        self,
        image_size: int = 96,
        stem: int = 32,
        widths: list[int] | None = None,
        strides: list[int] | None = None,
        standardize: bool = False,
        **kwargs: Any,
    ) -> None:
        self.image_size = image_size
        self.stem = stem
        self.widths = widths or [48, 96, 160, 256]
        self.strides = strides or [2, 2, 2, 2]
        self.standardize = standardize
        self.hidden_size = self.widths[-1]
        kwargs.pop("hidden_size", None)
        super().__init__(**kwargs)


def standardized(pixels_BCSS: Tensor) -> Tensor:
    """Each picture with mean 0 and standard deviation 1 over all its values, so that how bright or flat it is does not
    matter: a dimmed picture is the same picture."""
    # half the time of torch.std_mean on a core: 8 ms for 17, of 64 pictures
    centred_BCSS = pixels_BCSS - pixels_BCSS.mean((1, 2, 3), keepdim=True)
    spread_B111 = centred_BCSS.square().mean((1, 2, 3), keepdim=True).sqrt()
    return centred_BCSS / spread_B111.clamp(min=_FLATTEST)


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut, after He et al. 2016; strided shortcuts average before they project."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _conv_norm(inputs, outputs, 3, stride)
        self.second = _conv_norm(outputs, outputs, 3, 1)
        pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.shortcut = nn.Sequential(pool, _conv_norm(inputs, outputs, 1, 1))

    def forward(self, x_BCSS: Tensor) -> Tensor:
        """(B, inputs, S, S) -> (B, outputs, S / stride, S / stride)."""
        return F.relu(self.second(F.relu(self.first(x_BCSS))) + self.shortcut(x_BCSS))


class FaceTower(PreTrainedModel):
    """Image (B, 3, S, S), values in [-1, 1] -> ten tokens (B, 10, 256)."""

    config_class = FaceTowerConfig
    base_model_prefix = "face_tower"
    main_input_name = "pixel_values"
    input_modalities = "image"
    _no_split_modules = ["ResidualBlock"]

    def __init__(self, config: FaceTowerConfig) -> None:
        super().__init__(config)
        self.stem = _conv_norm(3, config.stem, 3, 2)
        inputs = [config.stem, *config.widths[:-1]]
        self.stages = nn.Sequential(
            *(ResidualBlock(i, o, s) for i, o, s in zip(inputs, config.widths, config.strides, strict=True))
        )
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # through transformers' `init`, which leaves alone what a checkpoint filled: loading a model calls this too
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)
        else:
            super()._init_weights(module)

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, return_dict: bool | None = None, **_: Any
    ) -> BaseModelOutputWithPooling:
        """Encode normalised pixels; `hidden_states` holds the one layer that LLaVA selects."""
        if self.config.standardize:
            pixel_values = standardized(pixel_values)
        x_BCSS = pixel_values.contiguous(memory_format=torch.channels_last)
        tokens_BND = self.norm(pooled(self.stages(F.relu(self.stem(x_BCSS))), TOKENS))
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens_BND, pooler_output=tokens_BND[:, 0], hidden_states=(tokens_BND,)
        )


@torch.no_grad()
def _pass_on(attention: Any) -> None:
    """Let attention start as a mean of what it attends to, so that questions read the image from their first step.
    Measured after 450 steps of `instruct`: age 10.3 -> 8.9 years, hair style .863 -> .886 (one seed)."""
    attention.v_proj.weight += torch.eye(WIDTH)
    attention.o_proj.weight += 0.5 * torch.eye(WIDTH)


def build_tokenizer(texts: Iterable[str], answers: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer for the words of `texts`, whole or in pieces, with each of `answers` as one token. Its bytes depend
    on the sets alone."""
    steps = [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    replaced = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Replace(Regex(r"[^\x20-\x7e]"), "?")]
    normalizer = normalizers.Sequence([*steps, *replaced])
    counts: Counter[str] = Counter()
    for text in set(texts):
        counts.update(set(re.findall(_PIECE, normalizer.normalize_str(text))))
    words = {word for word, count in counts.items() if count >= _FEWEST}
    phrases: set[str] = set()
    for answer in answers:
        phrase = normalizer.normalize_str(answer).strip()
        words.update(re.findall(_PIECE, phrase))
        if phrase and not re.fullmatch(_PIECE, phrase):
            phrases.add(phrase)
    spelled = [*SPECIAL, *_CHARACTERS, *(f"{pieces.CONTINUES}{character}" for character in _CHARACTERS)]
    words.update(pieces.learn((word for word in counts if word.isalpha()), _CHARACTERS))
    vocabulary = {token: index for index, token in enumerate([*spelled, *sorted(words - set(spelled))])}
    # no unknown token can arise: every character left by the normalizer is in the vocabulary
    core = Tokenizer(models.WordPiece(vocabulary, unk_token=PAD, continuing_subword_prefix=pieces.CONTINUES))
    core.normalizer = normalizer
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(_PIECE), behavior="isolated")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix=pieces.CONTINUES, cleanup=True),
            *(decoders.Replace(f" {sign}", sign) for sign in (";", ":", ")", "%")),
        ]
    )
    core.add_tokens([AddedToken(p, single_word=True, normalized=True, special=False) for p in sorted(phrases)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[IMAGE, USER, ASSISTANT],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_tiny(settings: Model, texts: Iterable[str], answers: Iterable[str], seed: int) -> tuple[Any, Any]:
    """The 3 M parameter preset with random weights: residual tower, two-layer projector, Qwen2 of three layers. `texts`
    is the training split's text, `answers` its closed answers; the same sets and seed give the same bytes. Returns
    (LlavaForConditionalGeneration, LlavaProcessor)."""
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
    ids: dict[str, Any] = {f"{name}_token_id": vocabulary[t] for name, t in (("pad", PAD), ("bos", BOS), ("eos", EOS))}
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        **ids,
    )
    config = LlavaConfig(
        vision_config=FaceTowerConfig(image_size=side, standardize=True),
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
        for layer in model.model.language_model.layers:
            _pass_on(layer.self_attn)
    model.generation_config.update(**ids, do_sample=False)
    return model, processor
