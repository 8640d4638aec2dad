"""`report.html` of a run: one file that opens anywhere, with no network and no scripts.

It shows what was not learnt as plainly as what was, and says what kind of data it is about. A section whose figures are
absent is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from facemllm.core.files import atomic_write
from facemllm.report import plots
from facemllm.report.kit import Figure, embedded, render, seconds, text, top_of
from facemllm.scoring import figures
from facemllm.scoring.figures import measure
from facemllm.scoring.metrics import CLOSED_MEAN, clears_constant
from facemllm.tasks import ZERO_SHOT

Verdict = tuple[str, str] | None
"""A word on a figure and how it is coloured."""

_WORSE: Verdict = ("worse than a constant answer", "bad")
_LEARNT: Sequence[Verdict] = (("not learnt", "bad"), ("below pixels", "warn"), None)
_ABOVE_CHANCE: Sequence[Verdict] = (("not shown", "quiet"), ("above chance", "good"), ("above chance", "good"))
_TERMS = {
    "loss/answers": "loss of answers",
    "loss/caption_words": "loss of caption words",
    "loss/characteristics": "loss of characteristics",
    "loss/logic": "penalty of broken relations",
    "learning_rate": "learning rate",
    "grad_norm": "norm of the gradient",
}
_SPEEDS = {"images_per_second": "faces/s", "samples_per_second": "faces/s", "tokens_per_second": "tokens/s"}


def write_report(
    out_html: Path,
    summary: Mapping[str, Any],
    evaluation_dir: Path | None = None,
    training: Mapping[str, Any] | None = None,
    *,
    source: str = "render",
) -> None:
    """Write the report of a run's `summary.json`, with its evaluation's items and samples and what training recorded.

    `summary` may also hold the `commit` of the code, the `overrides` of the settings and the `sources`, a row of the
    ledger each. `training` holds by stage the `curves` (a dictionary a logged step) and `samples` of answers, further
    the audited `relations`, `pictures` of the sampled faces by image_id and the settings of the `branches`; any may be
    absent. `source` is the faces' source key; `render` means synthetic heads.
    """
    metrics: Mapping[str, Any] = {}
    samples: list[dict[str, Any]] = []
    if evaluation_dir is not None:
        metrics = _json(evaluation_dir / "metrics.json", {})
        folder = evaluation_dir / "samples"
        for sample in _json(folder / "samples.json", []):
            samples.append({**sample, "picture": embedded((folder / sample["image"]).read_bytes(), "image/jpeg")})
    atomic_write(out_html, page(summary, metrics, samples, training or {}, source).encode())


def page(
    summary: Mapping[str, Any],
    metrics: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    training: Mapping[str, Any],
    source: str,
) -> str:
    """The page as HTML: `metrics` is `metrics.json`; every sample has its `picture` as an address."""
    tasks = _tasks(summary, metrics)
    zero_shot = tasks.pop(ZERO_SHOT, None)
    checks = (summary.get("gate") or {}).get("checks") or ()
    limits = {check["key"]: check for check in checks if check["kind"] == "threshold"}
    closed = metrics.get(CLOSED_MEAN) or summary.get(CLOSED_MEAN)
    rows, trust = _results(tasks, closed, limits) if tasks else [], figures.trust(metrics)
    return render(
        "run.html.jinja",
        measure=measure,
        summary=summary,
        metrics=metrics,
        source=source,
        synthetic=source == "render",
        rows=rows,
        unlearnt=[row["full_name"] for row in rows if row["full_name"] and not row["learnt"]],
        further=_further({"all closed questions": closed or {}, **tasks}) if tasks else [],
        zero_shot=[] if zero_shot is None else _zero_shot(zero_shot),
        fairness=_fairness(metrics),
        gaps=trust["gaps"],
        below_blind=trust["below_blind"],
        shown_gaps=figures.shown_gaps(metrics),
        gap_limits={check["key"]: check["limit"] for check in checks if check["kind"] == "fairness"}
        if checks
        else None,
        plots=_reliability(metrics),
        training=training,
        curves=[_curve(stage, points) for stage, points in (training.get("curves") or {}).items() if points],
        learning=_learning(training.get("samples") or {}, training.get("pictures") or {}),
        samples=samples,
        outcome={n: summary[n] for n in ("model", "approval", "endpoint") if summary.get(n) is not None},
        costs=_costs(summary.get("cost") or {}),
    )


def _json(path: Path, absent: Any) -> Any:
    return json.loads(path.read_text("utf-8")) if path.is_file() else absent


def _tasks(summary: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Figures by task, those of the summary first; items, which a summary may lack, from the metrics."""
    full = metrics.get("tasks") or {}
    found = summary.get("tasks") or full
    return {
        name: {**full.get(name, {}), **entry, "items": entry.get("items") or full.get(name, {}).get("items") or {}}
        for name, entry in found.items()
    }


def _results(
    tasks: Mapping[str, Mapping[str, Any]], closed: Figure | None, limits: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A row a task with its items beneath; the mean of all closed questions first."""
    rows = [_row("all closed questions", closed, "task", limits.get(CLOSED_MEAN))] if closed else []
    for name, entry in tasks.items():
        rows.append(_row(name, entry, "task", limits.get(name), full_name=name))
        for item, figure in entry["items"].items():
            rows.append(_row(item, figure, "item", limits.get(f"{name}.{item}"), full_name=f"{name} {item}"))
    return rows


def _zero_shot(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = [_row("held-out attributes", entry, "task", verdicts=_ABOVE_CHANCE)]
    items = entry["items"] if len(entry["items"]) > 1 else {}
    return rows + [_row(item, part, "item", verdicts=_ABOVE_CHANCE) for item, part in items.items()]


def _row(
    name: str,
    figure: Figure,
    kind: str,
    limit: Mapping[str, Any] | None = None,
    full_name: str = "",
    verdicts: Sequence[Verdict] = _LEARNT,
) -> dict[str, Any]:
    """A figure with what is said of it: `way` is how far it is from the constant answer to no error at all."""
    how, learnt, rivals = measure(figure), clears_constant(figure), figure["baselines"]
    verdict = verdicts[learnt + (learnt and _beats(figure, rivals.get("pixels"), how.higher_is_better))]
    marks = [{"value": rivals.get(rival)} for rival in ("constant", "pixels")]
    return {
        "name": name,
        "full_name": full_name,
        "figure": figure,
        "kind": kind,
        "limit": limit,
        "measure": how,
        "learnt": learnt,
        "verdict": _WORSE if _is_worse(figure, rivals.get("constant"), how.higher_is_better) else verdict,
        "way": _way(figure["value"], rivals.get("constant"), 1.0 if how.higher_is_better else 0.0),
        "top": top_of([figure, *marks], how.higher_is_better),
    }


def _beats(figure: Figure, rival: float | None, higher_is_better: bool) -> bool:
    return rival is None or bool(figure["value"] > rival if higher_is_better else figure["value"] < rival)


def _is_worse(figure: Figure, constant: float | None, higher_is_better: bool) -> bool:
    """Whether the whole interval lies on the bad side of a constant answer."""
    low, high = figure.get("low"), figure.get("high")
    if constant is None or low is None or high is None:
        return False
    return bool(high < constant if higher_is_better else low > constant)


def _way(value: float | None, constant: float | None, best: float) -> float | None:
    """Share of the way from the constant answer's figure to the best there is; below zero if it is worse than that."""
    if value is None or constant is None or constant == best:
        return None
    return (value - constant) / (best - constant)


def _further(entries: Mapping[str, Figure]) -> list[tuple[str, Figure, Any]]:
    """Figures with further metrics, refusals or a power that is known."""
    return [
        (name, entry, measure(entry))
        for name, entry in entries.items()
        if entry.get("also")
        or entry.get("minimum_detectable_difference") is not None
        or entry.get("refused") is not None
    ]


def _fairness(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Groups of people by task, beside how the task's figures are written; empty if no group is known."""
    found = metrics.get("fairness") or {}
    if not any(found.values()):
        return {}
    tasks = metrics.get("tasks") or {}
    return {task: {"kinds": kinds, "measure": measure(tasks.get(task, {}))} for task, kinds in found.items()}


def _reliability(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Reliability plots of tasks and of the scores of characteristics, and the tasks that have none."""
    calibration, scores = metrics.get("calibration") or {}, metrics.get("characteristics") or {}
    known = {task: body for task, body in calibration.items() if plots.filled(body)}
    return {
        "calibration": _drawn(plots.reliability(known), _bins_in_words(known)) if known else None,
        "uncalibrated": [task for task in calibration if task not in known],
        "scores": _drawn(plots.reliability({"scores": scores}), _bins_in_words({"scores": scores}))
        if plots.filled(scores)
        else None,
    }


def _bins_in_words(calibration: Mapping[str, Any]) -> str:
    by_task = {
        task: ", ".join(f"{one['confidence']:.2f}: {one['accuracy']:.2f} of {one['n']}" for one in plots.filled(body))
        for task, body in calibration.items()
    }
    return "share right by confidence; " + "; ".join(f"{task} {bins}" for task, bins in by_task.items())


def _drawn(figure: Any, alt: str) -> dict[str, str]:
    return {"address": embedded(plots.svg(figure), "image/svg+xml"), "alt": alt}


def _curve(stage: str, points: plots.Points) -> dict[str, Any]:
    """A stage's loss by step and, apart, its terms, tasks, rate and gradient."""
    logged = sorted({name for point in points for name in point})
    tasks = {n: f"loss of task {n.split('/', 2)[2].replace('_', ' ')}" for n in logged if n.startswith("loss/task/")}
    terms = {name: said for name, said in _TERMS.items() if name in logged} | tasks
    loss, further = plots.curve(points, {"loss": ""}), plots.curve(points, terms)
    alts = [plots.curve_in_words(points, name) for name in terms]
    return {
        "name": stage,
        "said": _stage_in_words(points),
        "loss": loss and _drawn(loss, plots.curve_in_words(points)),
        "further": further and _drawn(further, "; ".join(alts)),
        "terms": list(terms.values()),
    }


def _stage_in_words(points: plots.Points) -> str:
    """A stage in a line: how far it came, how fast, with how much memory."""
    last = points[-1]
    said = [f"loss {text(last.get('loss'))} after {text(last.get('step'))} steps"]
    for name, unit in _SPEEDS.items():
        if (mean := _mean(points, name)) is not None:
            said.append(f"{mean:,.0f} {unit}")
    if (mean := _mean(points, "mfu")) is not None:
        said.append(f"{mean:.0%} of the peak operations")
    if peak := max((p.get("memory_bytes") or 0.0 for p in points), default=0.0):
        said.append(f"{peak / 2**30:.2f} GiB")
    if peak := max((p.get("learning_rate") or 0.0 for p in points), default=0.0):
        said.append(f"rate up to {peak:.1e}")
    return " · ".join(said)


def _mean(points: plots.Points, name: str) -> float | None:
    values = [point[name] for point in points if isinstance(point.get(name), int | float)]
    return sum(values) / len(values) if values else None


def _learning(
    samples: Mapping[str, Sequence[Mapping[str, Any]]], pictures: Mapping[str, bytes]
) -> list[dict[str, Any]]:
    """What the model said of the same few faces after each stage, a face an entry: a row a question."""
    stages = {stage: rows for stage, rows in samples.items() if rows}
    said = {stage: {(row["image_id"], row["task"], row["item"]): row for row in rows} for stage, rows in stages.items()}
    every = {key: row for rows in said.values() for key, row in rows.items()}
    return [
        {
            "image": image,
            "picture": embedded(pictures[image], "image/jpeg") if image in pictures else None,
            "stages": [f"after {stage}" for stage in said],
            "rows": [
                {**row, "said": [rows.get(key) for rows in said.values()]}
                for key, row in every.items()
                if key[0] == image
            ],
        }
        for image in dict.fromkeys(key[0] for key in every)
    ]


_COSTS = {
    "device": ("device", text),
    "seconds": ("time", seconds),
    "samples": ("faces", text),
    "tokens": ("tokens", text),
    "flops": ("operations", lambda value: _scaled(value, "FLOP")),
    "peak_memory_bytes": ("peak memory", lambda value: f"{value / 2**30:.2f} GiB"),
    "energy_cpu_joules": ("energy, processors", lambda value: f"{value / 3600:.2f} Wh"),
    "energy_gpu_joules": ("energy, GPU", lambda value: f"{value / 3600:.2f} Wh"),
    "price": ("price", text),
}
_ADDED = ("seconds", "tokens", "flops", "energy_cpu_joules", "energy_gpu_joules", "price")


def _costs(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the run's steps cost: a row a step and their sum, a column for whatever is known of one of them."""
    stages = {name: body for name, body in found.items() if isinstance(body, Mapping)}
    if not stages:
        return {}
    known = {key for body in stages.values() for key, value in body.items() if value is not None}
    names = [name for name in _COSTS if name in known] + sorted(known - set(_COSTS))
    sums = {name: _sum([body.get(name) for body in stages.values()]) for name in _ADDED if name in known}
    lines = {**stages, **({"together": sums} if len(stages) > 1 else {})}
    notes = ["Time and energy of the work itself, without starting up."]
    if "flops" in known:
        counted = "matrix products, convolutions and attention, counted on one step and scaled by tokens"
        notes.append(f"Operations: {counted}.")
    if not known & {"energy_cpu_joules", "energy_gpu_joules"}:
        notes.append("This machine reports no energy to this user.")
    return {
        "notes": notes,
        "head": ["step", *(_COSTS[name][0] if name in _COSTS else name.replace("_", " ") for name in names)],
        "numeric": [place for place, name in enumerate(names, 1) if name != "device"],
        "rows": [(stage, [_cost(body, name) for name in names]) for stage, body in lines.items()],
    }


def _sum(amounts: Sequence[float | None]) -> float | None:
    """A sum is known where everything added is."""
    known = [amount for amount in amounts if amount is not None]
    return sum(known) if len(known) == len(amounts) else None


def _cost(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    return "–" if value is None else _COSTS[name][1](value) if name in _COSTS else text(value)


def _scaled(value: float, unit: str) -> str:
    """A large number with the prefix that keeps it short: `12.3 TFLOP`."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(value) < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} Z{unit}"
