"""Runs on a cluster: started, followed step by step, told as `summary.json`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.client import Api
from facemllm.core.files import atomic_write, read_json
from facemllm.errors import UserError, one_line
from facemllm.settings import Settings, load
from facemllm.workflow import runs

POLL_S = 5.0
ENDED = {"SUCCEEDED": "done", "SKIPPED": "skipped", "FAILED": "failed", "CANCELED": "failed"}
_STATES = {**ENDED, "RUNNING": "running", "CANCELING": "running", "PENDING": "waiting", "PAUSED": "waiting"}


def submit(
    api: Api,
    file: str,
    *,
    name: str,
    experiment: str,
    account: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """Start a run of a compiled pipeline; its id. The experiment is made if absent."""
    made = api.call(api.client.create_experiment, experiment, namespace=api.namespace or None)
    given = {"params": dict(arguments or {}), "service_account": account, "enable_caching": False}
    run = api.call(api.client.run_pipeline, made.experiment_id, name, pipeline_package_path=file, **given)
    return str(run.run_id)


def retry(api: Api, run_id: str) -> None:
    """Let a failed run go on: its failed steps run again, under the same id."""
    api.call(api.client._run_api.run_service_retry_run, run_id)


def settings_of(api: Api, run: Any) -> tuple[Settings, list[str]]:
    """The settings that a run was compiled with, and their overrides; both stand in its tasks.

    Raises UserError for a run of another pipeline.
    """
    spec = run.pipeline_spec
    if spec is None and (version := run.pipeline_version_reference) is not None:
        ids = version.pipeline_id, version.pipeline_version_id
        spec = api.patiently(api.client.get_pipeline_version, *ids).pipeline_spec
    root = (spec or {}).get("pipeline_spec", spec or {}).get("root", {})
    for task in root.get("dag", {}).get("tasks", {}).values():
        given = task.get("inputs", {}).get("parameters", {})
        constants = {name: given.get(name, {}).get("runtimeValue", {}).get("constant") for name in given}
        if isinstance(profile := constants.get("profile"), str):
            overrides = [str(one) for one in constants.get("overrides") or ()]
            return load(profile, overrides), overrides
    raise UserError(f"run {run.run_id} ({run.display_name}) is of another pipeline; its steps are in Kubeflow's pages")


def read(run: Any, view: runs.RunView) -> dict[str, runs.StepView]:
    """Take the states of a run's tasks into the view; the steps that changed, by name.

    KFP lists beside each step its driver and, of a condition, the tasks in it; a step is the task of its own name.
    """
    changed: dict[str, runs.StepView] = {}
    for task in (run.run_details.task_details if run.run_details else None) or ():
        step = view.steps.get(str(task.display_name).replace("-", "_"))
        state = _STATES.get(str(task.state), "waiting")
        if step is None or step.state == state:
            continue
        step.state, step.began = state, task.start_time.timestamp() if task.start_time else None
        if state in ENDED.values() and task.start_time and task.end_time:
            step.seconds = max(0.0, (task.end_time - task.start_time).total_seconds())
        if state == "failed":
            said = task.error.message if task.error and task.error.message else "see the step's log in Kubeflow's pages"
            step.message = "canceled" if task.state == "CANCELED" else one_line(Exception(said))
        changed[str(task.display_name).replace("-", "_")] = step
    return changed


def look(api: Api, run_id: str, say: Callable[[str], object] = print) -> tuple[Any, runs.RunView, Settings, list[str]]:
    """A run as it stands: what KFP says, its steps, its settings and their overrides."""
    run = api.patiently(api.client.get_run, run_id, say=say)
    settings, overrides = settings_of(api, run)
    view = runs.RunView.of(settings, Path(os.devnull))
    read(run, view)
    return run, view, settings, overrides


def lines(steps: Mapping[str, runs.StepView]) -> list[str]:
    """Steps in words: name, state, time, and what went wrong."""
    told = (f"{name:<15}{step.state:<9}{runs.clock(step.seconds):<14}{step.message}" for name, step in steps.items())
    return [line.rstrip() for line in told]


def follow(api: Api, run_id: str, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Tell each step's changes until the run has ended; its summary, that of a run folder (`runs.summarise`).

    What a step left in the store is told where the store can be reached from here. An API that is away is waited for;
    that of a token which expired meanwhile is a UserError, and the run goes on.
    """
    run, view, settings, overrides = look(api, run_id, say)
    for line in lines({name: step for name, step in view.steps.items() if step.state != "waiting"}):
        say(line)
    while run.state not in ENDED:
        time.sleep(POLL_S)
        run = api.patiently(api.client.get_run, run_id, say=say)
        for line in lines(read(run, view)):
            say(line)
    return summary(run, view, settings, overrides)


def summary(run: Any, view: runs.RunView, settings: Settings, overrides: list[str]) -> dict[str, Any]:
    """The `summary.json` of a run: the one that its last task wrote on the volume, where that can be reached; else what
    Kubeflow knows of it. The commit is the image's, which only its own steps know."""
    kubeflow = {"run_id": run.run_id, "state": run.state, "experiment_id": run.experiment_id}
    if told := read_json(settings.runs / str(run.run_id) / "summary.json"):  # the volume is mounted here
        return {**told, "kubeflow": kubeflow}
    began, ended = run.created_at, run.finished_at
    seconds = (ended - began).total_seconds() if began and ended else 0.0
    told = runs.summarise(settings, run.display_name, view, seconds, overrides)
    return {**told, "commit": None, "device": "a cluster", "kubeflow": kubeflow}


def write(told: Mapping[str, Any]) -> Path:
    """Write a summary into a run folder here; the file."""
    folder = runs.run_folder(load(), f"kubeflow-{str(told['kubeflow']['run_id'])[:8]}")
    atomic_write(folder / "summary.json", (json.dumps(told, indent=2) + "\n").encode())
    return folder / "summary.json"
