"""What the cells say together: means over seeds, and differences to the baseline, seed against same seed.

A seed decides the initial weights and the order of the faces, so two variants of one seed share what luck the order
brings, and their difference varies less than they do. Intervals are 95 % t intervals over seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from facemllm.scoring import stats
from facemllm.scoring.metrics import CLOSED_MEAN, METRICS
from studies.ablation.running import WITH_MAP, WITHOUT_MAP

LOWER_IS_BETTER = ("broken", *(metric.name for metric in METRICS.values() if not metric.higher_is_better))
BETTER, WORSE, SAME = "better", "worse", "no difference shown"
HEADS = (
    CLOSED_MEAN,
    "attributes",
    "expression",
    "gender",
    "age",
    "head_pose.yaw",
    "relations",
    "scores",
    "scores_relations",
)
"""Figures of the table, in order; all others stand in the JSON."""

Record = Mapping[str, Any]


def together(records: Iterable[Record], baseline: str, controls: Mapping[str, str] | None = None) -> dict[str, Any]:
    """By variant: seeds, seconds, and every figure's mean over seeds with its interval and its paired `difference` to
    the baseline with the verdict on it.

    `controls` names for some variants another one to hold them against as well: `to_control` has those figures.

    A variant that takes maps is there with its answers to faces with one; `without_map` holds the same for the faces
    alone. A verdict is `better` or `worse` where the interval leaves out zero; `held` tells whether it also stands
    Holm's correction for the number of variants.
    """
    by_variant: dict[str, dict[int, Record]] = {}
    for record in records:
        by_variant.setdefault(record["variant"], {})[record["seed"]] = record
    metrics = {
        name: kind for own in by_variant.values() for one in own.values() for name, kind in one["metrics"].items()
    }
    rivals = {seed: _shown(record, WITH_MAP) for seed, record in by_variant.get(baseline, {}).items()}
    found: dict[str, Any] = {}
    for name, own in by_variant.items():
        maps = any(WITH_MAP in record["figures"] for record in own.values())
        found[name] = {
            "seeds": sorted(own),
            **{
                kind: statistics.fmean(record[kind] for record in own.values())
                for kind in ("seconds", "processor_seconds")
            },
            "stages": {
                stage: {
                    kind: statistics.fmean(record["stages"][stage][kind] for record in own.values()) for kind in one
                }
                for stage, one in _numbers(next(iter(own.values()))["stages"]).items()
            },
            "figures": _figures(own, WITH_MAP, rivals if name != baseline else {}, metrics),
            "without_map": _figures(own, WITHOUT_MAP, rivals, metrics) if maps else None,
            "to_control": None,
        }
        if control := by_variant.get((controls or {}).get(name, "")):
            shown = {seed: _shown(record, WITH_MAP) for seed, record in control.items()}
            found[name]["to_control"] = _figures(own, WITH_MAP, shown, metrics)
    for kind in ("figures", "without_map", "to_control"):
        for figure in metrics:
            _correct([found[name][kind][figure] for name in found if figure in (found[name][kind] or {})])
    return found


def _numbers(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {k: v for k, v in one.items() if not isinstance(v, Mapping)} for name, one in stages.items()}


def _shown(record: Record, kind: str) -> Mapping[str, float]:
    """Figures of a cell: those with maps where it has them and they are asked for."""
    figures: Mapping[str, Mapping[str, float]] = record["figures"]
    return figures.get(kind, figures[WITHOUT_MAP])


def _figures(
    own: Mapping[int, Record], kind: str, rivals: Mapping[int, Mapping[str, float]], metrics: Mapping[str, str]
) -> dict[str, Any]:
    values = {seed: _shown(record, kind) for seed, record in own.items()}
    found: dict[str, Any] = {}
    for name, metric in metrics.items():
        here = [one[name] for one in values.values() if name in one]
        pairs = [
            (one[name], rivals[seed][name])
            for seed, one in values.items()
            if name in one and name in rivals.get(seed, {})
        ]
        if here:
            found[name] = {"metric": metric, **mean(here)}
            if pairs:
                found[name]["difference"] = _difference(pairs, metric in LOWER_IS_BETTER)
    return found


def mean(values: Sequence[float]) -> dict[str, Any]:
    """Mean and 95 % t interval of independent values; no interval for one alone."""
    count = len(values)
    error = statistics.stdev(values) / math.sqrt(count) if count > 1 else math.nan
    return {**stats.t_interval(statistics.fmean(values), error, count), "n": count}


def _difference(pairs: Sequence[tuple[float, float]], lower_is_better: bool) -> dict[str, Any]:
    gaps = [one - other for one, other in pairs]
    found = mean(gaps)
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    verdict = SAME
    if found["low"] is not None and (found["low"] > 0 or found["high"] < 0):
        verdict = WORSE if (found["value"] > 0) == lower_is_better else BETTER
    return {**found, "p": stats.plain(stats.p_value(found["value"], error, len(gaps))), "verdict": verdict}


def _correct(figures: Sequence[dict[str, Any]]) -> None:
    """Holm's correction of one figure's differences, over the variants."""
    gaps = [figure["difference"] for figure in figures if "difference" in figure]
    for gap, p in zip(gaps, stats.holm([math.nan if g["p"] is None else g["p"] for g in gaps]), strict=True):
        gap["held"] = gap["verdict"] != SAME and p < stats.SHOWN
