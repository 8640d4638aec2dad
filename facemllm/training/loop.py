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

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from facemllm import cost
from facemllm.model.forward import image_tokens
from facemllm.model.pixels import normalise
from facemllm.model.prompts import Frame
from facemllm.settings import Lora, Stage
from facemllm.training import augment, checkpoint, stages
from facemllm.training.data import Corpus
from facemllm.training.objectives import CaptionWords, answer_loss
from facemllm.training.packing import Plan, Planner, pack, word_bags

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
    pixels: NDArray[np.uint8],
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
    step_loss = _StepLoss(job, model, processor, corpus, pixels, device)
    planner = Planner(corpus, stage, job.name, job.seed, pixels.shape[1])
    flops_per_token = _flops_per_token(model, step_loss, planner.plan(first))
    stages.set_modes(model, stage.trains)
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = math.nan
    recent: list[float] = []
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
        value, seen = step_loss(planner.plan(step))
        value.backward()
        loss = _share_gradients(trained, value.detach(), job.world)
        norm = float(torch.nn.utils.clip_grad_norm_(trained, stage.clip))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"stage {job.name}: the loss is {loss} and the gradient norm {norm} at step {step + 1}; "
                f"lower training.stages.{job.name}.learning_rate or set training.precision=fp32"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += seen
        recent = [*recent[-(job.log_every - 1) :], loss] if job.log_every > 1 else [loss]
        done = step + 1
        if log is not None and job.rank == 0 and (done % job.log_every == 0 or done == stage.steps):
            now = time.perf_counter()
            seconds = max(now - mark, 1e-9)
            metrics = {
                "loss": sum(recent) / len(recent),
                "learning_rate": stage.learning_rate * share,
                "grad_norm": norm,
                "images_per_second": (done - marked[0]) * stage.batch_images / seconds,
                "tokens_per_second": (tokens - marked[1]) * job.world / seconds,
            }
            mark, marked = now, (done, tokens)
            log(done, metrics)
        if done % job.log_every == 0:
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


class _StepLoss:
    """The loss of a rank's slice of a plan, scaled so that the ranks' losses sum to the global mean."""

    def __init__(
        self, job: Job, model: Any, processor: Any, corpus: Corpus, pixels: NDArray[np.uint8], device: torch.device
    ) -> None:
        self.job, self.model, self.corpus, self.pixels, self.device = job, model, corpus, pixels, device
        self.image_processor = processor.image_processor
        self.prefix_ids = Frame.of(model, processor).prefix_ids
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        self.by_words = job.stage.objective == "caption_words"
        self.words = CaptionWords(corpus, job.stage.tasks, self.vocabulary, device) if self.by_words else None

    def __call__(self, plan: Plan) -> tuple[Tensor, int]:
        """Loss and the number of tokens the language model (or the word head) was given."""
        job, images = self.job, len(plan.rows)
        part = slice(job.rank * images // job.world, (job.rank + 1) * images // job.world)
        turns = plan.turns[part]
        mirrored = plan.changes.mirror[part] if plan.changes else np.zeros(len(turns), bool)
        pixels_BSSC = torch.from_numpy(self.pixels[self.corpus.pixel_row[plan.rows[part]]]).to(self.device)
        if plan.changes:
            pixels_BSSC = augment.apply(pixels_BSSC, plan.changes.part(part))
        values_BCSS = normalise(pixels_BSSC, self.image_processor)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=job.precision == "bf16"):
            image_BND = image_tokens(self.model, values_BCSS)
            if self.words is not None:
                bag_BV = torch.from_numpy(word_bags(self.corpus, turns, mirrored, self.vocabulary)).to(self.device)
                return self.words.loss(self.model, image_BND, bag_BV) / images, image_BND.shape[0] * image_BND.shape[1]
            packed = pack(self.corpus, turns, mirrored)
            loss = answer_loss(self.model, image_BND, self.prefix_ids, packed)
        return loss / plan.labels, packed.ids.size + len(turns) * len(self.prefix_ids)


def _flops_per_token(model: Any, step_loss: _StepLoss, plan: Plan) -> float:
    """Operations of a step that is thrown away: counting takes other kernels, which differ in the last bits."""
    model.eval()  # normalisation statistics stay as they are
    with cost.operations() as counter:
        loss, tokens = step_loss(plan)
        loss.backward()
    model.zero_grad(set_to_none=True)
    return float(counter.get_total_flops()) / max(tokens, 1)


def _share_gradients(parameters: list[Tensor], loss: Tensor, world: int) -> float:
    """Sum gradients and losses over the ranks, in one message; returns the global loss."""
    if world > 1:
        present = [p for p in parameters if p.requires_grad]
        flat = torch.cat(
            [
                loss.reshape(1).float(),
                *((p.grad if p.grad is not None else torch.zeros_like(p)).flatten().float() for p in present),
            ]
        )
        dist.all_reduce(flat)
        loss = flat[0]
        offset = 1
        for parameter in present:
            piece = flat[offset : offset + parameter.numel()].view_as(parameter)
            parameter.grad = piece.to(parameter.dtype)
            offset += parameter.numel()
    return float(loss)


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
