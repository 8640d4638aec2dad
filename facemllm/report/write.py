"""`report.html` of a run: one file that opens anywhere, with no network and no scripts.

It shows what was not learnt as plainly as what was, and says what kind of data it is about. Everything that comes from
outside is escaped; images are embedded. A section whose figures are absent is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from facemllm.core.files import atomic_write
from facemllm.report import html
from facemllm.report.fairness import fairness
from facemllm.report.overview import cost, gate, header, model, samples, steps
from facemllm.report.results import results, zero_shot
from facemllm.report.training import branches, curves_of, learning, relations
from facemllm.report.trust import calibration, characteristics, confusion, consistency, generation, maps, robustness


def write_report(
    out_html: Path,
    summary: Mapping[str, Any],
    evaluation_dir: Path | None = None,
    training: Mapping[str, Any] | None = None,
    *,
    source: str = "render",
) -> None:
    """Write the report of a run's `summary.json`, with its evaluation's items and samples and what training recorded.

    `training` holds by stage the `curves` (a dictionary a logged step) and `samples` of answers, further the audited
    `relations`, `pictures` of the sampled faces by image_id and the settings of the `branches`; any may be absent.
    `source` is the faces' source key; `render` means synthetic heads. A step may carry `figure`, a few telling words.
    """
    metrics = _json(evaluation_dir / "metrics.json") if evaluation_dir else {}
    said = _json(evaluation_dir / "samples" / "samples.json") if evaluation_dir else []
    told = training or {}
    sections = [
        header(summary, source),
        gate(summary.get("gate")),
        results(summary, metrics),
        zero_shot(summary, metrics),
        fairness(metrics),
        consistency(metrics.get("consistency")),
        calibration(metrics.get("calibration")),
        characteristics(metrics.get("characteristics")),
        robustness(metrics.get("slices"), metrics.get("disturbed"), maps(metrics.get("maps"), source)),
        generation(metrics.get("generation")),
        confusion(metrics.get("confusion")),
        branches(told.get("branches")),
        relations(told.get("relations")),
        curves_of(told.get("curves") or {}),
        learning(told.get("samples") or {}, told.get("pictures") or {}),
        samples(said, evaluation_dir),
        steps(summary.get("steps") or []),
        model(summary),
        cost(summary.get("cost")),
    ]
    atomic_write(out_html, html.page(str(summary.get("run") or "run"), sections))


def _json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}
