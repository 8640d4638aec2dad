"""`facemllm promote ...`: signed decisions about model versions, and going back to a former one."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated, Any, Literal

import typer

from facemllm.settings import Settings
from facemllm.workflow.options import PassphraseFd, Reason, Result, Version, command

promote = typer.Typer(no_args_is_help=True, help="Signed decisions about model versions.")

Verdict = Literal["approve", "reject", "revoke"]
By = Annotated[
    str | None, typer.Option("--by", help="Whose key signs; default: the only fitting one here, else git's user.name.")
]
Key = Annotated[str | None, typer.Option("--key", help="Id of the key that signs, or its first digits (8 or more).")]
Role = Annotated[str | None, typer.Option("--role", help="The role in which to sign, where the key has several.")]


@command(promote, "request")
def promote_request(
    settings: Settings,
    version: Version,
    note: Annotated[str, typer.Option(help="What the deciding person should know.")] = "",
    by: By = None,
    key: Key = None,
    passphrase_fd: PassphraseFd = None,
) -> Result:
    """Collect what a decision about a version stands on, and ask for one."""
    from facemllm.promote import decide

    made = decide.request(settings, version, _who(by, key, None, passphrase_fd), note)
    return _facts(made), f"{made.person} asks for a decision on version {version}, bundle {made.bundle[:12]}"


@command(promote, "list")
def promote_list(settings: Settings) -> Result:
    """List registered versions: gate, decision, and which one is in production since when."""
    from facemllm.promote import overview

    rows, notes = overview.list_versions(settings)

    def show() -> None:
        from facemllm.report.decision import versions_table

        _print(versions_table(rows) if rows else "no version is registered yet")
        for note in notes:
            print(f"warning: {note}", file=sys.stderr)

    return {"versions": rows, "warnings": notes}, show


@command(promote, "show")
def promote_show(settings: Settings, version: Version) -> Result:
    """Show one version: what a decision stands on, what is in force, and who said what."""
    from facemllm.promote import overview

    facts = overview.show(settings, version)

    def show() -> None:
        from facemllm.report.decision import version_shown

        _print(*version_shown(facts))

    return facts, show


def _decision(verdict: Verdict, doc: str) -> None:
    """Add the command by which a person says this of a version."""

    def work(
        settings: Settings,
        version: Version,
        reason: Reason,
        by: By = None,
        key: Key = None,
        role: Role = None,
        passphrase_fd: PassphraseFd = None,
    ) -> Result:
        return _decide(settings, version, verdict, reason, _who(by, key, role, passphrase_fd))

    work.__doc__ = doc
    command(promote, verdict)(work)


_decision("approve", "Sign an approval of a version: of its very bytes, and of what `promote show` says of them.")
_decision("reject", "Sign a rejection of a version: it cannot be released.")
_decision("revoke", "Take an approval back: a server that serves the version leaves service within a minute.")


@command(promote, "rollback")
def promote_rollback(
    settings: Settings,
    to: Annotated[str | None, typer.Option("--to", help="Version to go back to; default: the one before.")] = None,
    reason: Annotated[str, typer.Option(help="Why, in a sentence.")] = "",
) -> Result:
    """Put the former version, or another one, into production again, if it is still approved."""
    from facemllm.serve import release

    version = to if to is not None else str(release.former(settings).version)
    endpoint = release.switch(settings, version, "rollback", " ".join(reason.split()))
    return {"version": version, **asdict(endpoint)}, f"version {version} serves in production at {endpoint.url}"


@command(promote, "reconcile")
def promote_reconcile(settings: Settings) -> Result:
    """Release what was approved and does not serve; nothing where all is as it was decided (for a CronJob)."""
    from facemllm.serve import reconcile

    due, endpoint = reconcile.reconcile(settings)
    if due is None or endpoint is None:
        return {"released": None}, "what was decided serves; nothing to do"
    facts = {"released": due.digest, "why": due.why, **asdict(endpoint)}
    return facts, f"model {due.digest[:12]} ({due.why}) serves in production at {endpoint.url}"


def _decide(settings: Settings, version: str, verdict: Verdict, reason: str, who: Any) -> Result:
    from facemllm.promote import decide, overview

    made = decide.decide(settings, version, verdict, reason, who)
    past = {"approve": "approved", "reject": "rejected", "revoke": "revoked"}[verdict]
    message = f"version {version} ({made.model[:12]}) {past} by {made.person} as {made.role}: {made.reason}"
    state = decide.state(settings, version)
    if verdict == "approve" and state != "approved":
        missing = overview.show(settings, version)["missing"]
        message += f"\nstill to sign: {', '.join(f'{count} {role}' for role, count in missing.items())}"
    if verdict != "approve" and _in_production(settings, made.model):
        last = "its server leaves service within a minute"
        print(f"this version is in production: {last}; release another, or `promote rollback`", file=sys.stderr)
    return {**_facts(made), "state": state}, message


def _in_production(settings: Settings, model: str) -> bool:
    from facemllm.promote import releases

    now = releases.newest(settings)
    return now is not None and now.model == model


def _who(person: str | None, key: str | None, role: str | None, passphrase_fd: int | None) -> Any:
    from facemllm.promote.decide import Who
    from facemllm.signing.keys import passphrase_from

    return Who(person, key, role, passphrase_from(passphrase_fd))


def _facts(statement: Any) -> dict[str, Any]:
    from facemllm.signing.canonical import time_text

    facts = asdict(statement)
    for name in ("issued", "expires"):
        facts[name] = facts[name] and time_text(facts[name])
    return facts


def _print(*parts: Any) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    for part in parts:
        console.print(part)
