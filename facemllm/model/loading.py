"""Opening checkpoints. Refused before anything of them is used: pickles,
missing or damaged shards, quantised weights, unknown families, and parts that do not fit together.

transformers would fill missing weights with random ones and ask for code of the checkpoint's own; neither happens here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from facemllm.errors import UserError, one_line

FAMILIES = ("llava", "face_mllm")
"""Model types that packing and the branches know: one image, one row of tokens, put in its place of the text."""

_FLOATS = {"F32", "F16", "BF16"}
_WHOLE = {"I64", "I32", "BOOL"}  # tables and masks that some models keep beside their weights


def load_model(folder: Path | str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a model directory and its processor, from safetensors and local files only.

    Raises UserError in one line when the folder holds no loadable LLaVA-layout model.
    """
    folder = Path(folder)
    config = read_config(folder)
    if config.model_type not in FAMILIES:
        raise UserError(
            f"cannot load the model {folder}: it is of the family {config.model_type}; "
            f"those of LLaVA's layout are loaded: {', '.join(FAMILIES)}"
        )
    model = load_part(AutoModelForImageTextToText, folder, config, dtype)
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise _refusal(folder, error) from error
    if getattr(processor, "image_processor", None) is None:
        raise UserError(f"cannot use {folder}: it has no processor of images (processor_config.json)")
    check_fit(model, processor, str(folder))
    return model.to(device), processor


def load_part(kind: Any, folder: Path, config: Any, dtype: torch.dtype) -> Any:
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
        name, found, wanted = sorted(report["mismatched_keys"])[0]
        raise UserError(
            f"cannot load the model {folder}: {name} is {_by(found)} in its weights and {_by(wanted)} by its "
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
            tower = AutoModel.from_config(model.config.vision_config)
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


def _by(shape: Any) -> str:
    return " x ".join(map(str, shape))
