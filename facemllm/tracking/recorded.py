"""What a run in MLflow holds beside its figures (parameters, datasets, a note), and curves and tables read back."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facemllm.core.store import Store
from facemllm.errors import UserError
from facemllm.scoring.figures import flatten
from facemllm.settings import Settings, load
from facemllm.tracking.client import session

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

TABLES = ("faces", "annotated", "conversations")
"""Inputs of steps that are tables."""
SECTIONS = dict.fromkeys(("gate", "register", "await_approval"), "promote")
SECTIONS |= dict.fromkeys(("deploy", "release"), "serve")
"""Sections of the settings whose name is not that of their step."""


def pipeline_params(settings: Settings) -> dict[str, str]:
    """Parameters of a pipeline's run: profile, seed, model preset, and every setting that differs from its profile."""
    chosen = {"profile": settings.profile, "seed": str(settings.seed), "model.preset": settings.model.preset}
    with suppress(UserError):  # a profile that says nothing without an override
        usual = flatten(load(settings.profile).model_dump())
        chosen |= {name: text for name, text in flatten(settings.model_dump()).items() if usual.get(name) != text}
    return chosen


def step_params(settings: Settings, step: str) -> dict[str, str]:
    """Parameters of a step's run: the settings that the step depends on, those of a stage itself without a prefix."""
    section = SECTIONS.get(step, step)
    params: dict[str, Any] = {"profile": settings.profile, "seed": settings.seed}
    if plan := settings.stages().get(step):
        branches = {"segmentation": settings.model.segmentation.mode != "none"}
        branches["knowledge"] = settings.model.knowledge.enabled
        model = settings.model.model_dump(exclude={branch for branch, is_on in branches.items() if not is_on})
        params |= {**plan.model_dump(), "train": settings.train.model_dump(exclude={"stages"}), "model": model}
    elif section in type(settings).model_fields:
        params[section] = getattr(settings, section).model_dump()
    return {name: text for name, text in flatten(params).items() if text != "null"}


def datasets(settings: Settings, inputs: Mapping[str, str], context: str) -> list[DatasetInput]:
    """The tables among a step's inputs as MLflow's datasets: name, digest, rows, and where they lie in the store."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    found = []
    for name, digest in inputs.items():
        folder = settings.home / "store" / digest
        if name in TABLES and (folder / "manifest.json").is_file():
            rows = json.loads((folder / "manifest.json").read_text("utf-8")).get("rows")
            source, profile = json.dumps({"uri": str(folder.resolve())}), json.dumps({"num_rows": rows})
            dataset = Dataset(name, digest[:12], "local", source, profile=profile)
            found.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
    return found


def page(experiment_id: str, *run: str) -> str:
    """Address of an experiment's runs, of one run or a part of it, below that of the server.

    MLflow 3 opens its GenAI view, without metrics and datasets, unless the address says otherwise.
    """
    return f"#/{'/'.join(['experiments', experiment_id, 'runs', *run])}?workflowType=machine_learning"


def note(settings: Settings, experiment_id: str, run_id: str, summary: Mapping[str, Any], report: bool) -> str:
    """The Markdown note on a pipeline's run: a link to the report, and a row a step, linked to the run that made it."""
    head = [f"[Report]({page(experiment_id, run_id, 'artifacts/report.html')})", ""] if report else []
    made = Store(settings.home).records()
    rows = []
    for step in summary.get("steps") or ():
        name, record = step["name"], made.get(step.get("digest") or "", {})
        own = record.get("run_id") if record.get("step") == name else None
        linked = f"[{name}]({page(experiment_id, own)})" if own else name
        state = "recalled" if step["state"] == "cached" else step["state"]
        rows.append(f"| {linked} | {state} | {str(step.get('figure') or '').replace('|', '/')} |")
    return "\n".join([*head, "| step | state | |", "|---|---|---|", *rows])


def curve(settings: Settings, run_id: str) -> list[dict[str, float]]:
    """A run's training curves: one dictionary a logged step, with `step` and the metrics logged there, in step order.

    Metrics logged once only are no curves. Where a step was logged twice (training resumed), the later value counts.
    Raises UserError if MLflow cannot be reached.
    """
    steps: dict[int, dict[str, float]] = {}
    with session(settings) as client:
        for name in client.get_run(run_id).data.metrics:
            history = client.get_metric_history(run_id, name)
            if len(history) < 2:
                continue
            for point in sorted(history, key=lambda p: p.timestamp):
                steps.setdefault(point.step, {"step": point.step})[name] = point.value
    return [steps[step] for step in sorted(steps)]


def table(settings: Settings, run_id: str, name: str) -> list[dict[str, Any]]:
    """Rows of the table `name` of a run; none if it was not recorded. Raises UserError if MLflow cannot be reached."""
    with session(settings) as client, tempfile.TemporaryDirectory() as folder:
        folders = client.list_artifacts(run_id, str(Path(name).parent))
        if not any(found.path == f"{name}.json" for found in folders):
            return []
        stored = json.loads(Path(client.download_artifacts(run_id, f"{name}.json", folder)).read_text("utf-8"))
    return [dict(zip(stored["columns"], row, strict=True)) for row in stored["data"]]
