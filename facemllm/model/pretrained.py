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
import re
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import ModuleList
from transformers import AutoConfig, AutoModelForImageTextToText

from facemllm.core.files import building, checkpoint_files
from facemllm.errors import UserError, one_line, refusing
from facemllm.model.families import Family, Llava, family_class, family_of
from facemllm.model.families.base import SIDE
from facemllm.model.families.opening import open_processor
from facemllm.model.folder import REAL, checked_config, tensors_of
from facemllm.settings.train import Trainable

_NUMBER = re.compile(r"\d+")
_USUAL = {"bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p"}
_USUAL |= {"max_length", "max_new_tokens", "use_cache", "transformers_version", "_from_model_config"}
_MOST_BEAMS = 16
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
    names = [one.name for one in checkpoint_files(folder) if "process" in one.name or "token" in one.name]
    with refusing(
        f"cannot load the model {folder}: transformers' own code opens no processor of {', '.join(names) or 'it'}"
    ):
        processor = open_processor(folder)
    if getattr(processor, "image_processor", None) is None:
        raise UserError(f"cannot use {folder}: it has no processor of images (processor_config.json)")
    return processor


def load_part(kind: Any, folder: Path, config: Any, dtype: torch.dtype = torch.float32, *, beside: bool = False) -> Any:
    """The model of an auto class `kind`, with all its weights from the folder; what that holds `beside` it is another
    model's, and left. Raises UserError if a weight is missing, odd, or in no model."""
    _check_sizes(kind, folder, config)
    with refusing(f"cannot load the model {folder}"):  # transformers raises a dozen kinds, from OSError to panics
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
    over = sorted(report["unexpected_keys"])
    if beside:  # of those, layers like the model's own
        known = {_NUMBER.sub("#", name) for name in model.state_dict()}
        over = [name for name in over if _NUMBER.sub("#", name) in known]
    if over:
        raise UserError(
            f"cannot load the model {folder}: {len(over)} of its weights are in no model of its config.json, the first "
            f"{over[0]}; see the numbers of layers there, or save it anew without them (save_pretrained)"
        )
    return model


def _check_sizes(kind: Any, folder: Path, config: Any) -> None:
    """Raises UserError for a configuration that asks for far more than the weights hold, before anything is made of it,
    and for weights that are whole numbers."""
    tensors = tensors_of(folder)
    refused = refusing(f"cannot load the model {folder}: no model can be made by its config.json")
    with refused, torch.random.fork_rng(devices=[]), torch.device("meta"):
        shadow = kind.from_config(deepcopy(config), trust_remote_code=False)
    asked, held = sum(one.numel() for one in shadow.parameters()), sum(one.numel for one in tensors.values())
    if asked > 2 * held:
        raise UserError(
            f"cannot load the model {folder}: by its config.json it has {asked} parameters, its files hold {held}; "
            "take the config.json that belongs to them"
        )
    ends = {name.rpartition(".")[2] for name, _ in shadow.named_parameters()}
    for name, one in tensors.items():
        if not one.real and name.rpartition(".")[2] in ends:
            raise UserError(f"cannot load the model {folder}: {name} is {one.kind}; weights have to be {REAL}")


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
        with refusing("its processor makes no prompt"):
            prefix = len(family.frame.prefix_ids)
    except UserError as error:
        raise UserError(f"cannot use {name}: {error}") from error
    if not family.image_count:
        raise unknown
    if family.longest is not None and prefix >= family.longest:
        raise UserError(
            f"cannot use {name}: an image becomes {prefix} tokens, and the language model reads {family.longest} "
            "(max_position_embeddings); let its processor make fewer, or take a smaller model.image_size"
        )
    family.check(model, name)
    _end_turns(model, family.frame.end_id, name)
    _check_writing(model, family, name)


def _end_turns(model: Any, end_id: int, name: str) -> None:
    """Let generation end where an answer of the chat template does."""
    ends = model.generation_config.eos_token_id
    known = ends if isinstance(ends, list) else [ends] if ends is not None else []
    if not all(isinstance(one, int) for one in known):
        raise UserError(f"cannot use {name}: eos_token_id in its generation_config.json is {ends!r}, no token's id")
    if end_id not in known:
        model.generation_config.eos_token_id = [*known, end_id] if known else end_id


def _check_writing(model: Any, family: Family, name: str) -> None:
    """Raises UserError where generation_config.json asks for more than is usual and two tokens cannot be written."""
    settings = model.generation_config.to_diff_dict()
    asked = sorted(key for key, value in settings.items() if key not in _USUAL and value is not False)
    if not asked:
        return
    if (model.generation_config.num_beams or 1) > _MOST_BEAMS:
        raise UserError(f"cannot use {name}: num_beams in its generation_config.json is more than {_MOST_BEAMS}")
    ids_1P = torch.tensor([[*family.frame.prefix_ids, *family.frame.prompt("?")]], device=model.device)
    inputs = {n: v.to(model.device) for n, v in family.example.items()}
    inputs = {n: v.to(model.dtype) if v.is_floating_point() else v for n, v in inputs.items()}
    with torch.no_grad(), refusing(f"cannot use {name}: generation_config.json ({', '.join(asked)})"):
        (_,) = model.generate(
            input_ids=ids_1P,
            attention_mask=torch.ones_like(ids_1P),
            **(family.beside(ids_1P) | inputs),
            max_new_tokens=2,
            min_new_tokens=2,
            do_sample=False,
            pad_token_id=family.frame.end_id,
        )[:, -1:]


def read_config(folder: Path) -> Any:
    """The configuration of a checkpoint, by transformers' own classes. Raises UserError if its files are no good."""
    raw = checked_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        if raw.get("auto_map"):
            raise UserError(
                f"cannot load the model {folder}: {raw['model_type']} needs code of its own (auto_map), "
                "which is never run"
            ) from error
        raise UserError(f"cannot load the model {folder}: config.json: {one_line(error)}") from error
    vars(config).pop("auto_map", None)  # what is saved of it names no code
    return config


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
