"""What a step shows in Kubeflow's pages besides the value it hands on: numbers, a report, a model.

Artifacts are those of the pipeline engine, told apart by their `schema_title`; each has a `path` for its file and
`metadata`, which is what the pages show. Every one gets a file: an engine that remembers a task looks for it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from facemllm.core import progress
from facemllm.core.files import atomic_write
from facemllm.core.step import CLUSTER_RUN
from facemllm.core.store import Store
from facemllm.errors import UserError, one_line
from facemllm.scoring import figures
from facemllm.settings import Settings, load
from facemllm.tables import MANIFEST
from facemllm.tracking import runs as tracking
from facemllm.workflow import launcher, runner, runs
from facemllm.workflow.pods import launches
from facemllm.workflow.runs import RunView

REPORT = "report.html"


def run_component(name: str, profile: str, overrides: Sequence[str], artifacts: Sequence[Any], **inputs: str) -> str:
    """Run one step as `runner.execute` does, fill the engine's artifacts, and return what the next step is given."""
    settings = load(profile, list(overrides))
    record = _noted(name, settings, **inputs)
    for artifact in artifacts:
        _FILL[artifact.schema_title](settings, record, artifact)
    return str(record["output"])


def _noted(name: str, settings: Settings, **inputs: str) -> dict[str, Any]:
    """Run one step. On a cluster what became of it is noted on the volume, in a file of its own, for `finish_run`."""
    run = os.environ.get(CLUSTER_RUN)
    if run is None:
        return runner.run_record(name, settings, **inputs)[0]
    file, started = _events(settings, run) / f"{name}.jsonl", time.monotonic()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)  # of an attempt that failed

    def note(**fields: Any) -> None:
        with file.open("a", encoding="utf-8") as events:
            events.write(json.dumps({"time": time.time(), "step": name, **fields}) + "\n")

    note(state="running")
    try:
        record, recalled = runner.run_record(name, settings, **inputs)
    except BaseException as error:
        note(state="failed", message=one_line(error), seconds=time.monotonic() - started)
        raise
    seconds = record["seconds"] if recalled else time.monotonic() - started
    state = "cached" if recalled else "done"
    note(state=state, seconds=seconds, digest=record["digest"], figure=record["figure"])
    return record


def finish_run(profile: str, overrides: Sequence[str], state: str, report: Any) -> str:
    """End a run on a cluster: its folder on the volume, as a run elsewhere has it, its MLflow run, and the `report`.

    `state` is what the engine says of the run; what the steps said themselves stands in their events. Returns the
    folder.
    """
    settings, run = load(profile, list(overrides)), os.environ[CLUSTER_RUN]
    view, began = RunView.of(settings, Path(os.devnull)), time.time()
    for file in sorted(_events(settings, run).glob("*.jsonl")):
        events = RunView(file, view.steps)
        events.refresh()
        began = min([began, *(step.began for step in view.steps.values() if step.began)])
    summary = runs.summarise(settings, run, view, time.time() - began, list(overrides)) | {"state": state}
    folder = settings.runs / run
    if launches(settings) and state != "SUCCEEDED":
        _remove_jobs(settings, run)
    runs.write_run(settings, folder, summary)
    tracking.finish_pipeline(settings, tracking.join_pipeline(settings, run), summary, folder)
    _write(report.path, (folder / REPORT).read_bytes())
    return str(folder)


def _remove_jobs(settings: Settings, run: str) -> None:
    """Delete what a run that was cancelled or has failed left running. Nothing of it keeps the run from being ended."""
    try:
        if names := launcher.remove(settings, run):
            progress.event(note=f"deleted what the run left: RayJob {', '.join(names)}")
    except UserError as error:
        progress.event(note=f"RayJobs of this run may be left: {error}")


def _events(settings: Settings, run: str) -> Path:
    return settings.runs / run / "events"


def numbers(settings: Settings, record: Mapping[str, Any]) -> dict[str, float]:
    """The telling numbers of a step's result, by name: what it took, rows of a table, figures of an evaluation, the
    gate's verdict."""
    found = figures.numbers(
        {"seconds": record["seconds"], "cost": record.get("cost") or {}, **(record.get("gate") or {})}
    )
    folder = _folder(settings, record)
    if manifest := _read(folder / MANIFEST):
        found |= figures.numbers({name: manifest.get(name) for name in ("rows", "quarantined")})
    if metrics := _read(folder / "metrics.json"):
        found |= figures.task_metrics(metrics.get("tasks") or {}, items=False)
        found |= figures.task_metrics({"closed_mean": metrics.get("closed_mean") or {}})
    return found


def _folder(settings: Settings, record: Mapping[str, Any]) -> Path:
    return Store(settings.home).home / "store" / str(record["digest"])


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text("utf-8"))) if file.is_file() else {}


def _write(path: str, data: bytes) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomic_write(Path(path), data)


def _metrics(settings: Settings, record: Mapping[str, Any], artifact: Any) -> None:
    found = numbers(settings, record)
    artifact.metadata.update(found)
    _write(artifact.path, json.dumps(found, indent=2, sort_keys=True).encode())


def _html(settings: Settings, record: Mapping[str, Any], artifact: Any) -> None:
    """The report that the result holds; else that of the run as far as the store knows it by now."""
    own = _folder(settings, record) / REPORT
    if own.is_file():
        _write(artifact.path, own.read_bytes())
        return
    from facemllm.report.run import write_report

    view = RunView.of(settings, Path(os.devnull))
    view.steps[str(record["step"])].digest = record["digest"]
    summary = runs.summarise(settings, settings.profile, view, 0.0, [])
    summary["seconds"] = sum(step["seconds"] or 0.0 for step in summary["steps"])
    evaluated = {step["name"]: step["digest"] for step in summary["steps"]}["evaluate"]
    Path(artifact.path).parent.mkdir(parents=True, exist_ok=True)
    write_report(Path(artifact.path), summary, Store(settings.home).path(evaluated) if evaluated else None)


def _model(settings: Settings, record: Mapping[str, Any], artifact: Any) -> None:
    """Which model it is: the bytes stay in the store, under their digest."""
    named = {name: record[name] for name in ("name", "version") if name in record}
    known = {"digest": record.get("model_digest") or record["digest"], "framework": "transformers", **named}
    artifact.metadata.update(known)
    _write(artifact.path, json.dumps(known, indent=2, sort_keys=True).encode())


_FILL = {"system.Metrics": _metrics, "system.HTML": _html, "system.Model": _model}
