"""The commands of `pipeline.py` that speak to a cluster: compile, submit, status, retry, schedule."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster import runs, schedules
from cluster.client import Api, connect
from cluster.specification import NAME, specification, write_specification
from facemllm.errors import UserError, one_line
from facemllm.settings import Settings
from facemllm.workflow.cron import described
from facemllm.workflow.options import Json, Profile, Sets, say
from facemllm.workflow.pods import launches

app = typer.Typer(add_completion=False)

Endpoint = Annotated[
    str | None,
    typer.Option(envvar="KF_PIPELINES_ENDPOINT", help="The KFP API, as https://HOST/pipeline; in a pod its cluster's."),
]
Namespace = Annotated[
    str | None, typer.Option(envvar="KFP_NAMESPACE", help="Namespace of the run, where KFP serves many users.")
]
Ca = Annotated[
    str | None, typer.Option("--ca", envvar="KFP_CA_BUNDLE", help="PEM bundle that the API's certificate is signed by.")
]
Account = Annotated[
    str | None,
    typer.Option(
        help="Service account the pods run as; default: cluster.account, launcher_account or release_account."
    ),
]
Experiment = Annotated[str | None, typer.Option(help="KFP experiment; default: `tracking.experiment`.")]
RunId = Annotated[str, typer.Argument(help="Id of the run, as `submit` prints it.")]
Follow = Annotated[bool, typer.Option("--follow", help="Tell each step until the run has ended; write summary.json.")]


def _account(settings: Settings, given: str | None, release: bool = False) -> str | None:
    """The account of a run's pods. Raises UserError for one given that is not the one that may start RayJobs, or change
    production, where the run does."""
    known = settings.cluster
    if release and settings.serve.target != "local":
        needed, key, what = known.release_account, "release_account", "changes production in KServe"
    elif not release and launches(settings):
        needed, key, what = known.launcher_account, "launcher_account", "starts RayJobs"
    else:
        return given or known.account
    if given not in (None, needed):
        may = f"which cluster.{key}, {needed}, may; leave it out, or set cluster.{key}={given}"
        raise UserError(f"--service-account {given}: this run {what}, {may}")
    return needed


def _note(text: str) -> None:
    """Say something that is no result."""
    print(text, file=sys.stderr, flush=True)


@app.command()
def compile(
    out: Annotated[Path, typer.Argument(help="File to write.")] = Path("face-mllm.pipeline.yaml"),
    profile: Profile = "laptop",
    set_: Sets = [],
    release: Annotated[bool, typer.Option("--release", help="The pipeline that releases an approved version.")] = False,
) -> None:
    """Write the KFP specification for a cluster."""
    write_specification(profile, set_, out, release)
    print(out)


@app.command()
def submit(
    endpoint: Endpoint = None,
    profile: Profile = "laptop",
    set_: Sets = [],
    name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    release: Annotated[str | None, typer.Option(help="Release this approved version instead.")] = None,
    namespace: Namespace = None,
    experiment: Experiment = None,
    service_account: Account = None,
    ca: Ca = None,
    follow: Follow = False,
    as_json: Json = False,
) -> None:
    """Run the pipeline on a cluster, up to the request for approval; or release an approved version there."""
    if release is not None and not re.fullmatch(r"[vV]?[1-9][0-9]*|@?[A-Za-z][A-Za-z0-9_-]*", release):
        raise UserError(f"--release {release!r}: give the number of a version, as `facemllm promote list` tells it")
    with specification(profile, set_, release is not None) as (settings, file):
        api = connect(endpoint, namespace, ca)
        run_id = runs.submit(
            api,
            file,
            name=name or (f"release {release}, {profile}" if release else f"{NAME} {profile}"),
            experiment=experiment or settings.tracking.experiment,
            account=_account(settings, service_account, release is not None),
            arguments={"version": release} if release else {},
        )
    _end(api, run_id, follow, as_json)


@app.command()
def status(
    run_id: RunId,
    endpoint: Endpoint = None,
    namespace: Namespace = None,
    ca: Ca = None,
    follow: Follow = False,
    as_json: Json = False,
) -> None:
    """Say how far a run on a cluster is, step by step."""
    api = connect(endpoint, namespace, ca)
    if follow:
        _end(api, run_id, follow, as_json)
        return
    run, view, *_ = runs.look(api, run_id, _note)
    facts = {"run": run_id, "state": run.state, "steps": [step.to_dict(name) for name, step in view.steps.items()]}
    say(as_json, facts, "\n".join([f"{one_line(str(run.display_name))}: {run.state}", *runs.lines(view.steps)]))


@app.command()
def retry(
    run_id: RunId,
    endpoint: Endpoint = None,
    namespace: Namespace = None,
    ca: Ca = None,
    follow: Follow = False,
    as_json: Json = False,
) -> None:
    """Let a failed run on a cluster go on with its failed steps; training goes on from its checkpoint."""
    api = connect(endpoint, namespace, ca)
    runs.retry(api, run_id)
    _end(api, run_id, follow, as_json)


def _end(api: Api, run_id: str, follow: bool, as_json: bool) -> None:
    """Print the id of a run that was started; with `follow` its summary once it has ended. Raises UserError for a run
    that failed."""
    if not follow:
        say(as_json, {"run": run_id}, run_id)
        return
    _note(f"run {run_id}; it goes on if this ends: pipeline.py status {run_id} --follow")
    try:
        summary = runs.follow(api, run_id, _note)
    except UserError as error:
        raise UserError(f"{error} (then go on: pipeline.py status {run_id} --follow)") from None
    file = runs.write(summary)
    say(as_json, summary, str(file))
    failed = next((step for step in summary["steps"] if step["state"] == "failed"), None)
    if failed or summary["kubeflow"]["state"] != "SUCCEEDED":
        ended = summary["kubeflow"]
        if ended["state"] == "CANCELED":
            raise UserError(f"run {run_id} was canceled; submit it anew, and its finished steps are answered at once")
        why = f": {ended['error']}" if ended.get("error") else ""
        where = f"{failed['name']}: {failed['figure']}" if failed else f"the run ended {ended['state']}{why}"
        raise UserError(f"{where} (run {run_id}; once it is mended: pipeline.py retry {run_id})")


@app.command()
def schedule(
    endpoint: Endpoint = None,
    cron: Annotated[
        str | None, typer.Option(help="Six-field cron expression, seconds first, in UTC: '0 0 3 * * *'.")
    ] = None,
    on_data: Annotated[
        bool, typer.Option("--on-data", help="Look once: run if a new revision of the data is recorded.")
    ] = False,
    repository: Annotated[
        str | None, typer.Option(help="With --on-data: the data repository here; default: on the mounted volume.")
    ] = None,
    profile: Profile = "laptop",
    set_: Sets = [],
    namespace: Namespace = None,
    experiment: Experiment = None,
    service_account: Account = None,
    ca: Ca = None,
) -> None:
    """Have the pipeline run on a cluster by itself: by the clock, in place of an earlier schedule of this profile, or
    once for each new revision of the data. Unchanged steps are answered from the store."""
    if (cron is None) == (not on_data):
        raise UserError("give one of --cron '0 0 3 * * *' and --on-data")
    name = f"{NAME} {profile}"
    if cron is not None:
        when = described(cron)
        with specification(profile, set_) as (settings, file):
            api, group = connect(endpoint, namespace, ca), experiment or settings.tracking.experiment
            job, before = schedules.by_clock(
                api, file, cron, name=name, experiment=group, account=_account(settings, service_account)
            )
        print(job)
        _note(f"{name} runs {when}" + (f", in place of {', '.join(before)}" if before else ""))
        return
    watched = schedules.watched(profile, set_, repository)
    data = schedules.newest_data(watched)
    if data is None:
        _note("no revision of the data is recorded yet, or not all of it is in the remote")
        return
    api, group = connect(endpoint, namespace, ca), experiment or watched.tracking.experiment
    run_id = schedules.by_data(api, profile, set_, data, experiment=group, account=_account(watched, service_account))
    if run_id is None:
        _note(f"revision {data.revision[:12]} has had its run")
        return
    print(run_id)
