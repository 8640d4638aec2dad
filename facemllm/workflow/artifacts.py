"""What a step shows in Kubeflow's pages besides the value it hands on: numbers, a report, a model.

Artifacts are those of the pipeline engine, told apart by their `schema_title`; each has a `path` for its file and
`metadata`, which is what the pages show. Every one gets a file: an engine that remembers a task looks for it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from facemllm.core.files import atomic_write
from facemllm.core.store import Store
from facemllm.scoring import figures
from facemllm.settings import Settings, load
from facemllm.tables import MANIFEST
from facemllm.workflow import runner

REPORT = "report.html"


def run_component(name: str, profile: str, overrides: Sequence[str], artifacts: Sequence[Any], **inputs: str) -> str:
    """Run one step as `runner.execute` does, fill the engine's artifacts, and return what the next step is given."""
    settings = load(profile, list(overrides))
    record = runner.run_record(name, settings, **inputs)
    for artifact in artifacts:
        _FILL[artifact.schema_title](settings, record, artifact)
    return str(record["output"])


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
    from facemllm.workflow.runs import RunView, summarise

    view = RunView.of(settings, Path(os.devnull))
    view.steps[str(record["step"])].digest = record["digest"]
    summary = summarise(settings, settings.profile, view, 0.0, [])
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
