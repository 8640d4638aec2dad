"""The commands of `pipeline.py`: how the DAG is run and released here; those for a cluster stand in `cluster`.

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
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cluster import specification
from cluster.commands import app as on_cluster
from facemllm.core import digests, progress, services
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
from facemllm.workflow.options import Json, Profile, Sets, say

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Face-MLLM pipeline."
)
app.add_typer(on_cluster)


def main(graphs: specification.Graphs) -> None:
    """Run the command line of `pipeline.py` over its pipelines."""
    specification.graphs = graphs
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
    assert specification.graphs is not None
    specification.graphs.local(settings)(profile=profile, overrides=given, code=digests.of_package())


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
