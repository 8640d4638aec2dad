"""MLflow: one run per pipeline run, named by its name and start, and a nested run per step that was not recalled.

The names of an evaluation's metrics are in `figures.py`, of its pictures in `plots.py`. Beside them: `seconds`,
`gate/passed`, `step/<step>/seconds` and `cost/<step>/<figure>` on a pipeline's run, `seconds` and `cost/<figure>` on a
step's (names in `cost.py`), and whatever the training loop hands to `CurveLogger`, by optimiser step.

Tags: `facemllm.run`, `.profile`, `.package`, `.commit`, `.process` on every run; `.step`, `.key`, `.input.<name>`,
`.output`, `.error` on a step's; `.model`, `.version`, `.gate`, `.approval` on a pipeline's. Parameters, datasets and
the note are described in `recorded.py`.
"""

from __future__ import annotations

import getpass
import os
import re
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facemllm.core import digests
from facemllm.core.processes import Identity
from facemllm.errors import UserError, one_line
from facemllm.scoring import figures
from facemllm.settings import Settings, root
from facemllm.tables import PREDICTIONS, open_table
from facemllm.tracking import recorded
from facemllm.tracking.client import CurveLogger, connect, guard, points_of, send, session, uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

IMAGE_COMMIT = "FACEMLLM_COMMIT"  # set by the Dockerfile
KIND = ("mlflow.experimentKind", "custom_model_development")
"""Tag by which MLflow knows an experiment as model training; its own pages (3.17) go by the address alone."""


@cache
def commit() -> str | None:
    """Git commit of the project folder, ending in `+changes` when tracked files differ; outside a repository the one
    that the image was built from, if it says so (`FACEMLLM_COMMIT`)."""
    git = partial(subprocess.run, capture_output=True, text=True, check=True, timeout=10, cwd=root())
    try:
        head = git(["git", "rev-parse", "HEAD"]).stdout.strip()
        changes = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
        return head + ("+changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        named = os.environ.get(IMAGE_COMMIT, "")
        return named if re.fullmatch(r"[0-9a-f]{40,64}(\+changes)?", named) else None


def experiment_id(settings: Settings, client: MlflowClient) -> str:
    """Id of the experiment `tracking.experiment`, created if absent. Raises UserError if it was deleted in MLflow."""
    from mlflow.exceptions import MlflowException

    name = settings.tracking.experiment
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, tags=dict([KIND])))
        except MlflowException:  # another process was quicker, or a real failure
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise UserError(f"experiment '{name}' was deleted in MLflow; restore it there or choose tracking.experiment")
    if KIND[0] not in found.tags:
        client.set_experiment_tag(found.experiment_id, *KIND)
    return str(found.experiment_id)


def experiment_url(settings: Settings) -> str:
    """Address of the experiment's runs in MLflow's view of model training; that of the server if it does not answer."""
    with suppress(UserError), session(settings) as client:
        return f"{uri(settings)}/{recorded.page(experiment_id(settings, client))}"
    return uri(settings)


def start_pipeline(settings: Settings, run_name: str, source_type: str = "LOCAL") -> str:
    """Open the run of a pipeline run, with its parameters and all settings as `settings.yaml`, and return its id.

    Runs of this name that a killed process left open are closed first.
    """
    reap(settings, run_name)
    tags = _common_tags(settings, run_name) | {"mlflow.source.name": "pipeline.py", "mlflow.source.type": source_type}
    name = f"{run_name} {datetime.now():%Y-%m-%d %H:%M:%S}"
    with session(settings) as client:
        run_id = str(client.create_run(experiment_id(settings, client), tags=tags, run_name=name).info.run_id)
        client.log_dict(run_id, settings.model_dump(mode="json"), "settings.yaml")
    StepRun(uri(settings), run_id, client).log_params(recorded.pipeline_params(settings))
    return run_id


def join_pipeline(settings: Settings, run_name: str) -> str:
    """The open run of a pipeline run of this name, or a new one: for steps that no common process holds together."""
    condition = f"attributes.status = 'RUNNING' and tags.`facemllm.run` = '{run_name}'"
    with session(settings) as client:
        found = client.search_runs([experiment_id(settings, client)], condition, order_by=["attributes.start_time ASC"])
    pipelines = [run.info.run_id for run in found if "facemllm.step" not in run.data.tags]
    return str(pipelines[0]) if pipelines else start_pipeline(settings, run_name, "JOB")


def finish_pipeline(
    settings: Settings, parent_run_id: str, summary: Mapping[str, Any], folder: Path | None = None
) -> None:
    """Put a run's headline figures, datasets and note on the pipeline's run, with its files in `folder`, and close it.

    `summary` is that of the run folder, or the part of it that was reached. The run is FAILED if a step failed.
    """
    gate, model, steps = summary.get("gate") or {}, summary.get("model") or {}, summary.get("steps") or ()
    metrics = figures.task_metrics(summary.get("tasks") or {}, items=False)
    metrics |= figures.task_metrics({"closed_mean": summary.get("closed_mean") or {}})
    times = {step["name"]: {"seconds": step["seconds"]} for step in steps}
    metrics |= figures.numbers({"seconds": summary.get("seconds"), "step": times, "cost": summary.get("cost") or {}})
    metrics |= figures.numbers({"gate": {"passed": gate.get("passed")}})
    metrics |= figures.trust_metrics(summary.get("trust") or {})
    verdict = None if gate.get("passed") is None else "passed" if gate["passed"] else "refused"
    tags = {"model": model.get("digest"), "version": model.get("version"), "gate": verdict}
    tags["approval"] = summary.get("approval")
    run = StepRun(uri(settings), parent_run_id, connect(settings))
    run.log_metrics(metrics)
    run.set_tags({f"facemllm.{name}": str(value) for name, value in tags.items() if value is not None})
    made = {step["name"]: step.get("digest") or "" for step in steps}
    tables = {"annotated": made.get("annotate", ""), "conversations": made.get("reformat", "")}
    report = folder / "report.html" if folder is not None and (folder / "report.html").is_file() else None
    failed = any(step.get("state") == "failed" for step in steps)
    with guard(run.uri):
        run.client.log_inputs(parent_run_id, datasets=recorded.datasets(settings, tables, "training"))
        run.client.log_dict(parent_run_id, dict(summary), "summary.json")
        if report is not None:
            run.client.log_artifact(parent_run_id, str(report))
        experiment = experiment_id(settings, run.client)
        text = recorded.note(settings, experiment, parent_run_id, summary, report is not None)
        run.client.set_tag(parent_run_id, "mlflow.note.content", text[:8000])
        run.client.set_terminated(parent_run_id, "FAILED" if failed else "FINISHED")


def reap(settings: Settings, run_name: str) -> list[str]:
    """Mark as KILLED the RUNNING runs of this name whose process is gone, and return their ids.

    A process of another machine counts as gone: call this where a run of that name begins anew.
    """
    if "'" in run_name:
        raise UserError(f"run name {run_name!r}: leave out the apostrophe")
    condition = f"attributes.status = 'RUNNING' and tags.`facemllm.run` = '{run_name}'"
    with session(settings) as client:
        runs = client.search_runs([experiment_id(settings, client)], condition, max_results=1000)
        stale = [run.info.run_id for run in runs if not _alive(run.data.tags.get("facemllm.process", ""))]
        for run_id in stale:
            client.set_terminated(run_id, "KILLED")
    return stale


@dataclass(frozen=True)
class StepRun:
    """An open run. Its methods raise UserError when MLflow fails."""

    uri: str
    run_id: str
    client: MlflowClient

    def log_params(self, params: Mapping[str, str]) -> None:
        """Record parameters; values are cut at MLflow's 6000 characters."""
        from mlflow.entities import Param

        every = [Param(name, value[:6000]) for name, value in params.items()]
        with guard(self.uri):
            for start in range(0, len(every), 100):
                self.client.log_batch(self.run_id, params=every[start : start + 100])

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Record numbers."""
        with guard(self.uri):
            send(self.client, self.run_id, points_of(metrics, 0))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; values are cut at MLflow's 8000 characters."""
        from mlflow.entities import RunTag

        with guard(self.uri):
            self.client.log_batch(self.run_id, tags=[RunTag(name, value[:8000]) for name, value in tags.items()])

    def log_table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Record a table (column name -> values) as `<name>.json`, which MLflow's evaluation view opens."""
        with guard(self.uri):
            self.client.log_table(self.run_id, {k: list(v) for k, v in columns.items()}, f"{name}.json")

    def log_artifacts(self, folder: Path, path: str) -> None:
        """Record all files of a folder, under `path`."""
        with guard(self.uri):
            self.client.log_artifacts(self.run_id, str(folder), path)

    def log_evaluation(self, metrics: Mapping[str, Any], folder: Path, pictures: Mapping[str, Any]) -> None:
        """Record an evaluation: its metrics, tables of results, of groups and of some answers, and its figures.

        `metrics` is `metrics.json`; `folder` holds the predictions table in `predictions/`; `pictures` are matplotlib
        figures by name. No image of a face is recorded.
        """
        self.log_metrics(figures.evaluation_metrics(metrics))
        answers = open_table(folder / "predictions", PREDICTIONS).iterate(figures.ANSWERS)
        for name, rows in figures.tables(metrics, answers).items():
            self.log_table(f"evaluation/{name}", figures.columns(rows))
        with guard(self.uri):
            for name, figure in pictures.items():
                self.client.log_figure(self.run_id, figure, f"evaluation/{name}.png")
            self.client.log_dict(self.run_id, dict(metrics), "evaluation/metrics.json")

    def curve_logger(self) -> CurveLogger:
        """A callable that logs training metrics to this run, from any process."""
        return CurveLogger(self.uri, self.run_id)

    def finish(self, digest: str, facts: Mapping[str, Any]) -> None:
        """Record what the step gave: the digest of its result and its facts (numbers of time and cost as metrics)."""
        self.set_tags({"facemllm.output": digest, "facemllm.figure": str(facts.get("figure", ""))})
        self.log_metrics(figures.numbers({"seconds": facts.get("seconds"), "cost": facts.get("cost") or {}}))


@contextmanager
def step_run(
    settings: Settings,
    parent_run_id: str | None,
    step: str,
    *,
    key: str | None = None,
    inputs: Mapping[str, str] | None = None,
) -> Iterator[StepRun]:
    """A run for one step, nested in the pipeline's if there is one, with the settings and tables the step depends on.

    It ends FINISHED, FAILED or KILLED as the block does. A failure of MLflow while closing never hides what the block
    raised. Raises UserError if MLflow cannot be reached or does not know the pipeline's run.
    """
    client, address = connect(settings), uri(settings)
    with guard(address):
        parent = client.get_run(parent_run_id) if parent_run_id else None
        known = parent.data.tags if parent is not None else {}
        tags = _common_tags(settings, known.get("facemllm.run", step)) | {"facemllm.step": step}
        tags |= {f"facemllm.input.{name}": digest for name, digest in (inputs or {}).items()}
        tags |= {"mlflow.source.name": f"components/{'train' if step in settings.stages() else step}.py"}
        tags |= {"mlflow.source.type": known.get("mlflow.source.type", "LOCAL")}
        tags |= {"facemllm.key": key} if key else {}
        tags |= {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
        name = f"{step} {parent.info.run_name}" if parent is not None else step
        created = client.create_run(experiment_id(settings, client), tags=tags, run_name=name)
        context = "training" if step in settings.stages() else step
        if tables := recorded.datasets(settings, inputs or {}, context):
            client.log_inputs(created.info.run_id, datasets=tables)
    run = StepRun(address, str(created.info.run_id), client)
    run.log_params(recorded.step_params(settings, step))
    try:
        yield run
    except BaseException as error:
        with suppress(UserError), guard(address):
            client.set_terminated(run.run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
            client.set_tag(run.run_id, "facemllm.error", one_line(error, 1000))
        raise
    with guard(address):
        client.set_terminated(run.run_id, "FINISHED")


def _common_tags(settings: Settings, run_name: str) -> dict[str, str]:
    tags = {
        "facemllm.run": run_name,
        "facemllm.profile": settings.profile,
        "facemllm.package": digests.of_package(),
        "facemllm.process": _process(),
    }
    with suppress(OSError, KeyError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    if head := commit():
        plain = head.removesuffix("+changes")
        tags |= {"facemllm.commit": head, "mlflow.source.git.commit": plain}
        tags |= {"mlflow.source.git.dirty": str(plain != head).lower()}
    return tags


def _process() -> str:
    """This process as `host/pid/start`: a process id alone is given again to others."""
    own = Identity.of(os.getpid())
    return f"{socket.gethostname()}/{own.pid}/{own.started}"


def _alive(process: str) -> bool:
    host, _, rest = process.partition("/")
    pid, _, started = rest.partition("/")
    try:
        return host == socket.gethostname() and Identity(int(pid), float(started)).process() is not None
    except ValueError:
        return False
