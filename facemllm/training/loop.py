"""The training loop, in plain torch: no Ray, no MLflow, no trainer class.

`run_stage` runs on one process or as one of N under an initialised torch.distributed group. `batch_images` is the
global batch: each rank takes its slice of the same plan and the summed gradients are shared, so the worker count does
not change what is learnt (up to floating point; batch normalisation sees its own slice). Interrupted at any step and
resumed from a checkpoint, a run on the same number of CPU threads ends with the same bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from facemllm import cost
from facemllm.settings import Lora, Model, Stage
from facemllm.training import checkpoint, stages
from facemllm.training.data import Corpus
from facemllm.training.packing import Plan, Planner
from facemllm.training.step_loss import Faces, StepLoss

Log = Callable[[int, dict[str, float]], None]
Keep = Callable[[int, Callable[[Path], None]], None]


@dataclass(frozen=True)
class Job:
    """One rank's part of one stage."""

    name: str
    stage: Stage
    lora: Lora
    seed: int
    key: str  # digest of what the stage is made from; a checkpoint of another key is refused
    model: Model  # settings of the model's branches
    precision: str = "fp32"  # bf16 or fp32, already decided
    device: str = "cpu"
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    checkpoint_every: int = 200
    log_every: int = 20


@dataclass(frozen=True)
class Outcome:
    """What a stage did; `spent` is time and energy. All attempts count, except for the steps that a crash undid."""

    model: Any
    steps: int
    samples: int
    tokens: int
    flops: int
    resumed_from: int
    final_loss: float
    spent: cost.Spent


def decide_precision(wanted: str, device: str) -> str:
    """`auto` becomes bf16 where the processor multiplies it natively, else fp32."""
    if wanted != "auto":
        return wanted
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def run_stage(
    job: Job,
    model: Any,
    processor: Any,
    corpus: Corpus,
    faces: Faces,
    *,
    resume: Path | None = None,
    keep: Keep | None = None,
    log: Log | None = None,
) -> Outcome:
    """Train `model` through one stage and return it, adapters merged.

    `keep(step, write)` is called every `checkpoint_every` steps on every rank; `write(folder)` writes the checkpoint.
    `log(step, metrics)` is called on rank 0. Raises FloatingPointError naming the step when the loss is not finite.
    """
    stage, device = job.stage, torch.device(job.device)
    model = model.to(device)
    wrapper = stages.prepare(model, stage.trains, job.lora)
    optimizer = torch.optim.AdamW(stages.parameter_groups(model, stage), stage.learning_rate, (0.9, 0.98), fused=True)
    tokens = resumed_from = first = 0
    before: cost.Spent = {"seconds": 0.0, cost.CPU: 0.0, cost.GPU: 0.0}
    if resume is not None:
        state = checkpoint.read(resume, model, optimizer, job.key)
        first = resumed_from = int(state["step"])
        tokens = int(state["tokens"])
        before = state["spent"]
    step_loss = StepLoss(
        stage, job.model.knowledge, model, processor, corpus, faces, device=device, bf16=job.precision == "bf16"
    )
    planner = Planner(corpus, stage, job.name, job.seed, faces.pixels.shape[1], job.model.segmentation.drop)
    part = slice(job.rank * stage.batch_images // job.world, (job.rank + 1) * stage.batch_images // job.world)
    flops_per_token = _flops_per_token(model, step_loss, planner.plan(first), part)
    stages.set_modes(model, stage.trains)
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = math.nan
    recent: list[Tensor] = []
    meter = cost.Meter(job.device, machine=job.local_rank == 0)
    mark = time.perf_counter()
    marked = (first, tokens)
    for step in range(first, stage.steps):
        torch.manual_seed(
            job.seed * 1_000_003 + step * 1_009 + job.rank
        )  # dropout of adapters; everything else is in the plan
        share = stages.rate(stage, step)
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * share * group["factor"]
        value = step_loss(planner.plan(step), part)
        value.loss.backward()
        report = _share_gradients(trained, value.report, job.world)
        loss = float(report[0])
        norm = float(torch.nn.utils.clip_grad_norm_(trained, stage.clip))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"stage {job.name}: the loss is {loss} and the gradient norm {norm} at step {step + 1}; "
                f"lower training.stages.{job.name}.learning_rate or set training.precision=fp32"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += value.tokens
        recent.append(report)
        done = step + 1
        if log is not None and job.rank == 0 and (done % job.log_every == 0 or done == stage.steps):
            now = time.perf_counter()
            seconds = max(now - mark, 1e-9)
            metrics = {
                **step_loss.readable(torch.stack(recent).sum(0), len(recent)),
                "learning_rate": stage.learning_rate * share,
                "grad_norm": norm,
                "images_per_second": (done - marked[0]) * stage.batch_images / seconds,
                "tokens_per_second": (tokens - marked[1]) * job.world / seconds,
            }
            mark, marked = now, (done, tokens)
            log(done, metrics)
        if done % job.log_every == 0:
            recent.clear()
            meter.sample()
        if keep is not None and done % job.checkpoint_every == 0 and done < stage.steps:
            _share_buffers(model, job.world)
            spent = cost.add(before, _share_energy(meter.spent(), job.world, device))
            state = {"step": done, "tokens": tokens, "key": job.key, "stage": job.name, "spent": spent}
            keep(done, partial(checkpoint.write, model=model, optimizer=optimizer, state=state))
    _share_buffers(model, job.world)
    spent = cost.add(before, _share_energy(meter.spent(), job.world, device))
    model = stages.merge(model, wrapper, _probe_of(processor, device)) if wrapper is not None else model
    tokens *= job.world
    samples = stage.steps * stage.batch_images
    return Outcome(
        model.eval(), stage.steps, samples, tokens, round(flops_per_token * tokens), resumed_from, loss, spent
    )


def _flops_per_token(model: Any, step_loss: StepLoss, plan: Plan, part: slice) -> float:
    """Operations of a step that is thrown away: counting takes other kernels, which differ in the last bits."""
    model.eval()  # normalisation statistics stay as they are
    with cost.operations() as counter:
        value = step_loss(plan, part)
        value.loss.backward()
    model.zero_grad(set_to_none=True)
    return float(counter.get_total_flops()) / max(value.tokens, 1)


def _share_gradients(parameters: list[Tensor], report: Tensor, world: int) -> Tensor:
    """Sum gradients and reports over the ranks, in one message; returns the global report."""
    if world == 1:
        return report
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([report, *(gradient.flatten().float() for gradient in gradients)])
    dist.all_reduce(flat)
    offset = len(report)
    for parameter in parameters:
        piece = flat[offset : offset + parameter.numel()].view_as(parameter)
        parameter.grad = piece.to(parameter.dtype)
        offset += parameter.numel()
    return flat[: len(report)]


def _share_energy(spent: cost.Spent, world: int, device: torch.device) -> cost.Spent:
    """Energy of all ranks together, unknown if one rank's is; each keeps its own seconds."""
    if world == 1:
        return spent
    joules = torch.tensor([math.nan if spent[n] is None else spent[n] for n in (cost.CPU, cost.GPU)], device=device)
    dist.all_reduce(joules)
    cpu, gpu = (None if math.isnan(value) else value for value in joules.tolist())
    return {**spent, cost.CPU: cpu, cost.GPU: gpu}


def _share_buffers(model: Any, world: int) -> None:
    """Average normalisation statistics over the ranks, where they are about to be written."""
    if world > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point() and model.training:
                dist.all_reduce(buffer)
                buffer /= world


def _probe_of(processor: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    encoded = processor.tokenizer("is there a face?", return_tensors="pt")
    return encoded["input_ids"].to(device), encoded["attention_mask"].to(device)
