"""The data half of `facemllm`: the ledger, faces in and out, annotation, questions, checks, versions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from facemllm.cli.options import By, Conversations, Faces, Json, Out, Profile, Reason, Sets, say
from facemllm.errors import UserError
from facemllm.settings import Source, load
from facemllm.tables import CONVERSATIONS, FACES, open_table

version = typer.Typer(no_args_is_help=True, help="Versions of the data.")

Annotated_ = Annotated[Path, typer.Argument(help="An annotated faces table.")]
Revision = Annotated[str, typer.Argument(help="A revision that `data record` gave, or its first digits.")]


def add_to(app: typer.Typer) -> None:
    """Give the commands of this module to the command line."""
    app.add_typer(version, name="version")
    app.command("ingest")(ingest_faces)
    app.command("render")(render_faces)
    app.command("import")(import_faces)
    app.command("forget")(forget_faces)
    app.command("ledger")(show_ledger)
    app.command("annotate")(annotate_faces)
    app.command("reformat")(reformat_faces)
    app.command("export")(export_conversations)
    app.command("validate")(validate_tables)


def _table_said(as_json: bool, manifest: Mapping[str, Any], out: Path) -> None:
    kept, refused = manifest["rows"], manifest["quarantined"]
    facts = {"read": kept + refused, "kept": kept, "quarantined": refused, "digest": manifest["digest"]}
    text = f"{out}: {kept + refused:,} rows read, {kept:,} kept, {refused:,} quarantined"
    text += f" ({out / 'quarantine.parquet'} says why)" * (refused > 0)
    say(as_json, facts, f"{text}, digest {manifest['digest'][:12]}")


def show_ledger(
    key: Annotated[str | None, typer.Argument(help="One source; default: all.")] = None,
    profile: Profile = "laptop",
    set_: Sets = [],
    as_json: Json = False,
) -> None:
    """What every source is, its licence, and what may be done with it."""
    from facemllm.version import ledger

    settings = load(profile, set_)
    if key is not None:
        ledger.require(settings, [key])
    rows = [row for row in ledger.entries(settings).values() if key in (None, row.key)]
    say(as_json, {"sources": [row.model_dump() for row in rows]}, ledger.as_text(rows))


def ingest_faces(out: Out, profile: Profile = "laptop", set_: Sets = [], as_json: Json = False) -> None:
    """Read the sources of the settings (`ingest.sources`) into one faces table."""
    from facemllm.ingest.run import ingest

    _table_said(as_json, ingest(load(profile, set_), out), out)


def render_faces(out: Out, profile: Profile = "laptop", set_: Sets = [], as_json: Json = False) -> None:
    """Draw synthetic heads with exact labels into a faces table."""
    from facemllm.ingest import run

    _table_said(as_json, run.render_faces(load(profile, set_), out), out)


def import_faces(
    source: Annotated[str, typer.Argument(help="Key of the source in the ledger, as `facemllm ledger` lists them.")],
    root: Annotated[Path, typer.Argument(help="Folder that holds the dataset in its native layout.")],
    out: Out,
    options: Annotated[list[str], typer.Option("--option", help="A reader's option: --option subset=compound")] = [],
    profile: Profile = "laptop",
    set_: Sets = [],
    as_json: Json = False,
) -> None:
    """Read a dataset in its native layout into a table; what cannot be used goes to quarantine, with the reason."""
    from facemllm.ingest.run import import_source

    given = {}
    for option in options:
        name, found, value = option.partition("=")
        if not found:
            raise UserError(f"--option {option}: expected NAME=VALUE, as in --option subset=compound")
        given[name] = value
    manifest = import_source(load(profile, set_), Source(name=source, root=str(root), options=given), out)
    _table_said(as_json, manifest, out)


def forget_faces(
    reason: Reason,
    image: Annotated[str | None, typer.Option(help="image_id of a picture, or its first digits.")] = None,
    subject: Annotated[str | None, typer.Option(help="subject_id, or SOURCE:NAME as the source names them.")] = None,
    by: By = None,
    profile: Profile = "laptop",
    set_: Sets = [],
    as_json: Json = False,
) -> None:
    """Delete a picture or a person everywhere, for good, and say which models have learnt from them."""
    from facemllm.forgetting import forget, render
    from facemllm.promote.approvals import person
    from facemllm.workflow.runs import exclusive

    settings = load(profile, set_)
    with exclusive(settings):
        report = forget(settings, image=image, subject=subject, reason=reason, by=person(by))
    say(as_json, report, render(report))


def annotate_faces(
    faces: Faces,
    out: Out = Path("data/annotated"),
    estimate: Annotated[bool, typer.Option(help="Only say what it would ask for and cost.")] = False,
    profile: Profile = "laptop",
    set_: Sets = [],
    as_json: Json = False,
) -> None:
    """Describe every face: captions and labels by the configured annotator."""
    from facemllm import annotate as annotation

    settings = load(profile, set_)
    if estimate:
        facts = annotation.estimate(settings, faces)
        say(as_json, facts, "\n".join(f"{name:<24}{value}" for name, value in facts.items()))
    else:
        _table_said(as_json, annotation.annotate(settings, faces, out), out)


def reformat_faces(
    faces: Faces,
    out: Out,
    profile: Profile = "laptop",
    set_: Sets = [],
    as_json: Json = False,
) -> None:
    """Turn labelled faces into conversations."""
    from facemllm.reformat.run import reformat

    manifest = reformat(load(profile, set_), faces, out)
    _table_said(as_json, manifest, out)
    asked = manifest["about"]["held_out_questions"]
    if silent := [name for name, count in asked.items() if not count]:
        text = "no face of validation or test has a label for it, so it is held out and never asked"
        typer.echo(f"warning: reformat.held_out {', '.join(silent)}: {text}", err=True)


def export_conversations(
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
    profile: Profile = "laptop",
    set_: Sets = [],
    as_json: Json = False,
) -> None:
    """Write conversations in the format of another tool: its training data, or its benchmark."""
    from facemllm.reformat.export import export

    told = export(load(profile, set_), conversations, out, format_, split)
    text = f"{out}: {told['entries']:,} entries of {told['kept']:,} conversations ({told['quarantined']:,} left out)"
    say(as_json, told, f"{text}; SOURCES.json says what may be done with them")


def validate_tables(
    annotated: Annotated_,
    conversations: Conversations,
    out: Annotated[Path, typer.Argument(help="Folder for the report.")] = Path("data/validation"),
    faces: Annotated[Path | None, typer.Option(help="The faces table before annotation.")] = None,
    profile: Profile = "laptop",
    set_: Sets = [],
    as_json: Json = False,
) -> None:
    """Check the tables and what each filter left of every group; exit 1 on a critical failure."""
    from facemllm.validate.run import validate

    verdict = validate(load(profile, set_), faces, annotated, conversations, out)
    report = out / "report.html"
    say(as_json, {"passed": verdict.passed, "report": str(report)}, f"{verdict.figure}: {report}")


@version.command("record")
def version_record(
    faces: Faces,
    conversations: Conversations,
    profile: Profile = "laptop",
    set_: Sets = [],
    as_json: Json = False,
) -> None:
    """Record both tables with DVC and print the revision."""
    from facemllm.version import record

    settings = load(profile, set_)
    tables = {
        "faces": open_table(faces, FACES).digest,
        "conversations": open_table(conversations, CONVERSATIONS).digest,
    }
    revision = record(settings, faces, conversations).sha
    say(as_json, {"revision": revision, **tables}, revision)


@version.command("restore")
def version_restore(
    revision: Revision,
    out: Out = Path("data/restored"),
    profile: Profile = "laptop",
    set_: Sets = [],
    as_json: Json = False,
) -> None:
    """Bring back the very bytes of a revision."""
    from facemllm.version import restore

    restore(load(profile, set_), revision, out)
    tables = {name: open_table(out / name).digest for name in ("faces", "conversations")}
    say(
        as_json, {"revision": revision, "out": str(out), **tables}, f"{out}: faces and conversations of {revision[:12]}"
    )


@version.command("log")
def version_log(profile: Profile = "laptop", set_: Sets = [], as_json: Json = False) -> None:
    """List the recorded revisions, newest first."""
    from facemllm.version import log, render_log

    entries = log(load(profile, set_))
    say(as_json, {"revisions": entries}, render_log(entries))


@version.command("diff")
def version_diff(
    old: Revision, new: Revision, profile: Profile = "laptop", set_: Sets = [], as_json: Json = False
) -> None:
    """Name the rows that two revisions do not share, and the columns that changed."""
    from facemllm.version import diff, render

    found = diff(load(profile, set_), old, new)
    say(as_json, found, render(found))
