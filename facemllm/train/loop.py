"""The training loop, in plain torch: no Ray, no MLflow, no trainer class.

`run_stage` runs on one process or as one of N under an initialised torch.distributed group. `batch_images` is the
global batch: each rank takes its slice of the same plan and the summed gradients are shared, so the worker count does
not change what is learnt (up to floating point; batch normalisation sees its own slice). Interrupted at any step and
resumed from a checkpoint, a run on the same number of CPU threads ends with the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from facemllm.core import cost
from facemllm.model.saving import Adapter, adapter_of
from facemllm.train import checkpoint, stages
from facemllm.train.batches import Batch, Faces, ahead
from facemllm.train.checkpoint import local_part
from facemllm.train.data import Corpus
from facemllm.train.fsdp import Dealt, clip
from facemllm.train.job import Job
from facemllm.train.loss import StepLoss, Value
from facemllm.train.source import Source
from facemllm.train.watch import Changed, Pace, Watch, memory_explained

Log = Callable[[int, dict[str, float]], None]
Keep = Callable[[int, checkpoint.Draft], None]


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
    adapter: Adapter | None  # what was merged, where the language model trains by adapters


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

    `keep(step, draft)` is called every `checkpoint_every` steps, on rank 0, and on all ranks of a sharded model;
    `draft(folder)` writes the checkpoint now, `draft.copied()` may be written while training goes on.
    `log(step, metrics)` is called on rank 0. Raises FloatingPointError when the loss is not finite or has diverged, and
    UserError when there is nothing to learn, nothing changes, or memory is too small.
    """
    with memory_explained(job.name):
        return _run(job, model, processor, corpus, faces, resume, keep, log)


def _run(
    job: Job,
    model: Any,
    processor: Any,
    corpus: Corpus,
    faces: Faces,
    resume: Path | None,
    keep: Keep | None,
    log: Log | None,
) -> Outcome:
    stage, device, bf16 = job.stage, torch.device(job.device), job.precision == "bf16"
    if not job.sharded:
        model = model.to(device)
    wrapper = stages.prepare(model, stage.trains, job.lora)
    dealt = Dealt(model, wrapper, device, bf16=bf16) if job.sharded else None
    changed = Changed(model, job.name, stage, job.world)
    optimizer = torch.optim.AdamW(stages.parameter_groups(model, stage), stage.learning_rate, (0.9, 0.98), fused=True)
    watch = Watch(job.name, job.divergence, 0)
    recent: list[Tensor] = []
    tokens = resumed_from = first = 0
    before: cost.Spent = {"seconds": 0.0, cost.CPU: 0.0, cost.GPU: 0.0}
    if resume is not None:
        state = checkpoint.read(resume, model, optimizer, job.key, job.made_from)
        first = resumed_from = int(state["step"])
        tokens = int(state["tokens"])
        before = state["spent"]
        watch.checkpoint = first
        watch.restore(state.get("watch", {}))
        recent = [torch.tensor(report, device=device) for report in state.get("recent", ())]
    stages.set_modes(model, stage.trains)
    source = Source(job, model, processor, corpus, faces)
    step_loss = StepLoss(stage, job.model.knowledge, model, processor, corpus, faces, device=device, bf16=bf16)
    value_of = dealt.around(step_loss) if dealt is not None else step_loss
    flops_per_token = _flops_per_token(model, step_loss, value_of, source.sample(first))
    stages.set_modes(model, stage.trains)
    trained = list(changed.trained.values())
    loss = math.nan
    meter = cost.Meter(job.device, machine=job.local_rank == 0)
    pace = Pace(stage.steps, first, job.device, job.precision, job.world, flops_per_token)
    with stages.economies(model, stage.trains, recompute=job.recompute, compiled=job.compile):
        for step, batches in enumerate(ahead(source.batches, first, stage.steps), first):
            # dropout of adapters; everything else is in the plan
            torch.manual_seed(job.seed * 1_000_003 + step * 1_009 + job.rank)
            share = stages.rate(stage, step)
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate * share * group["factor"]
            reports = []
            for batch in batches:
                value = value_of(batch)
                value.loss.backward()
                reports.append(value.report)
            report = _share_gradients(() if job.sharded else trained, torch.stack(reports).sum(0), job.world)
            _spare_unreached(optimizer, trained, job.world)
            if step == first:
                changed.check_gradients()
            done = step + 1
            shows = done % job.log_every == 0 or done == stage.steps
            logs = log is not None and job.rank == 0 and shows
            norms = changed.norms() if logs or (job.sharded and shows) else {}
            loss = float(report[0])
            norm = clip(trained, stage.clip)
            watch.check(done, loss, norm, partial(source.images, step))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            recent.append(report)
            tokens += step_loss.counts(report)["tokens"]
            if log is not None and logs:
                total = torch.stack(recent).sum(0)
                new = recent[pace.done - done :]  # a resumed stage's clock runs from where it went on
                counts = step_loss.counts(torch.stack(new).sum(0))
                shown = {"images": len(new) * stage.batch_images, **{n: counts[n] for n in ("questions", "tokens")}}
                metrics = {
                    **step_loss.readable(total, len(recent)),
                    "learning_rate": stage.learning_rate * share,
                    **{f"learning_rate/{m}": stage.learning_rate * share * f for m, f in stage.rates.items()},
                    "grad_norm": norm,
                    **norms,
                    **pace.measure(done, shown),
                }
                if source.left_out:
                    metrics["questions_too_long"] = float(len(source.left_out))
                log(done, metrics)
            if done % job.log_every == 0:
                recent.clear()
                meter.sample()
            if keep is not None and done % job.checkpoint_every == 0 and done < stage.steps:
                _share_buffers(model, job.world)
                spent = cost.add(before, _share_energy(meter.spent(), job.world, device))
                state = {
                    "step": done,
                    "tokens": tokens,
                    "key": job.key,
                    "stage": job.name,
                    "spent": spent,
                    "watch": watch.state(),
                    "recent": [report.tolist() for report in recent],
                }
                if job.rank == 0 or job.sharded:
                    keep(done, _draft(job, model, optimizer, state))
                watch.checkpoint = done
    if first < stage.steps:
        changed.check_changed()
    _share_buffers(model, job.world)
    spent = cost.add(before, _share_energy(meter.spent(), job.world, device))
    if dealt is not None:
        (model, wrapper), device = dealt.whole(), torch.device("cpu")
    adapter = None
    if wrapper is not None and (job.rank == 0 or not job.sharded):
        adapter = adapter_of(wrapper, stage.trains)
        model = stages.merge(model, wrapper, _probe_of(processor, device))
    samples = stage.steps * stage.batch_images
    return Outcome(
        model.eval(), stage.steps, samples, tokens, round(flops_per_token * tokens), resumed_from, loss, spent, adapter
    )


def _draft(job: Job, model: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> checkpoint.Draft:
    rank, world = (job.rank, job.world) if job.sharded else (0, 1)
    return checkpoint.draft(model, optimizer, {**state, "made_from": dict(job.made_from)}, rank=rank, world=world)


def _flops_per_token(model: Any, step_loss: StepLoss, value_of: Callable[[Batch], Value], batch: Batch) -> float:
    """Operations of a batch that is thrown away: counting takes other kernels, which differ in the last bits."""
    model.eval()  # normalisation statistics stay as they are
    with cost.operations() as counter:
        value = value_of(batch)
        value.loss.backward()
    model.zero_grad(set_to_none=True)
    return float(counter.get_total_flops()) / max(step_loss.counts(value.report)["tokens"], 1)


def _share_gradients(parameters: Sequence[Tensor], report: Tensor, world: int) -> Tensor:
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


def _spare_unreached(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], world: int) -> None:
    """Keep what the loss has not reached so far as it is, decay included, however many ranks there are.

    One process leaves such a parameter without a gradient; ranks that share theirs give it zeros.
    """
    waiting = [parameter for parameter in parameters if parameter not in optimizer.state]
    if not waiting:
        return
    none = torch.zeros((), dtype=torch.bool, device=waiting[0].device)
    reached = torch.stack([none if p.grad is None else local_part(p.grad).any() for p in waiting]).float()
    if world > 1:
        dist.all_reduce(reached)
    for parameter, there in zip(waiting, reached.tolist(), strict=True):
        if not there:
            parameter.grad = None


def _share_energy(spent: cost.Spent, world: int, device: torch.device) -> cost.Spent:
    """Energy of all ranks together, unknown if one rank's is; each keeps its own seconds."""
    if world == 1:
        return spent
    joules = torch.tensor([math.nan if spent[n] is None else spent[n] for n in (cost.CPU, cost.GPU)], device=device)
    dist.all_reduce(joules)
    cpu, gpu = (None if math.isnan(value) else value for value in joules.tolist())
    return {**spent, cost.CPU: cpu, cost.GPU: gpu}


def _share_buffers(model: Any, world: int) -> None:
    """Average the normalisation statistics that training moves over the ranks, where they are about to be written.

    A sum divided by the ranks is not what all of them had: nothing else is touched.
    """
    if world == 1:
        return
    for module in model.modules():
        if isinstance(module, _NormBase) and module.training:
            for statistic in (module.running_mean, module.running_var):
                if statistic is not None:
                    dist.all_reduce(statistic)
                    statistic /= world


def _probe_of(processor: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    encoded = processor.tokenizer("is there a face?", return_tensors="pt")
    return encoded["input_ids"].to(device), encoded["attention_mask"].to(device)
