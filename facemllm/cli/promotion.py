"""`facemllm promote ...`: decisions about model versions."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from facemllm.settings import Settings
from facemllm.workflow.options import By, Reason, Result, Version, command

promote = typer.Typer(no_args_is_help=True, help="Decisions of named persons about model versions.")


@command(promote, "request")
def promote_request(
    settings: Settings,
    version: Version,
    by: By = None,
    note: Annotated[str, typer.Option(help="What the deciding person should know.")] = "",
) -> Result:
    """Ask for a decision about a version."""
    from facemllm.promote import approvals

    facts = approvals.request(settings, version, approvals.person(by), note)
    return dict(facts), f"decision requested for version {version}"


@command(promote, "list")
def promote_list(settings: Settings) -> Result:
    """List registered versions with gate, decision and aliases."""
    from facemllm.promote import approvals

    rows = approvals.list_versions(settings)
    line = "{version:>4}  {digest:.12}  gate {gate:<8} {state:<9} {aliases}"
    return {"versions": rows}, "\n".join(line.format(**row) for row in rows) or "no version is registered yet"


@command(promote, "show")
def promote_show(settings: Settings, version: Version) -> Result:
    """Show one version: card, gate, decisions."""
    from facemllm.promote import approvals

    facts = approvals.show(settings, version)
    return facts, json.dumps(facts, indent=2)


@command(promote, "approve")
def promote_approve(settings: Settings, version: Version, reason: Reason, by: By = None) -> Result:
    """Approve a version: your name, bound to the model's digest."""
    from facemllm.promote import approvals

    return _decided(approvals.decide(settings, version, "approved", by, reason))


@command(promote, "reject")
def promote_reject(settings: Settings, version: Version, reason: Reason, by: By = None) -> Result:
    """Reject a version: it cannot be released."""
    from facemllm.promote import approvals, registry

    decision = approvals.decide(settings, version, "rejected", by, reason)
    champion = registry.champion(settings)
    if champion is not None and champion.version == decision.version:
        print("it still serves in production: release another, or `facemllm services down production`", file=sys.stderr)
    return _decided(decision)


def _decided(decision: Any) -> Result:
    words = f"{decision.decision} by {decision.by}: {decision.reason}"
    return asdict(decision), f"version {decision.version} ({decision.digest[:12]}) {words}"
