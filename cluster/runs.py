"""Runs on a cluster: started, followed step by step, written as `summary.json`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.client import Api, experiment_of
from facemllm.core.files import atomic_write, read_json
from facemllm.errors import UserError, one_line
from facemllm.settings import Settings, load
from facemllm.workflow import runs
from facemllm.workflow.pods import RELEASE

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
    group = experiment_of(api, experiment)
    given = {"params": dict(arguments or {}), "service_account": account, "enable_caching": False}
    run = api.call(api.client.run_pipeline, group, name, pipeline_package_path=file, **given)
    return str(run.run_id)


def retry(api: Api, run_id: str) -> None:
    """Let a failed run go on: its failed steps run again, under the same id."""
    api.call(api.client._run_api.run_service_retry_run, run_id)


def settings_of(api: Api, run: Any) -> tuple[Settings, list[str], bool]:
    """The settings that a run was compiled with, and their overrides, which stand in its tasks; and whether it is a
    release. Raises UserError for a run of another pipeline, or of settings that this checkout does not know.
    """
    spec = run.pipeline_spec
    if spec is None and (version := run.pipeline_version_reference) is not None:
        ids = version.pipeline_id, version.pipeline_version_id
        spec = api.patiently(api.client.get_pipeline_version, *ids).pipeline_spec
    root = (spec or {}).get("pipeline_spec", spec or {}).get("root", {})
    for name, task in root.get("dag", {}).get("tasks", {}).items():
        given = task.get("inputs", {}).get("parameters", {})
        constants = {key: one.get("runtimeValue", {}).get("constant") for key, one in given.items()}
        if isinstance(profile := constants.get("profile"), str):
            overrides = [str(one) for one in constants.get("overrides") or ()]
            try:
                return load(profile, overrides), overrides, name == RELEASE
            except UserError as error:
                other = f"run {run.run_id} is of a checkout that knew profile {profile} otherwise"
                raise UserError(f"{other} ({error}); its steps are in Kubeflow's pages") from None
    raise UserError(f"run {run.run_id} ({run.display_name}) is of another pipeline; its steps are in Kubeflow's pages")


def read(run: Any, view: runs.RunView) -> dict[str, runs.StepView]:
    """Take the states of a run's tasks into the view; the steps that changed, by name.

    KFP lists beside each step its driver and, of a condition, the tasks in it; a step is the task of its own name, or
    its driver where that failed and the step never began.
    """
    changed: dict[str, runs.StepView] = {}
    tasks = {str(task.display_name).replace("-", "_"): task for task in _tasks(run)}
    for name, step in view.steps.items():
        task, driver = tasks.get(name), tasks.get(f"{name}_driver")
        if str(driver and driver.state) == "FAILED" and _STATES.get(str(task and task.state), "waiting") == "waiting":
            task = driver
        state = _STATES.get(str(task and task.state), "waiting")
        if task is None or step.state == state:
            continue
        step.state, step.began = state, task.start_time.timestamp() if task.start_time else None
        if state in ENDED.values() and task.start_time and task.end_time:
            step.seconds = max(0.0, (task.end_time - task.start_time).total_seconds())
        if state == "failed":
            said = _said(task) or "see the step's log in Kubeflow's pages"
            step.message = "canceled" if task.state == "CANCELED" else said
        changed[name] = step
    return changed


def _tasks(run: Any) -> list[Any]:
    return list((run.run_details.task_details if run.run_details else None) or ())


def _said(one: Any) -> str:
    """What Kubeflow says of a run or a task that failed, in one line."""
    return one_line(str(one.error.message)) if one.error and one.error.message else ""


def _reason(run: Any) -> str:
    """What Kubeflow says of a run's failure, be it of a task that is no step's."""
    if run.state != "FAILED":
        return ""
    failed = [task for task in _tasks(run) if task.state == "FAILED"]
    return next((said for said in map(_said, [*failed, run]) if said), "")


def look(api: Api, run_id: str, say: Callable[[str], object] = print) -> tuple[Any, runs.RunView, Settings, list[str]]:
    """A run as it stands: what KFP says, its steps, its settings and their overrides."""
    run = api.patiently(api.client.get_run, run_id, say=say)
    settings, overrides, release = settings_of(api, run)
    view = runs.RunView.of(settings, Path(os.devnull))
    if release:
        view.steps = {RELEASE: view.steps[RELEASE]}
    read(run, view)
    return run, view, settings, overrides


def lines(steps: Mapping[str, runs.StepView]) -> list[str]:
    """Steps in words: name, state, time, and what went wrong."""
    texts = (f"{name:<15}{step.state:<9}{runs.clock(step.seconds):<14}{step.message}" for name, step in steps.items())
    return [line.rstrip() for line in texts]


def follow(api: Api, run_id: str, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Tell each step's changes until the run has ended; its summary, that of a run folder (`runs.summarise`).

    What a step left in the store is shown where the store can be reached from here. An API that is away is waited for;
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
    kubeflow |= {"error": said} if (said := _reason(run)) else {}
    if facts := read_json(settings.runs / str(run.run_id) / "summary.json"):  # the volume is mounted here
        return {**facts, "kubeflow": kubeflow}
    began, ended = run.created_at, run.finished_at
    seconds = (ended - began).total_seconds() if began and ended else 0.0
    whole = runs.RunView.of(settings, Path(os.devnull))
    whole.steps |= view.steps
    facts = runs.summarise(settings, run.display_name, whole, seconds, overrides)
    return {**facts, "commit": None, "device": "a cluster", "kubeflow": kubeflow}


def write(facts: Mapping[str, Any]) -> Path:
    """Write a summary into a run folder here; the file."""
    folder = runs.run_folder(load(), f"kubeflow-{str(facts['kubeflow']['run_id'])[:8]}")
    atomic_write(folder / "summary.json", (json.dumps(facts, indent=2) + "\n").encode())
    return folder / "summary.json"
