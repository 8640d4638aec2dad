"""Model directories: safetensors, processor, chat template, and a stage's peft adapter.

Opened: refused before anything of one is used are pickles, missing or damaged shards, quantised weights, unknown
families, and parts that do not fit together. transformers would fill missing weights with random ones and ask for code
of the checkpoint's own; neither happens here.

Written: whole or not at all. An adapter is what a stage changed: low-rank weights of the language model, and whole
every other module it trained. It lies in `adapter/` beside the merged model and goes on top of the model that the stage
started from, by `PeftModel.from_pretrained(base, folder)`; the two then answer alike.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from facemllm.core.files import partial_folder, publish
from facemllm.errors import UserError, one_line
from facemllm.settings.train import Trainable

FAMILIES = ("llava", "face_mllm")
"""Model types that packing and the branches know: one image, one row of tokens, put in its place of the text."""

_FLOATS = {"F32", "F16", "BF16"}
_WHOLE = {"I64", "I32", "BOOL"}  # tables and masks that some models keep beside their weights
_PREFIX, _LOW_RANK = "base_model.model.", ".lora_A.weight"
_MODULES = {
    "tower": ("model.vision_tower",),
    "projector": ("model.multi_modal_projector",),
    "segmentation": ("model.segmentation",),
    "knowledge": ("model.knowledge",),
    "embeddings": ("model.language_model.embed_tokens", "lm_head"),
}


def load_model(folder: Path | str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a model directory and its processor, from safetensors and local files only. Raises UserError in one line
    when the folder holds no loadable LLaVA-layout model."""
    folder = Path(folder)
    config = read_config(folder)
    if config.model_type not in FAMILIES:
        raise UserError(
            f"cannot load the model {folder}: it is of the family {config.model_type}; "
            f"those of LLaVA's layout are loaded: {', '.join(FAMILIES)}"
        )
    model = load_part(AutoModelForImageTextToText, folder, config, dtype)
    processor = load_processor(folder)
    check_fit(model, processor, str(folder))
    return model.to(device), processor


def load_processor(folder: Path) -> Any:
    """The processor of a model directory, from local files only. Raises UserError where it has none for images."""
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise _refusal(folder, error) from error
    if getattr(processor, "image_processor", None) is None:
        raise UserError(f"cannot use {folder}: it has no processor of images (processor_config.json)")
    return processor


def load_part(kind: Any, folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model of an auto class `kind`, every weight from the folder. Raises UserError if one is missing or odd."""
    try:
        model, report = kind.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name and shapes
        )
    except Exception as error:  # transformers raises a dozen kinds, from OSError to safetensors' own
        raise _refusal(folder, error) from error
    if report["mismatched_keys"]:
        name, *shapes = sorted(report["mismatched_keys"])[0]
        found, wanted = (" x ".join(map(str, shape)) for shape in shapes)
        raise UserError(
            f"cannot load the model {folder}: {name} is {found} in its weights and {wanted} by its "
            f"config.json ({len(report['mismatched_keys'])} such); tower, projector and language model have to match"
        )
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise UserError(f"cannot load the model {folder}: {len(names)} weights are missing, the first {names[0]}")
    return model


def check_fit(model: Any, processor: Any, name: str) -> None:
    """Raises UserError unless the processor writes as many image tokens as the model makes of an image."""
    token, tokenizer = processor.image_token, processor.tokenizer
    known = tokenizer.get_vocab()
    if known.get(token) != model.config.image_token_id:
        raise UserError(
            f"cannot use {name}: its image token {token} is {known.get(token, 'not')} in its vocabulary, "
            f"and {model.config.image_token_id} in its config.json (image_token_index)"
        )
    if len(known) > (rows := model.get_input_embeddings().num_embeddings):
        raise UserError(f"cannot use {name}: its tokenizer knows {len(known)} words, its embeddings {rows}")
    blank = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    try:
        asked = processor(images=blank, text=token, return_tensors="pt")
        with torch.device("meta"):  # shapes alone: no weights, no time
            tower = AutoModel.from_config(model.config.vision_config).eval()
            seen = tower(asked["pixel_values"].to("meta"), output_hidden_states=True, return_dict=True)
        chosen = model.config.vision_feature_layer
        made = seen.hidden_states[chosen if isinstance(chosen, int) else chosen[0]].shape[1]
    except Exception as error:
        raise UserError(f"cannot use {name}: its processor does not fit its vision tower: {one_line(error)}") from error
    made -= model.config.vision_feature_select_strategy == "default"
    made += getattr(model.model, "additional_tokens", 0)
    if (written := int((asked["input_ids"] == model.config.image_token_id).sum())) != made:
        raise UserError(
            f"cannot use {name}: its processor writes {written} image tokens and its vision tower makes {made}; "
            "see patch_size, num_additional_image_tokens and vision_feature_select_strategy in processor_config.json"
        )


def read_config(folder: Path) -> Any:
    """The configuration of a checkpoint, by transformers' own classes. Raises UserError if its files are no good."""
    _check_weights(folder)
    try:
        raw = json.loads((folder / "config.json").read_text("utf-8"))
        kind = raw["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot load the model {folder}: it has no config.json that names a model_type") from error
    if "quantization_config" in raw:
        raise UserError(f"cannot load the model {folder}: its weights are quantised; take the unquantised checkpoint")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        if "auto_map" in raw:
            raise UserError(
                f"cannot load the model {folder}: {kind} needs code of its own (auto_map), which is never run"
            ) from error
        raise _refusal(folder, error) from error


def _check_weights(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        why = "its weights are pickled; only safetensors are loaded" if pickled else "it holds no *.safetensors file"
        raise UserError(f"cannot load the model {folder}: {why}")
    if (index := folder / "model.safetensors.index.json").exists():
        try:
            wanted = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"cannot load the model {folder}: {index.name} is damaged") from error
        if absent := sorted(wanted - {file.name for file in files}):
            raise UserError(f"cannot load the model {folder}: {absent[0]} is missing; fetch it again")
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                kinds = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot load the model {folder}: {file.name} is damaged; fetch it again") from error
        for name, kind in kinds.items():
            if kind not in _FLOATS | _WHOLE:
                raise UserError(
                    f"cannot load the model {folder}: {name} in {file.name} is {kind}; "
                    f"weights have to be one of {', '.join(sorted(_FLOATS))}"
                )


def _refusal(folder: Path, error: Exception) -> UserError:
    return UserError(f"cannot load the model {folder}: {one_line(error)}")


@dataclass(frozen=True)
class Adapter:
    """peft's configuration and tensors, apart from the model they were taken from."""

    config: Any
    tensors: dict[str, Tensor]


def adapter_of(wrapper: Any, trains: Trainable) -> Adapter:
    """The adapter of a trained peft model, to be taken before its weights are merged. Modules outside the language
    model that the stage `trains` are kept whole, buffers included."""
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


def _write_adapter(adapter: Adapter, folder: Path) -> None:
    """peft's two files in a new folder; equal adapters give equal bytes."""
    folder.mkdir()
    adapter.config.save_pretrained(folder)
    file = folder / "adapter_config.json"
    content = json.loads(file.read_text("utf-8"))
    content["target_modules"] = sorted(content["target_modules"])  # peft keeps them as a set
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
    save_file(dict(sorted(adapter.tensors.items())), folder / "adapter_model.safetensors", metadata={"format": "pt"})


def save_model(model: Any, processor: Any, out_dir: Path, adapter: Adapter | None = None) -> None:
    """Write model and processor to `out_dir`, which must not exist. Adapters must have been merged before. `adapter` is
    what was merged; it goes into a folder of its own, where nothing looks that loads the model."""
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("the model still holds adapters; merge them before saving")
    partial = partial_folder(out_dir)
    try:
        model = model.to("cpu", memory_format=torch.contiguous_format)
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        if adapter is not None:
            _write_adapter(adapter, partial / "adapter")
        publish(partial, out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
