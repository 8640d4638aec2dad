"""Writing a model directory, whole or not at all: safetensors, processor, chat template, and a stage's peft adapter.

An adapter is what a stage changed: low-rank weights of the language model, and whole every other module it trained. It
lies in `adapter/` beside the merged model and goes on top of the model that the stage started from, by
`PeftModel.from_pretrained(base, folder)`; the two then answer alike.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from facemllm.core.files import partial_folder, publish
from facemllm.settings.train import Trainable

FOLDER = "adapter"

_PREFIX, _LOW_RANK = "base_model.model.", ".lora_A.weight"
_MODULES = {
    "tower": ("model.vision_tower",),
    "projector": ("model.multi_modal_projector",),
    "segmentation": ("model.segmentation",),
    "knowledge": ("model.knowledge",),
    "embeddings": ("model.language_model.embed_tokens", "lm_head"),
}


@dataclass(frozen=True)
class Adapter:
    """peft's configuration and tensors, apart from the model they were taken from."""

    config: Any
    tensors: dict[str, Tensor]


def adapter_of(wrapper: Any, trains: Trainable) -> Adapter:
    """The adapter of a trained peft model, to be taken before its weights are merged.

    Modules outside the language model that the stage `trains` are kept whole, buffers included.
    """
    from peft import get_peft_model_state_dict

    model = wrapper.get_base_model()
    modules = dict(model.named_modules())
    chosen = [name for module, names in _MODULES.items() if getattr(trains, module) == "full" for name in names]
    whole = [name for name in chosen if name in modules]
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tensors = dict(get_peft_model_state_dict(wrapper, save_embedding_layers=False))
    for name in whole:
        tensors |= {f"{_PREFIX}{name}.{part}": value for part, value in modules[name].state_dict().items()}
    config = wrapper.peft_config[wrapper.active_adapter]
    return Adapter(
        type(config)(
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=[n.removeprefix(_PREFIX).removesuffix(_LOW_RANK) for n in tensors if n.endswith(_LOW_RANK)],
            modules_to_save=[name for name in whole if not (tied and name == "lm_head")] or None,
            ensure_weight_tying=tied and "lm_head" in whole,
            inference_mode=True,
        ),
        {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()},
    )


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Write peft's two files into a new folder; equal adapters give equal bytes."""
    folder.mkdir()
    adapter.config.save_pretrained(folder)
    file = folder / "adapter_config.json"
    content = json.loads(file.read_text("utf-8"))
    content["target_modules"] = sorted(content["target_modules"])  # peft keeps them as a set
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
    save_file(dict(sorted(adapter.tensors.items())), folder / "adapter_model.safetensors", metadata={"format": "pt"})


def save_model(model: Any, processor: Any, out_dir: Path, adapter: Adapter | None = None) -> None:
    """Write model and processor to `out_dir`, which must not exist. Adapters must have been merged before.

    `adapter` is what was merged; it goes into a folder of its own, where nothing looks that loads the model.
    """
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("the model still holds adapters; merge them before saving")
    partial = partial_folder(out_dir)
    try:
        model = model.to("cpu", memory_format=torch.contiguous_format)
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        if adapter is not None:
            write_adapter(adapter, partial / FOLDER)
        publish(partial, out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
