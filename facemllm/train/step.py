"""The training stages as steps: one for each entry of `train.stages`, from the model before it to a model directory."""

from __future__ import annotations

from typing import Any

from facemllm.core import digests, progress
from facemllm.core.step import Context, Outcome, Step
from facemllm.settings import Settings, Stage

_LAUNCH = {"launcher", "max_failures", "checkpoint_every", "storage", "min_workers", "divergence"}
_ECONOMY = {"feature_cache", "recompute", "micro_images", "row_tokens", "sharding", "compile"}
"""Of `train`, what decides nothing of what is learnt: whoever runs out of memory may change it and go on."""


_MANY_PASSES = 100


def stage_step(settings: Settings, stage: str) -> Step:
    """The step of one stage: named as the stage is, going on from the stage before it."""
    before = settings.train.before(stage)
    return Step(
        name=stage,
        module="facemllm.train.launch",
        sections=lambda s: _reads(s, stage),
        inputs={"conversations": "reformat"} | ({"model": before} if before else {}),
        work=lambda c: _work(c, stage),
        after=() if before else ("version",),
        engine_cache=True,
    )


def _reads(s: Settings, stage: str) -> dict[str, Any]:
    train = s.train.model_dump(exclude={"stages"} | _LAUNCH | _ECONOMY)
    # a map of face parts does not show what is held out
    reformat = s.reformat.model_dump(include={"held_out", "forms"})
    return {"train": train, "stage": s.stages()[stage].model_dump(), "model": s.model.model_dump(), **reformat}


def _work(c: Context, stage: str) -> Outcome:
    from facemllm.tables import open_table
    from facemllm.train.launch import train
    from facemllm.train.stage import write_lineage
    from facemllm.version import ledger

    table = open_table(c.path("conversations"))
    sources = table.sources
    ledger.require(c.settings, sources, "train")
    faces = sum(batch.num_rows for batch in table.batches(["image_id"], "train"))
    if note := many_passes(stage, c.settings.stages()[stage], faces):
        progress.event(note=note)
    base = c.model() if "model" in c.inputs else None
    result = train(
        stage,
        c.settings,
        conversations=c.path("conversations"),
        base=base,
        out=c.out,
        work=c.work,
        cache=c.settings.home / "cache",
        on_log=c.run.curve_logger() if c.run is not None else None,
        base_digest=c.inputs.get("model"),
    )
    write_lineage(c.out, stage, c.settings, c.inputs, sources, base)
    if c.run is not None:
        _show(c)
    resumed = f", resumed at step {result.resumed_from}" if result.resumed_from else ""
    figure = f"loss {result.final_loss:.3f} after {result.steps:,} steps{resumed}"
    return Outcome(digests.of_tree(c.out), figure, facts={"cost": result.cost, "resumed_from": result.resumed_from})


def many_passes(name: str, stage: Stage, faces: int) -> str:
    """What to tell a user whose stage goes over so few training faces again and again; nothing if it does not."""
    passes = stage.steps * stage.batch_images // max(faces, 1)
    if not faces or passes <= _MANY_PASSES:
        return ""
    fewer = max(1, _MANY_PASSES * faces // stage.batch_images)
    return (
        f"{stage.steps:,} steps go over {faces:,} training faces {passes:,} times, so they will be learnt by heart; "
        f"bring more, or save time with --set train.stages.{name}.steps={fewer} ({_MANY_PASSES} times)"
    )


def _show(c: Context) -> None:
    """Put on the stage's run what the model says now of a few fixed faces, and which relations the labels break."""
    from facemllm.scoring.figures import RELATIONS, SAMPLES, columns
    from facemllm.tables import open_table
    from facemllm.train.samples import audited_relations, sample_answers

    table = open_table(c.path("conversations"))
    c.run.log_table(SAMPLES, columns(sample_answers(c.settings, c.out, table)))
    if c.settings.model.knowledge.enabled:
        c.run.log_table(RELATIONS, columns(audited_relations(c.settings, table)))
