"""The data half of `facemllm`: the ledger, faces in and out, annotation, questions, checks, versions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow.parquet as pq
import typer

from facemllm.errors import UserError
from facemllm.settings import Settings
from facemllm.settings.data import Source
from facemllm.tables import CONVERSATIONS, FACES, QUARANTINE, open_table
from facemllm.workflow.options import By, Conversations, Faces, Out, Reason, Result, app, command

version = typer.Typer(no_args_is_help=True, help="Versions of the data.")

Revision = Annotated[str, typer.Argument(help="A revision that `data record` gave, or its first digits.")]


def _table(manifest: Mapping[str, Any], out: Path) -> Result:
    kept, refused = manifest["rows"], manifest["quarantined"]
    facts = {"read": kept + refused, "kept": kept, "quarantined": refused, "digest": manifest["digest"]}
    text = f"{out}: {kept + refused:,} rows read, {kept:,} kept, {refused:,} quarantined"
    text += f" ({out / 'quarantine.parquet'} says why)" * (refused > 0)
    return facts, "\n  ".join((f"{text}, digest {manifest['digest'][:12]}", *_reasons(out, refused)))


def _reasons(out: Path, refused: int) -> list[str]:
    """The three commonest reasons in a table's quarantine, with how many rows each."""
    if not refused:
        return []
    counted = pq.read_table(out / QUARANTINE, columns=["reason"])["reason"].value_counts().to_pylist()
    commonest = sorted(counted, key=lambda one: (-one["counts"], one["values"]))[:3]
    return [f"{one['counts']:,}: {one['values'][:200]}" for one in commonest]


@command(app, "ingest")
def ingest(settings: Settings, out: Out) -> Result:
    """Read the sources of the settings (`ingest.sources`) into one faces table."""
    from facemllm.ingest import run

    return _table(run.ingest(settings, out), out)


@command(app, "render")
def render(settings: Settings, out: Out) -> Result:
    """Draw synthetic heads with exact labels into a faces table."""
    from facemllm.ingest import run

    return _table(run.ingest(settings, out, [run.RENDER]), out)


@command(app, "import")
def import_faces(
    settings: Settings,
    source: Annotated[str, typer.Argument(help="Key of the source in the ledger, as `facemllm ledger` lists them.")],
    root: Annotated[Path, typer.Argument(help="Folder that holds the dataset in its native layout.")],
    out: Out,
    options: Annotated[list[str], typer.Option("--option", help="A reader's option: --option subset=compound")] = [],
) -> Result:
    """Read a dataset in its native layout into a table; what cannot be used goes to quarantine, with the reason."""
    from facemllm.ingest.run import import_source
    from facemllm.serve.asked.policy import identifies

    given = {}
    for option in options:
        name, found, value = option.partition("=")
        if not found:
            raise UserError(f"--option {option}: expected NAME=VALUE, as in --option subset=compound")
        given[name] = value
    return _table(import_source(settings, Source(name=source, root=str(root), options=given), out, identifies), out)


@command(app, "forget")
def forget(
    settings: Settings,
    reason: Reason,
    image: Annotated[str | None, typer.Option(help="image_id of a picture, or its first digits.")] = None,
    subject: Annotated[str | None, typer.Option(help="subject_id, or SOURCE:NAME as the source names them.")] = None,
    by: By = None,
) -> Result:
    """Delete a picture or a person everywhere, for good, and say which models have learnt from them."""
    from facemllm.core import claims
    from facemllm.forgetting import erasing
    from facemllm.signing.local import git_name
    from facemllm.workflow.runs import exclusive

    with exclusive(settings), claims.alone(settings.home):
        report = erasing.forget(
            settings, image=image, subject=subject, reason=reason, by=by if by is not None else git_name()
        )
    return report, erasing.render(report)


@command(app, "ledger")
def show_ledger(
    settings: Settings, key: Annotated[str | None, typer.Argument(help="One source; default: all.")] = None
) -> Result:
    """What every source is, its licence, and what may be done with it."""
    from facemllm.version import ledger

    if key is not None:
        ledger.require(settings, [key])
    rows = [row for row in ledger.entries(settings).values() if key in (None, row.key)]
    return {"sources": [row.model_dump() for row in rows]}, ledger.as_text(rows)


@command(app, "annotate")
def annotate(
    settings: Settings,
    faces: Faces,
    out: Out = Path("data/annotated"),
    estimate: Annotated[bool, typer.Option(help="Only say what it would ask for and cost.")] = False,
) -> Result:
    """Describe every face: captions and labels by the configured annotator."""
    from facemllm.annotate import describer, run

    if estimate:
        facts = describer.estimate(settings, faces)
        return facts, "\n".join(f"{name:<24}{value}" for name, value in facts.items())
    return _table(run.annotate(settings, faces, out), out)


@command(app, "reformat")
def reformat(settings: Settings, faces: Faces, out: Out) -> Result:
    """Turn labelled faces into conversations."""
    from facemllm.reformat import run as reformatting

    manifest = reformatting.reformat(settings, faces, out)
    facts, words = _table(manifest, out)
    asked = manifest["about"]["held_out_questions"]
    if silent := [name for name, count in asked.items() if not count]:
        text = "no face of validation or test has a label for it, so it is held out and never asked"
        typer.echo(f"warning: reformat.held_out {', '.join(silent)}: {text}", err=True)
    return facts, words


@command(app, "export")
def export(
    settings: Settings,
    conversations: Conversations,
    out: Out,
    format_: Annotated[
        Literal["llava", "sharegpt", "trl", "facebench", "facexbench"],
        typer.Option("--format", help="A trainer's format, or a benchmark's."),
    ],
    split: Annotated[
        Literal["train", "validation", "test"] | None,
        typer.Option(help="Default: train for a trainer, test for a benchmark."),
    ] = None,
) -> Result:
    """Write conversations in the format of another tool: its training data, or its benchmark."""
    from facemllm.reformat import export as exports

    facts = exports.export(settings, conversations, out, format_, split)
    text = f"{out}: {facts['entries']:,} entries of {facts['kept']:,} conversations ({facts['quarantined']:,} left out)"
    return facts, f"{text}; SOURCES.json says what may be done with them"


@command(app, "validate")
def validate(
    settings: Settings,
    annotated: Annotated[Path, typer.Argument(help="An annotated faces table.")],
    conversations: Conversations,
    out: Annotated[Path, typer.Argument(help="Folder for the report.")] = Path("data/validation"),
    faces: Annotated[Path | None, typer.Option(help="The faces table before annotation.")] = None,
) -> Result:
    """Check the tables and what each filter left of every group; exit 1 on a critical failure."""
    from facemllm.validate import run as validation

    verdict = validation.validate(settings, faces, annotated, conversations, out)
    report = out / "report.html"
    return {"passed": verdict.passed, "report": str(report)}, f"{verdict.figure}: {report}"


@command(version, "record")
def version_record(settings: Settings, faces: Faces, conversations: Conversations) -> Result:
    """Record both tables with DVC and print the revision."""
    from facemllm.version.record import record

    tables = {
        "faces": open_table(faces, FACES).digest,
        "conversations": open_table(conversations, CONVERSATIONS).digest,
    }
    revision = record(settings, faces, conversations).sha
    return {"revision": revision, **tables}, revision


@command(version, "restore")
def version_restore(settings: Settings, revision: Revision, out: Out = Path("data/restored")) -> Result:
    """Bring back the very bytes of a revision."""
    from facemllm.version.record import restore

    restore(settings, revision, out)
    tables = {name: open_table(out / name).digest for name in ("faces", "conversations")}
    facts = {"revision": revision, "out": str(out), **tables}
    return facts, f"{out}: faces and conversations of {revision[:12]}"


@command(version, "log")
def version_log(settings: Settings) -> Result:
    """List the recorded revisions, newest first."""
    from facemllm.version.record import log, render_log

    entries = log(settings)
    return {"revisions": entries}, render_log(entries)


@command(version, "diff")
def version_diff(settings: Settings, old: Revision, new: Revision) -> Result:
    """Name the rows that two revisions do not share, and the columns that changed."""
    from facemllm.version.record import diff, render_diff

    found = diff(settings, old, new)
    return found, render_diff(found)
