"""The steps that make things, from faces to an evaluated model: each calls the plain function of its room."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from facemllm.core import cost, digests
from facemllm.core.step import Context, Outcome, write_json
from facemllm.errors import UserError
from facemllm.settings import Settings
from facemllm.tables import open_table


def what_ingest_reads(settings: Settings) -> dict[str, Any]:
    """What the faces depend on beside code: the settings, the sources' files and ledger rows, and who was forgotten.

    Raises UserError when a source is not in the ledger or withdrawn: then what was made of it is not used again.
    """
    from facemllm.ingest.importing import fingerprint
    from facemllm.version import ledger
    from facemllm.version.tombstones import Tombstones

    sources = settings.ingest.sources
    names = sorted({source.name for source in sources})
    ledger.require(settings, names)
    return {
        "ingest": settings.ingest.model_dump(exclude={"workers", "ledger"}),
        "files": [fingerprint(source) for source in sources],
        "uses": ledger.allowed(settings, names),
        "forgotten": Tombstones.of(settings).digest,
    }


def what_annotate_reads(settings: Settings) -> dict[str, Any]:
    """What annotated faces depend on beside code and faces: the annotator and what shapes its answers."""
    from facemllm.annotate.run import reads

    return {"annotate": reads(settings)}


def what_validate_reads(settings: Settings) -> dict[str, Any]:
    """What the report depends on beside code and tables: the limits, and the ledger that it quotes."""
    from facemllm.version import ledger

    rows = {key: row.model_dump() for key, row in ledger.entries(settings).items()}
    return {"validate": settings.validate.model_dump(), "ledger": rows}


def ingest(c: Context) -> Outcome:
    """Faces of the configured sources, or those of a recorded revision."""
    from facemllm.ingest.run import ingest

    if c.settings.version.restore:
        return _restored(c, "faces")
    return _table(ingest(c.settings, c.out), "faces")


def annotate(c: Context) -> Outcome:
    """Faces described by the configured annotator."""
    from facemllm.annotate import annotate

    if c.settings.version.restore:
        return _restored(c, "faces")
    return _table(annotate(c.settings, c.path("faces"), c.out), "faces annotated")


def reformat(c: Context) -> Outcome:
    """Conversations about annotated faces."""
    from facemllm.reformat.run import reformat

    if c.settings.version.restore:
        return _restored(c, "conversations")
    manifest = reformat(c.settings, c.path("annotated"), c.out)
    return _table(manifest, "conversations")


def validate(c: Context) -> Outcome:
    """The report of the checks on all tables; a critical failure raises UserError."""
    from facemllm.validate.run import validate

    verdict = validate(c.settings, c.path("faces"), c.path("annotated"), c.path("conversations"), c.out)
    if c.run is not None:
        c.run.log_artifacts(c.out, "validation")
    return Outcome(digests.of_tree(c.out), verdict.figure)


def version(c: Context) -> Outcome:
    """Both tables as a revision of the data repository."""
    from facemllm.version import record

    revision = record(c.settings, c.path("annotated"), c.path("conversations"))
    digest = write_json(c.out, "revision.json", {"revision": revision.sha, **c.inputs})
    return Outcome(digest, f"revision {revision.sha[:12]}", output=revision.sha)


def still_recorded(settings: Settings, record: Mapping[str, Any]) -> bool:
    """Whether a remembered revision is still in the data repository."""
    from facemllm.version import has

    return has(settings, record["output"])


def train(stage: str) -> Callable[[Context], Outcome]:
    """The work of one training stage: from the model before it, if there is one, to a model directory."""

    def work(c: Context) -> Outcome:
        from facemllm.train.launch import train
        from facemllm.train.order import write_lineage
        from facemllm.version import ledger

        sources = open_table(c.path("conversations")).sources
        ledger.require(c.settings, sources, "train")
        base = _whole_model(c) if "model" in c.inputs else None
        on_log = c.run.curve_logger() if c.run is not None else None
        result = train(
            stage,
            c.settings,
            conversations=c.path("conversations"),
            base=base,
            out=c.out,
            work=c.work,
            cache=c.settings.home / "cache",
            on_log=on_log,
        )
        write_lineage(c.out, stage, c.settings, c.inputs, sources, base)
        if c.run is not None:
            _show(c)
        resumed = f", resumed at step {result.resumed_from}" if result.resumed_from else ""
        figure = f"loss {result.final_loss:.3f} after {result.steps:,} steps{resumed}"
        return Outcome(digests.of_tree(c.out), figure, facts={"cost": result.cost, "resumed_from": result.resumed_from})

    return work


def _show(c: Context) -> None:
    """Put on the stage's run what the model says now of a few fixed faces, and which relations the labels break."""
    from facemllm.report.figures import RELATIONS, SAMPLES, columns
    from facemllm.train.audited import audited_relations
    from facemllm.train.samples import sample_answers

    table = open_table(c.path("conversations"))
    c.run.log_table(SAMPLES, columns(sample_answers(c.settings, c.out, table)))
    if c.settings.model.knowledge.enabled:
        c.run.log_table(RELATIONS, columns(audited_relations(c.settings, table)))


def evaluate(c: Context) -> Outcome:
    """Predictions and metrics on held-out identities."""
    from facemllm.evaluate.run import evaluate
    from facemllm.version import ledger

    ledger.require(c.settings, open_table(c.path("conversations")).sources, "evaluate")
    device = cost.inference_device(c.settings)
    meter = cost.Meter(device)
    metrics = evaluate(c.settings, _whole_model(c), c.inputs["model"], c.path("conversations"), c.out)
    spent = {"device": cost.device_name(device), "samples": metrics["n_images"], **meter.spent()}
    spent["peak_memory_bytes"] = cost.peak_memory_bytes(device)
    if c.run is not None:
        c.run.log_evaluation(metrics, c.out)
    mean = metrics["closed_mean"]
    figure = f"mean balanced accuracy {mean['value']:.3f}"
    return Outcome(digests.of_tree(c.out), figure, facts={"cost": cost.tidy(spent)})


def _table(manifest: Mapping[str, Any], what: str) -> Outcome:
    refused = manifest.get("quarantined", 0)
    figure = f"{manifest['rows']:,} {what}" + (f", {refused} quarantined" if refused else "")
    return Outcome(manifest["digest"], figure)


def _restored(c: Context, name: str) -> Outcome:
    """A table of the recorded revision that the settings ask for, in place of making it."""
    from facemllm.version import restore

    revision = str(c.settings.version.restore)
    folder = c.work / "restored"
    if folder.exists():
        shutil.rmtree(folder)
    restore(c.settings, revision, folder)
    (folder / name).rename(c.out)
    manifest = open_table(c.out).manifest
    return Outcome(manifest["digest"], f"{manifest['rows']:,} {name} restored from {revision[:12]}")


def _whole_model(c: Context) -> Path:
    """Folder of the input model. Raises UserError when its bytes are no longer those of its digest."""
    path = c.path("model")
    if digests.of_tree(path) != c.inputs["model"]:
        raise UserError(f"{path}: the model's bytes have changed since it was made; remove that folder and run again")
    return path
