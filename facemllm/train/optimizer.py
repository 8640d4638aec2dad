"""What a stage trains, and how fast: frozen and full modules, LoRA, parameter groups, the learning-rate scheduler."""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from facemllm.errors import UserError
from facemllm.model.families import family_class
from facemllm.model.forward import FLOAT32_ATTENTION
from facemllm.settings import Stage
from facemllm.settings.train import Lora, Trainable
from facemllm.train.checkpoint import local_part
from facemllm.train.muon import MuonAdamW

FLOOR = 0.02  # share of the learning rate left at the end of a decay


def set_trainable(model: Any, trains: Trainable, lora: Lora, seed: int) -> Any | None:
    """Set which parameters require gradients; returns the peft wrapper when the language model trains by adapters.
    Adapters go into the linear layers of the language model, by exact module name: never into the tower. Their weights
    are drawn from `seed`, the same on every rank."""
    wrapper = None
    if trains.language == "lora":
        from peft import LoraConfig, get_peft_model

        targets = family_class(model.config).lora_targets(model)
        if not targets:
            raise UserError("language: lora needs linear layers in the language model; this one has none")
        adapters = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)
        with (
            torch.random.fork_rng(devices=[]),
            warnings.catch_warnings(),
        ):  # of transformers at peft, no concern of the user's
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing. is deprecated", FutureWarning)
            torch.manual_seed(seed)  # torch's own differs between processes
            wrapper = get_peft_model(model, adapters)
    module_of = family_class(model.config).module_of(model)
    for name, parameter in model.named_parameters():
        adapter = ".lora_" in name
        mode = getattr(trains, module_of(name))
        parameter.requires_grad_(mode == ("lora" if adapter else "full"))
    return wrapper


def set_modes(model: Any, trains: Trainable) -> None:
    """Training mode, except for a frozen tower: its normalisation statistics must not move."""
    model.train()
    if trains.tower == "frozen":
        family_class(model.config).tower(model).eval()


@contextmanager
def float32_attention(model: Any, wanted: bool) -> Iterator[None]:
    """For the time of the block, if `wanted`: scaled dot products of the language model in float32."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    if wanted and before == "sdpa":
        config._attn_implementation = FLOAT32_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def memory_savings(model: Any, trains: Trainable, *, recompute: bool, compiled: bool) -> Iterator[None]:
    """For the time of the block: compute activations again in the backward pass, and compile what is run. Both concern
    the language model, and the tower where it can and is trained (compiled, where it is run at all). Raises UserError
    where nothing can be compiled."""
    family = family_class(model.config)
    language, tower = family.language(model), family.tower(model)
    saving = [language] if recompute else []
    if recompute and trains.tower == "full" and tower.supports_gradient_checkpointing:
        saving.append(tower)
    faster = [language, tower] if compiled else []
    if compiled:
        _can_compile()
    for module in saving:
        module.gradient_checkpointing_enable({"use_reentrant": False})
    for module in faster:
        module.compile()
    try:
        yield
    finally:
        for module in saving:
            module.gradient_checkpointing_disable()
        for module in faster:
            module._compiled_call_impl = None


def _can_compile() -> None:
    """Raises UserError where torch.compile has not what it makes kernels with."""
    compiler, headers = os.environ.get("CXX") or "g++", Path(torch.__file__).with_name("include")
    found = {f"the C++ compiler {compiler}": shutil.which(compiler), "torch's headers": headers.is_dir()}
    if lacks := " and ".join(name for name, there in found.items() if not there):
        raise UserError(f"torch.compile needs {lacks}, and neither is in our image; set train.compile: false")


def merge(model: Any, wrapper: Any, probe: tuple[Tensor, ...]) -> Any:
    """The model with its adapters merged into the weights; raises if that changed what it computes. `probe` is
    (input_ids, attention_mask) of some text, run through the language model before and after."""
    model.eval()
    before = _probe(model, probe)
    merged = wrapper.merge_and_unload()
    change = (_probe(merged, probe) - before).abs().max().item()
    scale = before.abs().max().item()
    tolerance = 1e-4 if before.dtype == torch.float32 else 3e-2
    if not change <= tolerance * max(1.0, scale):
        raise RuntimeError(f"merging the adapters changed the model's logits by {change:.2e} (largest {scale:.2e})")
    return merged


@torch.no_grad()
def _probe(model: Any, probe: tuple[Tensor, ...]) -> Tensor:
    ids, mask = probe
    return model(input_ids=ids, attention_mask=mask).logits


def parameter_groups(model: Any, stage: Stage) -> list[dict[str, Any]]:
    """Optimiser groups, each module at its rate; no decay on vectors (norms, biases) and word embeddings. What the
    branches learn in tables decays: embeddings of classes and places, queries. `muon` is said of the weights of linear
    and convolutional layers, where the stage moves them so; a layer that shares its weights with word embeddings is
    none of them."""
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    module_of = family_class(model.config).module_of(model)
    layers = [part for part in model.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    matrices = {id(layer.weight) for layer in layers if stage.optimizer == "muon"}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module: Any = module_of(name)
            decay = stage.weight_decay if parameter.ndim >= 2 and module != "embeddings" else 0.0
            muon = id(parameter) in matrices and module != "embeddings"
            groups.setdefault((stage.rates.get(module, 1.0), decay, muon), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "factor": factor, "muon": muon}
        for (factor, decay, muon), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def schedule(stage: Stage, step: int) -> float:
    """Share of the learning rate at a step: linear warm-up, constant, then a fall to `FLOOR` over the last `decay`.
    `cosine` falls along half a cosine, `warmup_stable_decay` (Hu et al. 2024) in a straight line."""
    warm = stage.warmup * stage.steps
    if step < warm:
        return (step + 1) / (warm + 1)
    fall = stage.decay * stage.steps
    into = step - (stage.steps - fall)
    if fall == 0 or into <= 0:
        return 1.0
    share = min(1.0, into / fall)
    shape = 0.5 + 0.5 * math.cos(math.pi * share) if stage.schedule == "cosine" else 1.0 - share
    return FLOOR + (1.0 - FLOOR) * shape


def build_optimizer(model: Any, stage: Stage, *, bf16: bool = False) -> torch.optim.Optimizer:
    """The stage's optimiser over the model's trained parameters. With `bf16`, Muon makes its moves in bfloat16."""
    groups = parameter_groups(model, stage)
    return MuonAdamW(groups, stage.learning_rate, torch.bfloat16 if bf16 else torch.float32)


def skip_unreached(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], world_size: int) -> None:
    """Keep what the loss has not reached so far as it is, decay included, however many ranks there are. One process
    leaves such a parameter without a gradient; ranks that share theirs give it zeros."""
    waiting = [parameter for parameter in parameters if parameter not in optimizer.state]
    if not waiting:
        return
    none = torch.zeros((), dtype=torch.bool, device=waiting[0].device)
    reached = torch.stack([none if p.grad is None else local_part(p.grad).any() for p in waiting]).float()
    if world_size > 1:
        dist.all_reduce(reached)
    for parameter, there in zip(waiting, reached.tolist(), strict=True):
        if not there:
            parameter.grad = None
