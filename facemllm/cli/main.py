"""`facemllm`: every step and every decision as a command.

Exit codes: 0 done; 1 refused or failed, one line on standard error says why; 2 wrong usage. `--json` prints one JSON
object on standard output. Heavy libraries are imported by the command that needs them.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from facemllm.cli import data as cli_data
from facemllm.cli import measure as cli_measure
from facemllm.cli.options import By, Json, Profile, Reason, Sets, Version, say
from facemllm.core import digests
from facemllm.errors import TOLD, UserError, told
from facemllm.settings import Settings, load
from facemllm.workflow.runs import exclusive

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Face-MLLM Workflow, step by step."
)
promote = typer.Typer(no_args_is_help=True, help="Decisions of named persons about model versions.")
services_app = typer.Typer(no_args_is_help=True, help="Local servers: MLflow, Ray, staging, production.")
cli_data.add_to(app)
cli_measure.add_to(app)
app.add_typer(promote, name="promote")
app.add_typer(services_app, name="services")


def guarded(command: typer.Typer) -> None:
    """Run a command line: what a user can mend becomes one line on standard error and exit code 1."""
    for variable in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "DVC_NO_ANALYTICS", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(variable, "true")
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        command()
    except TOLD as error:
        print(f"error: {told(error)}", file=sys.stderr)
        raise SystemExit(1) from None


def main() -> None:
    """Entry point of the `facemllm` command."""
    guarded(app)


@app.command()
def train(
    stage: Annotated[str, typer.Argument(help="Name of a stage in train.stages.")],
    conversations: Annotated[
        str, typer.Option(help="Digest of a conversations table in the store; default: this profile's.")
    ] = "",
    model: Annotated[str, typer.Option(help="Digest of the model to start from; default: the previous stage's.")] = "",
    profile: Profile = "laptop",
    set_: Sets = [],
    as_json: Json = False,
) -> None:
    """Train one stage; what came before it is recalled from the store."""
    from facemllm.workflow import runner as workflow

    settings = load(profile, set_)
    if stage not in settings.stages():
        raise UserError(f"no stage '{stage}'; the stages are {', '.join(settings.stages())}")
    with exclusive(settings):
        digest = workflow.execute(stage, settings, **_inputs(settings, stage, conversations=conversations, model=model))
    say(as_json, {"digest": digest, "path": str(settings.home / "store" / digest)}, digest)


def _inputs(settings: Settings, name: str, **given: str) -> dict[str, str]:
    """Inputs of a step: those given, the rest as remembered for these settings."""
    from facemllm.workflow import runner as workflow
    from facemllm.workflow.steps import steps

    records = workflow.recall_all(settings)
    values = {}
    for key, source in steps(settings)[name].inputs.items():
        if not given.get(key) and source not in records:
            raise UserError(f"{name} needs the result of '{source}'; run that first, or give --{key} DIGEST")
        values[key] = given.get(key) or str(records[source]["output"])
    return values


@promote.command("request")
def promote_request(
    version: Version,
    by: By = None,
    note: Annotated[str, typer.Option(help="What the deciding person should know.")] = "",
    profile: Profile = "laptop",
    set_: Sets = [],
    as_json: Json = False,
) -> None:
    """Ask for a decision about a version."""
    from facemllm.promote import approvals

    facts = approvals.request(load(profile, set_), version, approvals.person(by), note)
    say(as_json, dict(facts), f"decision requested for version {version}")


@promote.command("list")
def promote_list(profile: Profile = "laptop", set_: Sets = [], as_json: Json = False) -> None:
    """List registered versions with gate, decision and aliases."""
    from facemllm.promote import approvals

    rows = approvals.list_versions(load(profile, set_))
    text = "\n".join(
        f"{r['version']:>4}  {r['digest'][:12]}  gate {r['gate']:<8} {r['state']:<9} {r['aliases']}" for r in rows
    )
    say(as_json, {"versions": rows}, text or "no version is registered yet")


@promote.command("show")
def promote_show(version: Version, profile: Profile = "laptop", set_: Sets = [], as_json: Json = False) -> None:
    """Show one version: card, gate, decisions."""
    from facemllm.promote import approvals

    facts = approvals.show(load(profile, set_), version)
    say(as_json, facts, json.dumps(facts, indent=2))


@promote.command("approve")
def promote_approve(
    version: Version,
    reason: Reason,
    by: By = None,
    profile: Profile = "laptop",
    set_: Sets = [],
    as_json: Json = False,
) -> None:
    """Approve a version: your name, bound to the model's digest."""
    from facemllm.promote import approvals

    decision = approvals.approve(load(profile, set_), version, by, reason)
    _decided(as_json, decision)


@promote.command("reject")
def promote_reject(
    version: Version,
    reason: Reason,
    by: By = None,
    profile: Profile = "laptop",
    set_: Sets = [],
    as_json: Json = False,
) -> None:
    """Reject a version: it cannot be released."""
    from facemllm.promote import approvals, registry

    settings = load(profile, set_)
    decision = approvals.reject(settings, version, by, reason)
    _decided(as_json, decision)
    champion = registry.champion(settings)
    if champion is not None and champion.version == decision.version:
        print("it still serves in production: release another, or `facemllm services down production`", file=sys.stderr)


def _decided(as_json: bool, decision: Any) -> None:
    text = (
        f"version {decision.version} ({decision.digest[:12]}) {decision.decision} by {decision.by}: {decision.reason}"
    )
    say(as_json, asdict(decision), text)


@app.command()
def serve(
    model: Annotated[Path, typer.Argument(help="A model directory.")],
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 18082,
    profile: Profile = "laptop",
    set_: Sets = [],
) -> None:
    """Serve a model directory with KServe in the foreground, on loopback."""
    from facemllm.core.servers import model_server
    from facemllm.serve import server

    if not model.is_dir():
        raise UserError(f"{model} is not a model directory")
    service = model_server(load(profile, set_), "staging", model, digests.of_tree(model), "")
    raise SystemExit(server.main([*service.command[3:], "--port", str(port)]))


@app.command()
def deploy(version: Version, profile: Profile = "laptop", set_: Sets = [], as_json: Json = False) -> None:
    """Put a registered version into staging. Production is `pipeline.py release VERSION`."""
    from facemllm.workflow import runner as workflow

    settings = load(profile, set_)
    with exclusive(settings):
        url = workflow.execute("deploy", settings, version=version)
    say(as_json, {"version": version, "endpoint": url}, url)


@app.command()
def lineage(
    identifier: Annotated[str, typer.Argument(help="Model version, alias, or any digest (its first digits).")],
    profile: Profile = "laptop",
    set_: Sets = [],
    as_json: Json = False,
) -> None:
    """Walk the chain behind a served model, a checkpoint or a table."""
    from facemllm.promote import lineage as chain

    links = chain.lineage(load(profile, set_), identifier)
    if as_json:
        print(json.dumps({"links": links}))
    else:
        chain.show(links)


@services_app.command("up")
def services_up(
    names: Annotated[list[str] | None, typer.Argument(help="mlflow or ray; default: mlflow.")] = None,
    profile: Profile = "laptop",
    set_: Sets = [],
) -> None:
    """Start local servers, or adopt those that run."""
    from facemllm.core import services

    settings = load(profile, set_)
    for name in names or ["mlflow"]:
        if name not in ("mlflow", "ray"):
            raise UserError(
                f"{name}: models are served by `facemllm deploy` and `pipeline.py release`, which check them"
            )
        print(services.up(settings, name).url)


@services_app.command("status")
def services_status(profile: Profile = "laptop", set_: Sets = [], as_json: Json = False) -> None:
    """Tell which local servers run."""
    from facemllm.core import services

    rows = [asdict(row) for row in services.status(load(profile, set_))]
    text = "\n".join("  ".join(f"{value!s:<12}" for value in row.values()) for row in rows)
    say(as_json, {"services": rows}, text)


@services_app.command("down")
def services_down(
    names: Annotated[list[str] | None, typer.Argument(help="Default: all.")] = None,
    profile: Profile = "laptop",
    set_: Sets = [],
) -> None:
    """Stop local servers; none of their processes is left."""
    from facemllm.core import services

    services.down(load(profile, set_), names)


if __name__ == "__main__":
    main()
