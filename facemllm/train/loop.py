"""The training loop, in plain torch: no Ray, no MLflow, no trainer framework.

One process, or N under an initialised torch.distributed group: each rank takes its slice of the same plan and the
summed gradients are shared, so the worker count does not change what is learnt (up to floating point; batch
normalisation sees its own slice). Interrupted at any step and resumed from a checkpoint, a run on the same number of
CPU threads ends with the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from facemllm.core import cost
from facemllm.model.pretrained import Adapter, adapter_of
from facemllm.train import checkpoint, optimizer
from facemllm.train.checkpoint import Checkpoint
from facemllm.train.corpus import FaceDataset
from facemllm.train.dataloader import Batch, DataLoader, prefetch
from facemllm.train.distributed import ShardedModel, average_buffers, clip, reduce_energy, reduce_gradients
from facemllm.train.loss import StepLoss
from facemllm.train.monitor import LossMonitor, ParameterMonitor, Throughput, out_of_memory_explained
from facemllm.train.stage import Log, StageRun

Save = Callable[[int, Checkpoint], None]


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
    run: StageRun,
    model: Any,
    processor: Any,
    dataset: FaceDataset,
    *,
    resume: Path | None = None,
    save: Save | None = None,
    log: Log | None = None,
) -> Outcome:
    """Train `model` through one stage and return it, adapters merged.

    `save(step, checkpoint)` is called every `checkpoint_every` steps, on rank 0, and on all ranks of a sharded model;
    `checkpoint.write(folder)` writes it now, `checkpoint.clone()` may be written while training goes on.
    `log(step, metrics)` is called on rank 0. Raises FloatingPointError when the loss is not finite or has diverged, and
    UserError when there is nothing to learn, nothing changes, or memory is too small.
    """
    with out_of_memory_explained(run.name):
        training = _Training(run, model, processor, dataset, resume)
        training.loop(save, log if run.rank == 0 else None)
        return training.finish()


class _Training:
    """A stage in training: model, optimiser, batches, and what a checkpoint holds beside weights and moments."""

    def __init__(self, run: StageRun, model: Any, processor: Any, dataset: FaceDataset, resume: Path | None) -> None:
        self.run, self.stage, self.device = run, run.stage, torch.device(run.device)
        self.model, self.processor = model if run.sharded else model.to(self.device), processor
        self.wrapper = optimizer.set_trainable(
            self.model, self.stage.trains, run.settings.train.lora, run.settings.seed
        )
        self.sharded: ShardedModel | None = None
        if run.sharded:
            self.sharded = ShardedModel(self.model, self.wrapper, self.device, bf16=run.precision == "bf16")
        self.parameters = ParameterMonitor(run, self.model)
        self.optimizer = optimizer.build_optimizer(self.model, self.stage, bf16=run.precision == "bf16")
        self.losses = LossMonitor(run.name, run.settings.train.divergence)
        self.reports: list[Tensor] = []  # of the steps since `log_every` last divided their number
        self.tokens = self.first = 0
        self.loss = math.nan
        self.spent_before: cost.Spent = {"seconds": 0.0, cost.CPU: 0.0, cost.GPU: 0.0}
        if resume is not None:
            self._resume(resume)
        optimizer.set_modes(self.model, self.stage.trains)
        self.loader = DataLoader(run, self.model, processor, dataset)
        self.step_loss = StepLoss(run, self.model, processor, dataset)
        self.loss_of = self.sharded.wrap_loss(self.step_loss) if self.sharded is not None else self.step_loss
        self.flops_per_token = self._flops_per_token(self.loader.sample(self.first))
        optimizer.set_modes(self.model, self.stage.trains)
        self.meter = cost.Meter(run.device, machine=run.local_rank == 0)
        self.throughput = Throughput(run, self.first, self.flops_per_token)

    def _resume(self, folder: Path) -> None:
        state = checkpoint.load(folder, self.model, self.optimizer, self.run.key, self.run.made_from)
        self.first = self.losses.checkpoint = int(state["step"])
        self.tokens = int(state["tokens"])
        self.spent_before = state["spent"]
        self.losses.load_state_dict(state.get("watch", {}))
        self.reports = [torch.tensor(report, device=self.device) for report in state.get("recent", ())]

    def _flops_per_token(self, batch: Batch) -> float:
        """Operations of a batch that is thrown away: counting takes other kernels, which differ in the last bits."""
        self.model.eval()  # normalisation statistics stay as they are
        with cost.operations() as counter:
            value = self.loss_of(batch)
            value.loss.backward()
        self.model.zero_grad(set_to_none=True)
        return float(counter.get_total_flops()) / max(self.step_loss.counts(value.report)["tokens"], 1)

    def loop(self, save: Save | None, log: Log | None) -> None:
        """All steps that are left."""
        train, first, last = self.run.settings.train, self.first, self.stage.steps
        savings = {"recompute": train.recompute, "compiled": train.compile}
        slow = self.run.precision == "bf16" and self.device.type == "cpu"
        with (
            optimizer.float32_attention(self.model, slow),
            optimizer.memory_savings(self.model, self.stage.trains, **savings),
        ):
            for step, batches in enumerate(prefetch(self.loader.batches, first, last), first):
                done = step + 1
                shows = done % self.run.log_every == 0 or done == last
                metrics = self._step(step, batches, norms=shows and (log is not None or self.run.sharded))
                if log is not None and shows:
                    log(done, self._metrics(done, metrics))
                if done % self.run.log_every == 0:
                    self.reports.clear()
                    self.meter.sample()
                if save is not None and done % train.checkpoint_every == 0 and done < last:
                    self._save(done, save)
        if first < last:
            self.parameters.check_changed()

    def _step(self, step: int, batches: list[Batch], *, norms: bool) -> dict[str, float]:
        """One step of the optimiser; its rates and gradient norms, those of single modules if asked."""
        run, trained = self.run, list(self.parameters.trained.values())
        # dropout of adapters; everything else is in the plan
        torch.manual_seed(run.settings.seed * 1_000_003 + step * 1_009 + run.rank)
        rate = self.stage.learning_rate * optimizer.schedule(self.stage, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        reports = []
        for batch in batches:
            value = self.loss_of(batch)
            value.loss.backward()
            reports.append(value.report)
        report = reduce_gradients(() if run.sharded else trained, torch.stack(reports).sum(0), run.world_size)
        optimizer.skip_unreached(self.optimizer, trained, run.world_size)
        if step == self.first:
            self.parameters.check_gradients()
        module_norms = self.parameters.norms() if norms else {}
        self.loss, norm = float(report[0]), clip(trained, self.stage.clip)
        self.losses.check(step + 1, self.loss, norm, partial(self.loader.image_ids, step))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.reports.append(report)
        self.tokens += self.step_loss.counts(report)["tokens"]
        rates = {
            f"learning_rate/{module}": rate * factor
            for module, factor in self.stage.rates.items()
            if getattr(self.stage.trains, module) != "frozen"
        }
        return {"learning_rate": rate, **rates, "grad_norm": norm, **module_norms}

    def _metrics(self, done: int, metrics: dict[str, float]) -> dict[str, float]:
        new = self.reports[self.throughput.done - done :]  # a resumed stage's clock runs from where it went on
        counts = self.step_loss.counts(torch.stack(new).sum(0))
        shown = {"images": len(new) * self.stage.batch_images, **{n: counts[n] for n in ("questions", "tokens")}}
        losses = self.step_loss.readable(torch.stack(self.reports).sum(0), len(self.reports))
        self.loss = losses["loss"]  # what a stage ends with is what was logged last, the mean since the log before
        metrics = {**losses, **metrics, **self.throughput.measure(done, shown)}
        if left_out := self.loader.sampler.left_out:
            metrics["questions_too_long"] = float(len(left_out))
        return metrics

    def _save(self, done: int, save: Save) -> None:
        run = self.run
        average_buffers(self.model, run.world_size)
        state = {
            "step": done,
            "tokens": self.tokens,
            "key": run.key,
            "stage": run.name,
            "spent": self._spent(),
            "watch": self.losses.state_dict(),
            "recent": [report.tolist() for report in self.reports],
            "made_from": dict(run.made_from),
        }
        if run.sharded or run.rank == 0:
            parts = {"rank": run.rank, "world_size": run.world_size} if run.sharded else {}
            save(done, Checkpoint.of(self.model, self.optimizer, state, **parts))
        self.losses.checkpoint = done

    def _spent(self) -> cost.Spent:
        return cost.add(self.spent_before, reduce_energy(self.meter.spent(), self.run.world_size, self.device))

    def finish(self) -> Outcome:
        """The trained model, gathered and merged."""
        run, stage, model, wrapper, device = self.run, self.stage, self.model, self.wrapper, self.device
        average_buffers(model, run.world_size)
        spent = self._spent()
        if self.sharded is not None:
            (model, wrapper), device = self.sharded.gather(), torch.device("cpu")
        adapter = None
        if wrapper is not None and (run.rank == 0 or not run.sharded):
            adapter = adapter_of(wrapper, stage.trains)
            encoded = self.processor.tokenizer("is there a face?", return_tensors="pt")
            probe = (encoded["input_ids"].to(device), encoded["attention_mask"].to(device))
            model = optimizer.merge(model, wrapper, probe)
        return Outcome(
            model.eval(),
            stage.steps,
            samples=stage.steps * stage.batch_images,
            tokens=self.tokens,
            flops=round(self.flops_per_token * self.tokens),
            resumed_from=self.first,
            final_loss=self.loss,
            spent=spent,
            adapter=adapter,
        )
