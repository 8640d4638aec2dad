"""`facemllm lineage`, `facemllm audit`, `facemllm promote notify`: what is behind a model, who decided, who is told."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from facemllm.cli.promotion import promote
from facemllm.errors import UserError
from facemllm.settings import Settings, load
from facemllm.workflow.options import Json, Profile, Result, Sets, command, say

audit = typer.Typer(invoke_without_command=True, help="Who decided, released and rolled back what, when.")


def lineage(
    settings: Settings,
    identifier: Annotated[
        str,
        typer.Argument(
            metavar="ID",
            help="A version or alias; any digest (its first six digits): of an answer's model, a result, a decision; "
            "an image_id; a subject_id or SOURCE:NAME; a source of the ledger.",
        ),
    ],
    up: Annotated[bool, typer.Option("--up", help="What it was made from (default for models and results).")] = False,
    down: Annotated[
        bool, typer.Option("--down", help="What was made from it (default for pictures, persons).")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="Fold nothing.")] = False,
    html: Annotated[Path | None, typer.Option(help="Page to write as well.")] = None,
) -> Result:
    """Walk from a served model to licences and commits, or from a picture or person to models and releases."""
    from facemllm.promote import lineage as chain

    found = chain.lineage(settings, identifier, "both" if up and down else "up" if up else "down" if down else None)
    graph = found.as_json()
    if html is not None:
        from facemllm.core.files import atomic_write
        from facemllm.report.graph_picture import page

        atomic_write(html, page(graph).encode())
    return graph, lambda: _show(graph, everything, html)


def _show(graph: dict[str, Any], everything: bool, html: Path | None) -> None:
    from rich.console import Console

    from facemllm.report.lineage import lines

    console = Console(width=None if sys.stdout.isatty() else 200)
    for line in lines(graph, console.width, everything):
        console.print(line, soft_wrap=True)
    if html is not None:
        console.print(str(html), style="dim", markup=False, soft_wrap=True)


@audit.callback()
def audit_list(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Only about this version, alias or digest.")] = None,
    profile: Profile = "laptop",
    set_: Sets = [],
    as_json: Json = False,
) -> None:
    """Who asked, decided, released and rolled back what, when, in place of what. Times in UTC."""
    if context.invoked_subcommand:
        return
    from facemllm.promote import audit as chain

    rows = chain.audit(load(profile, set_), model)
    say(as_json, {"statements": rows}, chain.as_text(rows))


@command(audit, "verify")
def audit_verify(settings: Settings) -> Result:
    """Check that the history of decisions only ever added: names the first commit that does not, and exits with 1."""
    from facemllm.promote import audit as chain

    facts = chain.verify(settings)
    if facts["stale"]:
        print(facts["stale"], file=sys.stderr)
    if not facts["commits"]:
        return facts, "nobody has asked for a decision yet"
    refused = f", {facts['refused']} of them count for nothing (facemllm audit)" if facts["refused"] else ""
    words = f"{facts['commits']:,} commits only ever added; {facts['statements']:,} statements{refused}"
    return facts, f"{words}; head {facts['head'][:12]}"


@command(promote, "notify")
def promote_notify(
    settings: Settings,
    expiring: Annotated[int, typer.Option(min=1, max=3650, help="Tell of approvals that end within so many days.")],
) -> Result:
    """Tell the receivers of promote.notify of approvals about to expire; for a cron job."""
    from facemllm.promote import notices

    receivers = settings.promote.notify
    if receivers.webhook is None and not receivers.email:
        raise UserError("nobody would hear of it: set promote.notify.webhook, or promote.notify.email and smtp")
    notified = notices.tell_expiring(settings, expiring)
    if failed := sum(not one["sent"] for one in notified):
        raise UserError(f"{failed} of {len(notified)} notices did not reach everybody; see the lines above")
    lines = [f"{one['name']} version {one['version']} is approved until {one['expires'][:10]}" for one in notified]
    return {"expiring": notified}, "\n".join(lines) or f"no approval ends within {expiring} days"
