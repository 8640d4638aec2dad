"""How well the served model was evaluated: what `deploy` writes of an evaluation, and what the server makes of it.

The file tells of each task and item the figure, its 95 % interval and the number of questions, and of tasks that are
answered by a class how a probability is to be read: `calibration` is [confidence, share of right answers] by bins of
the evaluation, made monotone (isotonic regression, weighted by answers).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from facemllm.core.files import atomic_write
from facemllm.errors import UserError
from facemllm.serve import model_store

_FIGURE = ("metric", "value", "low", "high", "n", "unit", "higher_is_better")


class Evaluated:
    """Figures of tasks by name (`tasks`), and the calibration of their probabilities."""

    def __init__(self, tasks: Mapping[str, Mapping[str, Any]] | None = None, split: str | None = None) -> None:
        self.tasks, self.split = tasks or {}, split
        points = {name: figures.get("calibration") for name, figures in self.tasks.items()}
        self._points = {name: np.array(found, float).T for name, found in points.items() if found}

    @classmethod
    def read(cls, place: str | Path | None) -> Evaluated:
        """What a file says, of this machine or of a model store; nothing is known without one. Raises UserError."""
        if place is None:
            return cls()
        try:
            data = json.loads(model_store.read(str(place)))
            return cls(data["tasks"], data.get("split"))
        except (UserError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"--evaluated {place}: cannot be read ({error}); `deploy` writes such a file") from None

    def calibrated(self, task: str, probability: float) -> float:
        """The share of answers of so much confidence that were right; as it is where evaluation did not measure it."""
        if task not in self._points:
            return probability
        confidence, right = self._points[task]
        return float(np.interp(probability, confidence, right))


def of_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What the server is told of an evaluation's `metrics.json`."""
    tasks = {}
    for name, figures in metrics["tasks"].items():
        items = {item: _figure(own) for item, own in figures.get("items", {}).items()}
        measured = metrics.get("calibration", {}).get(name)
        tasks[name] = {**_figure(figures), "items": items}
        if measured:
            tasks[name] |= {"ece": measured["ece"], "calibration": _points(measured["bins"])}
    return {"split": metrics.get("split"), "tasks": tasks}


def written(metrics: Mapping[str, Any]) -> bytes:
    """The file that tells the server of an evaluation."""
    return json.dumps(of_metrics(metrics), indent=2).encode()


def write(metrics: Mapping[str, Any], path: Path) -> Path:
    """Leave what the server is told of an evaluation in a file."""
    atomic_write(path, written(metrics))
    return path


def _figure(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: figures[name] for name in _FIGURE if name in figures}


def _points(bins: list[Mapping[str, Any]]) -> list[list[float]]:
    from sklearn.isotonic import IsotonicRegression

    (right,) = {name for one in bins for name in one} - {"confidence", "n"}
    confidence, shares, n = ([one[name] for one in bins] for name in ("confidence", right, "n"))
    fitted = IsotonicRegression(y_min=0, y_max=1).fit_transform(confidence, shares, sample_weight=n)
    return [[float(x), float(y)] for x, y in zip(confidence, fitted, strict=True)]
