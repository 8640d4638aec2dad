"""The step `evaluate`: predictions and metrics on held-out identities."""

from __future__ import annotations

from facemllm.core import cost, digests
from facemllm.core.step import Context, Outcome, Step, section


def evaluate_step(last_stage: str) -> Step:
    """The step, of the model that the last training stage gives."""
    return Step(
        name="evaluate",
        module="facemllm.evaluate.run",
        sections=section("evaluate"),
        inputs={"model": last_stage, "conversations": "reformat"},
        work=_work,
        engine_cache=True,
    )


def _work(c: Context) -> Outcome:
    from facemllm.evaluate.run import evaluate
    from facemllm.tables import open_table
    from facemllm.version import ledger

    ledger.require(c.settings, open_table(c.path("conversations")).sources, "evaluate")
    device = cost.inference_device(c.settings)
    meter = cost.Meter(device)
    metrics = evaluate(c.settings, c.model(), c.inputs["model"], c.path("conversations"), c.out)
    spent = {"device": cost.device_name(device), "samples": metrics["n_images"], **meter.spent()}
    spent["peak_memory_bytes"] = cost.peak_memory_bytes(device)
    if c.run is not None:
        from facemllm.report import plots

        c.run.log_evaluation(metrics, c.out, plots.drawn(metrics))
    figure = f"mean balanced accuracy {metrics['closed_mean']['value']:.3f}"
    files = digests.of_each(c.out)
    return Outcome(digests.of_listing(files), figure, facts={"cost": cost.tidy(spent), "files": files})
