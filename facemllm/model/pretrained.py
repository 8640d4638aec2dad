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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import ModuleList
from transformers import AutoConfig, AutoModelForImageTextToText

from facemllm.core.files import building
from facemllm.errors import UserError, one_line, refusing
from facemllm.model.families import Llava, family_class, family_of
from facemllm.model.families.base import SIDE
from facemllm.model.families.opening import open_processor
from facemllm.settings.train import Trainable

_FLOATS = {"F32", "F16", "BF16"}
_WHOLE = {"I64", "I32", "BOOL"}  # tables and masks that some models keep beside their weights
_PREFIX, _LOW_RANK = "base_model.model.", ".lora_A.weight"


def load_model(
    folder: Path | str, *, device: str = "cpu", dtype: torch.dtype = torch.float32, image_size: int | None = None
) -> tuple[Any, Any]:
    """Load a model directory and its processor, from safetensors and local files only. `image_size` is the side of the
    pictures it is to be shown (see `settings.Model`); None takes what the directory notes. Raises UserError in one line
    when the folder holds no image-text model of transformers, or one that cannot be used."""
    folder = Path(folder)
    config = read_config(folder)
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise UserError(
            f"cannot load the model {folder}: {config.model_type} reads no images "
            "(transformers lists it under no AutoModelForImageTextToText)"
        )
    processor = load_processor(folder)
    with refusing(f"cannot use {folder}: its processor takes no pictures"):
        set_side(config, processor, image_size, str(folder))
    model = load_part(AutoModelForImageTextToText, folder, config, dtype).to(device)
    check_fit(model, processor, str(folder))
    return model, processor


def set_side(config: Any, processor: Any, image_size: int | None, name: str) -> None:
    """Note in the configuration the side of the pictures that a model is shown, where its processor takes any. Raises
    UserError for a side that the processor would change, or fills up with what the data does not show."""
    family = family_of(config, processor)
    if (fixed := family.fixed_side) is not None:
        if image_size is not None and image_size < fixed and not isinstance(family, Llava):
            raise UserError(
                f"cannot use {name}: its processor makes every picture {fixed} pixels wide, and model.image_size is "
                f"{image_size}; set model.image_size: {fixed}"
            )
        return
    if image_size is not None:
        setattr(config, SIDE, image_size)
    if why := family.why_unfit(family.side):
        raise UserError(f"cannot use {name}: a picture of model.image_size {family.side} pixels {why}")


def load_processor(folder: Path) -> Any:
    """The processor of a model directory, from local files only. Raises UserError where it has none for images."""
    try:
        processor = open_processor(folder)
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
    """Raises UserError unless tokenizer, processor and model fit one another: words, image tokens, a chat template that
    can be cut, room for an image."""
    family, tokenizer = family_of(model.config, processor), processor.tokenizer
    known, rows, token = tokenizer.get_vocab(), model.get_input_embeddings().num_embeddings, processor.image_token
    unknown = UserError(
        f"cannot use {name}: its image token {token} is {known.get(token, 'not')} in its vocabulary, "
        f"and {family.image_token_id} in its config.json (image_token_index)"
    )
    if isinstance(family, Llava) and known.get(token) != family.image_token_id:
        raise unknown
    # the image token alone may be beyond the embeddings: nothing is looked up for it
    words = max((one for one in known.values() if one != family.image_token_id), default=-1) + 1
    if words > rows:
        raise UserError(
            f"cannot use {name}: its tokenizer knows {words} words, its embeddings {rows}; "
            "the vocabulary was resized on one side alone"
        )
    try:
        prefix = len(family.frame.prefix_ids)
    except UserError as error:
        raise UserError(f"cannot use {name}: {error}") from error
    except Exception as error:
        raise UserError(f"cannot use {name}: its processor makes no prompt: {one_line(error)}") from error
    if not family.image_count:
        raise unknown
    if family.longest is not None and prefix >= family.longest:
        raise UserError(
            f"cannot use {name}: an image becomes {prefix} tokens, and the language model reads {family.longest} "
            "(max_position_embeddings); let its processor make fewer, or take a smaller model.image_size"
        )
    family.check(model, name)
    _end_turns(model, family.frame.end_id, name)


def _end_turns(model: Any, end_id: int, name: str) -> None:
    """Let generation end where an answer of the chat template does."""
    ends = model.generation_config.eos_token_id
    known = ends if isinstance(ends, list) else [ends] if ends is not None else []
    if not all(isinstance(one, int) for one in known):
        raise UserError(f"cannot use {name}: eos_token_id in its generation_config.json is {ends!r}, no token's id")
    if end_id not in known:
        model.generation_config.eos_token_id = [*known, end_id] if known else end_id


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
    modules, loose = dict(model.named_modules()), dict(model.named_parameters())
    parts = family_class(model.config).parts(model)
    full = [part for part in parts if part != "language" and getattr(trains, part) == "full"]
    chosen = [name for part in full for name in parts[part]]
    # peft keeps no list whole, only what is in it
    lists = {name: [f"{name}.{at}" for at in range(len(m))] for name, m in modules.items() if isinstance(m, ModuleList)}
    whole = [one for name in chosen if name in modules for one in lists.get(name, [name])]
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tensors = dict(get_peft_model_state_dict(wrapper, save_embedding_layers=False))
    for name in whole:
        tensors |= {f"{_PREFIX}{name}.{part}": value for part, value in modules[name].state_dict().items()}
    tensors |= {f"{_PREFIX}{name}": loose[name] for name in chosen if name in loose}
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
    with building(out_dir) as partial:
        model = model.to("cpu", memory_format=torch.contiguous_format)
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        if adapter is not None:
            _write_adapter(adapter, partial / "adapter")
