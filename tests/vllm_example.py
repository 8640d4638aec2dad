"""Models small enough to be served by vLLM in a test: a LLaVA of a CLIP tower and a Llama, the tiny preset, others."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from facemllm import settings
from facemllm.model.forward import tower_features
from facemllm.model.inference import Predictor, Query
from facemllm.model.parts import assemble
from facemllm.model.pretrained import load_model, save_model
from facemllm.model.tiny import build_tiny
from tests.families import SIDES, small
from tests.training_example import spread

TEXTS = ["Is there a beard?", "What is the hair style?", "Describe this face.", "A woman with a hat, about 35 years."]
ANSWERS = ["short hair", "brown hair", "yes", "no"]
CLOSED = (
    Query("Is there a beard?", ("yes", "no")),
    Query("What is the hair style?", ("short hair", "brown hair", "a woman with glasses", "an unheard-of mohawk")),
    Query("How old is this person?", ("about 35 years old", "a baby", "old")),
)
OPEN = (
    (("user", "Describe this face."),),
    (("user", "Is there a beard?"), ("assistant", "yes"), ("user", "What is the hair style of this zebra?")),
)

_LAST = {"qwen2_5_vl": "model.visual.merger.mlp.2", "qwen3_vl": "model.visual.merger.linear_fc2"}
_LAST["internvl"] = "model.multi_modal_projector.linear_2"  # the projector's last layer


def looking(model: Any, processor: Any, pictures: Sequence[Any]) -> Predictor:
    """A random model of the tiny preset whose texts depend on the face: its tower keeps `pictures` apart, and its
    projector what does."""
    for module in spread(model).modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.zero_()  # type: ignore[union-attr]
            module.running_var.fill_(0.1)  # type: ignore[union-attr]
    last = model.model.multi_modal_projector.linear_2
    predictor = Predictor(model, processor, batch_images=4)
    with torch.no_grad():
        values_BCSS = predictor._inputs(pictures)["pixel_values"]
        tokens_BND = model.model.multi_modal_projector(tower_features(model, values_BCSS))
        scale = 1 / (tokens_BND - tokens_BND.mean(0)).std()
        last.bias.sub_(tokens_BND.mean((0, 1))).mul_(scale)
        last.weight.mul_(scale)
    return predictor


def tiny(folder: Path) -> Path:
    """The product's tiny preset with random weights, whose answers depend on the picture."""
    model, processor = build_tiny(settings.load().model, TEXTS, ANSWERS, seed=3)
    looking(model, processor, [face(number) for number in range(8)])
    save_model(model, processor, folder)
    return folder


def clip(folder: Path, kind: str = "clip") -> Path:
    """A LLaVA of a CLIP or SigLIP tower, with heads as wide as vLLM's CPU kernels take them (32)."""
    torch.manual_seed(1)
    parts = folder.with_name(f"{folder.name}-parts")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([*TEXTS, *ANSWERS], trainer)
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.save_pretrained(parts / "language")
    text = hf.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    hf.LlamaForCausalLM(text).save_pretrained(parts / "language")
    size: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    size |= {"num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    if kind == "clip":
        hf.CLIPVisionModel(hf.CLIPVisionConfig(**size)).save_pretrained(parts / "tower")
        square = {"height": 64, "width": 64}
        hf.CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=square).save_pretrained(parts / "tower")
    else:
        hf.SiglipVisionModel(hf.SiglipVisionConfig(**size)).save_pretrained(parts / "tower")
        hf.SiglipImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(parts / "tower")
    model, processor = assemble(str(parts / "tower"), str(parts / "language"), seed=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(3 if "vision" not in name else 2)
    save_model(model, processor, folder)
    return folder


def of_family(folder: Path, family: str) -> Path:
    """A model of another family, with heads as wide as vLLM's CPU kernels take them (32), that writes readable words
    about what it sees, and repeats itself unwillingly, as published Qwen-VL do."""
    sizes = {"width": 64, "tower": 64} if family == "internvl" else {"width": 64}
    base = small(family, folder.with_name(f"{folder.name}-base"), **sizes)
    model, processor = load_model(base, image_size=SIDES[family])
    words = processor.tokenizer
    with torch.no_grad():
        model.get_submodule(_LAST[family]).weight.mul_(4)
        model.lm_head.weight[[one for one in range(len(words)) if "\ufffd" in words.decode([one])]] = 0
    model.generation_config.repetition_penalty = 1.05
    save_model(model, processor, folder)
    return folder


def face(number: int, side: int = 80) -> NDArray[np.uint8]:
    """A picture of a few large patches of noise, unlike any other."""
    coarse_HWC = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return coarse_HWC.repeat(side // 4, 0).repeat(side // 4, 1)
