"""What runs have put into MLflow, read back: training curves and tables."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from facemllm.settings import Settings
from facemllm.tracking.client import connect, guard, uri


def curve(settings: Settings, run_id: str) -> list[dict[str, float]]:
    """A run's training curves: one dictionary a logged step, with `step` and the metrics logged there, in step order.

    Metrics logged once only are no curves. Where a step was logged twice (training resumed), the later value counts.
    Raises UserError if MLflow cannot be reached.
    """
    client = connect(settings)
    steps: dict[int, dict[str, float]] = {}
    with guard(uri(settings)):
        for name in client.get_run(run_id).data.metrics:
            history = client.get_metric_history(run_id, name)
            if len(history) < 2:
                continue
            for point in sorted(history, key=lambda p: p.timestamp):
                steps.setdefault(point.step, {"step": point.step})[name] = point.value
    return [steps[step] for step in sorted(steps)]


def table(settings: Settings, run_id: str, name: str) -> list[dict[str, Any]]:
    """Rows of the table `name` of a run; none if it was not recorded. Raises UserError if MLflow cannot be reached."""
    client = connect(settings)
    with guard(uri(settings)), tempfile.TemporaryDirectory() as folder:
        folders = client.list_artifacts(run_id, str(Path(name).parent))
        if not any(found.path == f"{name}.json" for found in folders):
            return []
        stored = json.loads(Path(client.download_artifacts(run_id, f"{name}.json", folder)).read_text("utf-8"))
    return [dict(zip(stored["columns"], row, strict=True)) for row in stored["data"]]
