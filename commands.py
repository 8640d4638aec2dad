"""The commands of `pipeline.py`: how the DAG is run here, compiled, submitted, scheduled and released.

`run` starts the local services, hands the DAG to KFP's local runner in a process of its own, shows the steps live, and
writes the run folder. Everything that is not KFP lives in `facemllm`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from facemllm.core import digests, progress, services
from facemllm.core.files import atomic_write, writing
from facemllm.core.machine import on_plain_path
from facemllm.core.processes import die_with_parent, interrupted_by_sigterm
from facemllm.core.step import PARENT_RUN
from facemllm.core.store import FACE
from facemllm.errors import UserError, guarded
from facemllm.ingest.importing import require
from facemllm.settings import Settings, load, root
from facemllm.tracking import runs as tracking
from facemllm.workflow import runner as workflow
from facemllm.workflow import runs
from facemllm.workflow.cron import described
from facemllm.workflow.options import Json, Profile, Sets, say

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Face-MLLM pipeline."
)
_build: Callable[..., Any]


def main(build: Callable[..., Any]) -> None:
    """Run the command line over the pipeline that `build(settings, finish)` gives."""
    global _build
    _build = build
    guarded(on_plain_path)
    guarded(app)


@app.command()
def run(
    profile: Profile = "laptop",
    set_: Sets = [],
    name: Annotated[str | None, typer.Option(help="Name of the run folder; default: the profile's name.")] = None,
    faces: Annotated[str, typer.Option(help="A folder of your own pictures, read instead of `ingest.sources`.")] = "",
    plan: Annotated[bool, typer.Option("--plan", help="Only tell which steps would run, and why.")] = False,
    as_json: Json = False,
) -> None:
    """Run the whole DAG here, step by step, and stop before production until a person has approved."""
    if faces:
        own = {"name": "imagefolder", "root": os.path.abspath(os.path.expanduser(faces))}
        set_ = [f"ingest.sources={json.dumps([own])}", *set_]
    name, settings = runs.plain_name(name or profile), load(profile, set_)
    for source in settings.ingest.sources if not settings.version.restore else ():
        require(source)
    if plan:
        planned = workflow.plan(settings)
        say(as_json, {"plan": [asdict(one) for one in planned]}, lambda: _show_plan(planned))
        return
    interrupted_by_sigterm()
    try:
        with runs.exclusive(settings):
            folder = runs.run_folder(settings, name)
            summary, code = _run(settings, folder, name, list(set_))
    except KeyboardInterrupt:
        raise UserError("interrupted; run the same command again to go on") from None
    if as_json:
        print(json.dumps(summary))
    failed = next((s for s in summary["steps"] if s["state"] == "failed"), None)
    if failed:
        raise UserError(f"{failed['name']}: {failed['figure']} (log: {folder / 'run.log'})")
    if code:
        raise UserError(f"the pipeline ended with {code} (log: {folder / 'run.log'})")
    if not (summary["gate"] or {}).get("passed"):
        raise UserError(f"the gate refused the model: {'; '.join((summary['gate'] or {}).get('reasons', []))}")


def _show_plan(planned: Iterable[workflow.Planned]) -> None:
    words = {"run": "will run", "recall": "recalled", "open": "run or recalled"}
    for one in planned:
        seconds = "" if one.seconds is None else f"took {runs.clock(one.seconds)}"
        print(f"{one.step:<15}{words[one.action]:<17}{seconds:<20}{one.why}".rstrip())


def _run(settings: Settings, folder: Path, name: str, overrides: list[str]) -> tuple[dict[str, Any], int]:
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
    started = time.time()
    cached = workflow.recall_all(settings)
    pending = [step for step in settings.stages() if step not in cached] or "annotate" not in cached
    if not set(cached) >= {"validate", "version", "evaluate"}:
        # the engine's cache may only answer when every result it stands for is still in the store
        shutil.rmtree(settings.home / "cache" / "kfp", ignore_errors=True)
    view = runs.RunView.of(settings, folder / "events.jsonl")
    console.print(f"[bold]face-mllm[/] run [bold]{name}[/], profile {settings.profile}, log {folder / 'run.log'}")
    child: subprocess.Popen[bytes] | None = None
    try:
        with console.status("starting the local MLflow server"):
            if settings.tracking.uri is None:
                services.up(settings, "mlflow")
            parent = tracking.start_pipeline(settings, name)
        environment = os.environ | {progress.EVENTS: str(view.events), PARENT_RUN: parent, "PYTHONUNBUFFERED": "1"}
        if pending and "RAY_ADDRESS" not in os.environ:
            with console.status("starting a Ray head for this run"):
                services.down(settings, ["ray"])  # a killed run's head may still hold its workers
                environment |= services.up(settings, "ray").env
        with (folder / "run.log").open("wb") as log:
            command = [sys.executable, str(root() / "pipeline.py"), "execute", settings.profile, json.dumps(overrides)]
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
            runs.follow(console, view, child, started)
    except BaseException:
        if child is not None and child.poll() is None:
            services.end_tree(child.pid)
        raise
    finally:
        if pending:
            services.down(settings, ["ray"])
    if child.returncode and view.failure() is None:
        console.print((folder / "run.log").read_text("utf-8", "replace")[-2000:], markup=False)
    summary = runs.summarise(settings, name, view, time.time() - started, overrides)
    runs.write_run(settings, folder, summary)
    _show(console, settings, summary, folder)
    with suppress(UserError):  # an MLflow server that went away must not hide what the run says
        tracking.finish_pipeline(settings, parent, summary, folder)
    return summary, child.returncode


def _show(console: Console, settings: Settings, summary: Mapping[str, Any], folder: Path) -> None:
    """Print the results table, where everything is, and what a person can do next."""
    from facemllm.report.terminal import results_table
    from facemllm.serve.deploy import curl_example
    from facemllm.tracking.runs import experiment_url

    plain = partial(console.print, markup=False, soft_wrap=True)
    if summary["tasks"]:
        console.print()
        console.print(results_table(summary))
    steps, gate, model = summary["steps"], summary["gate"], summary["model"]
    cached = sum(step["cached"] for step in steps)
    console.print(f"\n{runs.clock(summary['seconds'])}, {cached} of {len(steps)} steps cached")
    lines = [("report", str(folder / "report.html")), ("MLflow", experiment_url(settings))]
    if gate:
        lines.append(("gate", "passed" if gate["passed"] else f"refused: {'; '.join(gate['reasons'])}"))
    if model["version"]:
        lines.append(("model", f"{model['name']} version {model['version']}, digest {model['digest'][:12]}"))
        lines.append(("approval", str(summary["approval"])))
    for label, text in lines:
        console.print(f"[bold]{label:<10}[/]", end="")
        plain(text)
    if summary["endpoint"]:
        console.print("[bold]ask it    [/]")
        plain(curl_example(summary["endpoint"], picture=shlex.quote(str(folder / FACE))))
    if summary["approval"] == "pending":
        profile = "" if settings.profile == "laptop" else f" --profile {settings.profile}"
        sets = [f" --set {shlex.quote(one)}" for one in summary["overrides"]]
        where = "".join(one for one in sets if re.match(r" --set '?(storage|tracking|services|promote)\b", one))
        console.print("[bold]next[/]      a person decides, on a page or here, then the pipeline goes on:")
        plain(f"  .venv/bin/facemllm review{profile}{where}")
        for verdict in ("approve", "reject"):
            decision = f'{verdict} {model["version"]}{profile}{where} --by "Your Name" --reason "..."'
            plain(f"  .venv/bin/facemllm promote {decision}")
        name = "" if summary["run"] == settings.profile else f" --name {shlex.quote(summary['run'])}"
        plain(f"  .venv/bin/python pipeline.py run{profile}{name}{''.join(sets)}")


@app.command(hidden=True)
def execute(profile: str, overrides: str) -> None:
    """Run the DAG with KFP's local runner in this process."""
    from kfp import local

    die_with_parent()
    os.environ[workflow.ENGINE] = str(os.getpid())
    settings = load(profile, given := json.loads(overrides))
    scratch = settings.home / "cache" / "kfp"
    scratch.mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"] = str(scratch)
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=str(scratch / "outputs"),
        enable_caching=True,
        cache_root=str(scratch / "cache"),
    )
    _build(settings)(profile=profile, overrides=given, code=digests.of_package())


@app.command()
def compile(
    out: Annotated[Path, typer.Argument(help="File to write.")] = Path("face-mllm.pipeline.yaml"),
    profile: Profile = "laptop",
    set_: Sets = [],
) -> None:
    """Write the KFP specification for a cluster."""
    settings = load(profile, set_)
    write_specification(_build, settings, list(set_), out)
    print(out)


def write_specification(build: Callable[..., Any], settings: Settings, overrides: list[str], out: Path) -> None:
    """Compile the pipeline for a cluster into `out`. Raises UserError for a name KFP cannot write, or a full disk."""
    from kfp import compiler

    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"{out}: a specification is a .yaml file; choose such a name, as in {out.stem}.yaml")
    if not out.parent.is_dir():
        raise UserError(f"cannot write {out}: there is no folder {out.parent}; make it first")
    arguments = {"profile": settings.profile, "overrides": overrides, "code": digests.of_package()}
    with writing(out), tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "whole.yaml"
        pipeline = build(settings, lambda task, step: on_cluster(settings, task, step))
        compiler.Compiler().compile(pipeline, str(made), pipeline_parameters=arguments)
        atomic_write(out, made.read_bytes())


def on_cluster(settings: Settings, task: Any, step: str) -> Any:
    """Give a task what a cluster asks for: image, resources, the shared workspace, and its place in the run."""
    from kfp import kubernetes

    cluster = settings.cluster
    size = cluster.training if step in settings.stages() else cluster.steps
    task.set_container_image(cluster.image)
    task.set_cpu_request(size.cpu).set_cpu_limit(size.cpu).set_memory_request(size.memory).set_memory_limit(size.memory)
    if size.gpus:
        task.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(size.gpus)
        kubernetes.empty_dir_mount(task, volume_name="dshm", mount_path="/dev/shm", medium="Memory")
    kubernetes.mount_pvc(task, pvc_name=cluster.workspace_claim, mount_path="/workspace")
    kubernetes.use_field_path_as_env(task, env_name="FACEMLLM_RUN", field_path="metadata.labels['pipeline/runid']")
    return task


Endpoint = Annotated[str, typer.Option(help="Address of the KFP API.")]
Namespace = Annotated[str | None, typer.Option(help="Namespace of the run, where KFP is multi-user.")]
Account = Annotated[str | None, typer.Option(help="Service account the pods run as; k8s/ has `pipeline-runner`.")]


@app.command()
def submit(
    endpoint: Endpoint,
    profile: Profile = "laptop",
    set_: Sets = [],
    name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    namespace: Namespace = None,
    service_account: Account = None,
) -> None:
    """Run the DAG on a cluster's Kubeflow Pipelines."""
    settings = load(profile, set_)
    client = _client(endpoint, namespace)
    with _specification(settings, set_) as file:
        result = client.create_run_from_pipeline_package(
            file,
            run_name=name or f"face-mllm {profile}",
            experiment_name=settings.tracking.experiment,
            namespace=namespace,
            service_account=service_account,
        )
    print(result.run_id)


@app.command()
def schedule(
    endpoint: Endpoint,
    cron: Annotated[str, typer.Option(help="Six-field cron expression, seconds first, in UTC: '0 0 3 * * *'.")],
    profile: Profile = "laptop",
    set_: Sets = [],
    namespace: Namespace = None,
    service_account: Account = None,
) -> None:
    """Run the DAG on a cluster again and again, in place of an earlier schedule of this profile; unchanged steps are
    answered from the store."""
    settings, when = load(profile, set_), described(cron)
    client, name = _client(endpoint, namespace), f"face-mllm {profile}"
    experiment = client.create_experiment(settings.tracking.experiment, namespace=namespace)
    before = _recurring(client, experiment.experiment_id, name)
    with _specification(settings, set_) as file:
        job = client.create_recurring_run(
            experiment.experiment_id,
            job_name=name,
            cron_expression=cron,
            pipeline_package_path=file,
            max_concurrency=1,
            service_account=service_account,
        )
    for earlier in before:  # KFP cannot change one; the new one stands before the old one goes
        client.delete_recurring_run(earlier)
    print(job.recurring_run_id)
    print(f"{name} runs {when}" + (f", in place of {', '.join(before)}" if before else ""), file=sys.stderr)


def _recurring(client: Any, experiment: str, name: str) -> list[str]:
    """Ids of an experiment's recurring runs of this name."""
    found, token = [], ""
    while True:
        page = client.list_recurring_runs(page_token=token, page_size=100, experiment_id=experiment)
        found += [one.recurring_run_id for one in page.recurring_runs or [] if one.display_name == name]
        if not (token := page.next_page_token or ""):
            return found


@contextmanager
def _specification(settings: Settings, overrides: list[str]) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        write_specification(_build, settings, list(overrides), file := Path(folder) / "face-mllm.yaml")
        yield str(file)


def _client(endpoint: str, namespace: str | None) -> Any:
    import kfp

    warnings.filterwarnings("ignore", category=FutureWarning, module="kfp")
    try:
        client = kfp.Client(host=endpoint, namespace=namespace or "kubeflow")
        client.get_kfp_healthz()
    except Exception as error:
        raise UserError(f"no Kubeflow Pipelines API answers at {endpoint}: {str(error).splitlines()[0]}") from None
    return client


@app.command("release")
def release_version(
    version: Annotated[str, typer.Argument(help="Version number of the registered model.")],
    profile: Profile = "laptop",
    set_: Sets = [],
) -> None:
    """Put an approved version into production; refused unless its very bytes are approved by signed decisions."""
    from facemllm.serve.deploy import curl_example

    settings = load(profile, set_)
    if settings.tracking.uri is None:
        services.up(settings, "mlflow")
    url = workflow.execute("release", settings, version=version)  # beside a run: it must not wait for a training
    print(f"version {version} serves at {url}\n\n{curl_example(url)}")
