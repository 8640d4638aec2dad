"""A hand-made `metrics.json` with every part an evaluation may have, and a comparison of two; small, and not sound."""

from typing import Any


def figure(value: Any, low: Any, high: Any, constant: Any = 0.5, pixels: Any = 0.4, **more: Any) -> dict[str, Any]:
    """A task's or an item's entry."""
    entry = {"metric": "balanced_accuracy", "value": value, "low": low, "high": high, "n": 560, "unreadable": 0.013}
    entry |= {
        "refused": 0.002,
        "minimum_detectable_difference": 0.031,
        "baselines": {"constant": constant, "pixels": pixels},
    }
    return entry | {"higher_is_better": True, "unit": "", "also": {}, "items": {}} | more


def group(value: float | None, people: int, too_few: bool = False) -> dict[str, Any]:
    """A group of people."""
    low, high = (None, None) if value is None else (value - 0.03, value + 0.03)
    counts = {"n": 4 * people, "people": people, "unreadable": 0.01}
    return {"value": value, "low": low, "high": high, **counts, "too_few": too_few}


def gap(a: str, b: str, value: float, p: float) -> dict[str, Any]:
    """A gap between two groups."""
    ends = {"value": value, "low": value - 0.05, "high": value + 0.05}
    test = {
        "error": 0.02,
        "own_error": 0.02,
        "degrees": 80.0,
        "growth": [0.0, 0.0],
        "p": p,
        "p_holm": p,
        "minimum_detectable_difference": 0.08,
    }
    return {"a": a, "b": b, **ends, **test}


def kind(groups: dict[str, Any], *gaps: dict[str, Any]) -> dict[str, Any]:
    """Groups of one kind with their gaps."""
    largest = max(gaps, key=lambda found: abs(found["value"]), default=None)
    named = ("a", "b", "value", "low", "high", "p_holm", "minimum_detectable_difference")
    return {"groups": groups, "gaps": list(gaps), "largest": largest and {name: largest[name] for name in named}}


def estimate(value: float, **more: Any) -> dict[str, Any]:
    """A value with an interval."""
    return {"value": value, "low": round(value - 0.02, 3), "high": round(value + 0.02, 3), **more}


ATTRIBUTES = {"eye_color": figure(0.18, 0.15, 0.21, 0.17), "Wearing_Hat": figure(0.98, 0.96, 0.99)}
EARRINGS = {"Wearing_Earrings": figure(0.62, 0.57, 0.67)}
YEARS = {"metric": "mae", "unit": "years", "higher_is_better": False}
TASKS = {
    "attributes": figure(0.81, 0.79, 0.83, also={"accuracy": estimate(0.88)}, items=ATTRIBUTES),
    "age": figure(
        9.5, 8.8, 10.1, 16.4, 12.9, **YEARS, minimum_detectable_difference=0.8, also={"within_5": estimate(0.31)}
    ),
    "zero_shot": figure(0.62, 0.57, 0.67, also={"by_likelihood": estimate(0.7)}, items=EARRINGS),
}


def broken(relation: str, model: float, truth: float, n: int) -> list[dict[str, Any]]:
    """How often a relation is broken, as the only one of its kind."""
    return [{"relation": relation, "broken_by_model": model, "broken_by_truth": truth, "n": n}]


METRICS: dict[str, Any] = {
    **{"model_digest": "ab" * 32, "conversations_digest": "cd" * 32, "predictions_digest": "ef" * 32},
    **{"split": "test", "n_images": 560, "n_subjects": 280, "tasks": TASKS},
    "closed_mean": figure(0.8, 0.78, 0.82, 0.33),
    "fairness": {
        "attributes": {
            "gender": kind({"female": group(0.86, 140), "male": group(0.72, 140)}, gap("female", "male", 0.14, 0.0004)),
            "skin_tone": kind(
                {"1-3": group(0.8, 90), "4-7": group(0.82, 150), "8-10": group(None, 12, too_few=True)},
                gap("1-3", "4-7", -0.02, 0.4),
            ),
            "gender x skin_tone": kind({"female x 1-3": group(0.85, 45), "male x 1-3": group(0.74, 45)}),
        },
        "age": {"gender": kind({"female": group(None, 5, too_few=True), "male": group(None, 4, too_few=True)})},
    },
    "consistency": {
        "relations": {
            "model": estimate(0.031, n=2000),
            "truth": estimate(0.0, n=2000),
            "by_relation": broken("No_Beard excludes Goatee", 0.05, 0.0, 560),
        },
        "captions": {
            "model": estimate(0.12, n=900),
            "truth": estimate(0.01, n=900),
            "by_relation": broken("the caption agrees on age", 0.12, 0.01, 900),
        },
        "ways": {
            "unseen": {"accuracy": estimate(0.79), "agreement": estimate(0.93), "outright": estimate(0.81), "n": 900},
            "statement": {
                "accuracy": estimate(0.7),
                "agreement": estimate(0.81),
                "outright": estimate(0.92),
                "blind": 0.55,
                "n": 700,
            },
        },
    },
    "calibration": {
        "attributes": {
            **{"ece": 0.061, "expected": 0.012, "n": 4000},
            "bins": [
                {"confidence": None, "accuracy": None, "n": 0},
                {"confidence": 0.55, "accuracy": 0.5, "n": 100},
                {"confidence": 0.97, "accuracy": 0.92, "n": 3900},
            ],
        },
        "expression": {"ece": None, "expected": None, "n": 0, "bins": []},
    },
    "confusion": {
        "expression.expression": {"labels": ["anger", "happiness"], "counts": [[30, 9], [4, 60]], "unreadable": [1, 0]}
    },
    "slices": {
        "profile": {"people": 40, "n": 500, "closed_mean": estimate(0.7)},
        "occluded": {"people": 3, "n": 12, "closed_mean": None},
    },
    "disturbed": {
        "blur": {
            **{"faces": 100, "trained": True, "before": 0.8},
            **{"after": estimate(0.65), "change": estimate(-0.15)},
        },
        "jpeg": {
            **{"faces": 100, "trained": False, "before": estimate(0.8)},
            **{"after": estimate(0.8), "change": estimate(0.0)},
        },
        "no_map": {"faces": 100, "before": estimate(0.8), "after": estimate(0.77), "change": estimate(-0.03)},
    },
    "combinations": {
        "Eyeglasses with Dark_Brown_Hair": {
            **{"faces": 41, "people": 12, "too_few": True, "all": estimate(0.7), "expected": estimate(0.9)},
            **{"difference": estimate(-0.2), "baselines": {"constant": 0.0, "pixels": 0.3}},
            "characteristics": {
                name: {
                    **{"together": estimate(0.8), "apart": estimate(0.95), "difference": estimate(-0.15)},
                    **{"faces_apart": 103, "people_apart": 95, "baselines": {"constant": 0.0, "pixels": 0.6}},
                }
                for name in ("Eyeglasses", "Dark_Brown_Hair")
            },
        },
        "Bangs with Brown_Hair": {
            **{"faces": 0, "people": 0, "too_few": True, "baselines": {}, "characteristics": {}},
            **{name: dict.fromkeys(("value", "low", "high")) for name in ("all", "expected", "difference")},
        },
    },
    "generation": {
        **{"agreement": estimate(0.97), "n": 640, "by_task": {"attributes": {"value": 0.98, "n": 500}}},
        **{"unreadable": 0.01, "both_unreadable": 0.004},
    },
    "maps": {"faces": 560, "given": 550},
    "characteristics": {
        **{"n": 5000, "scores": estimate(0.9), "text": estimate(0.86), "agreement": estimate(0.94)},
        **{"balanced": {"scores": 0.85, "text": 0.81}, "ece": 0.03},
        "bins": [{"confidence": 0.9, "accuracy": 0.9, "n": 5000}],
        "by_characteristic": [
            {
                **{"name": "Bald", "n": 400, "yes": 0.1, "scores": {"accuracy": 0.97, "balanced_accuracy": 0.9}},
                **{"text": {"accuracy": 0.95, "balanced_accuracy": 0.84}, "agreement": 0.98},
            }
        ],
        "relations": {
            **{"n": 700, "scores": estimate(0.02), "text": estimate(0.04), "labels": estimate(0.0)},
            "by_relation": [
                {"relation": "at most one of Bald, Bangs", "n": 300, "scores": 0.01, "text": 0.02, "labels": 0.0}
            ],
        },
    },
}
COST = {
    "align": {
        **{"device": "CPU, 2 threads, bf16", "seconds": 160.2, "samples": 76800, "tokens": 2764800},
        **{"flops": 3_400_000_000_000, "peak_memory_bytes": 1_300_000_000},
        **{"energy_cpu_joules": None, "energy_gpu_joules": None},
    },
    "evaluate": {"device": "CPU, 2 threads", "seconds": 20.0, "samples": 560, "peak_memory_bytes": 900_000_000},
}


def paired(first: float, second: float, p: float | None, **more: Any) -> dict[str, Any]:
    """A figure of two evaluations, as `scoring.paired.compare` gives it."""
    entry = {"metric": "balanced_accuracy", "unit": "", "higher_is_better": True, "first": first, "second": second}
    entry |= {"difference": estimate(round(second - first, 3)), "p": p, "p_holm": p, "n": 560, "people": 280}
    return entry | {"minimum_detectable_difference": 0.031} | more


COMPARISON: dict[str, Any] = {
    **{"first": "ab" * 32, "second": "ba" * 32, "conversations_digest": "cd" * 32},
    **{"split": "test", "n_images": 560, "n_subjects": 280, "settings": {"train.workers": ("1", "2")}},
    "figures": {
        "closed_mean": paired(0.8, 0.86, 0.001),
        "attributes": paired(0.81, 0.87, 0.002),
        "age": paired(9.5, 11.0, 0.001, metric="mae", unit="years", higher_is_better=False),
        "expression": paired(0.6, 0.61, 0.7),
        "attributes.Wearing_Hat": paired(0.98, 0.9, 0.01),
        "attributes.eye_color": paired(0.2, 0.2, None),
        "expression.expression": paired(0.6, 0.61, 0.7),
    },
    "groups": {
        "attributes": {"gender": {"female": paired(0.86, 0.8, 0.02), "male": paired(0.7, 0.72, 0.3)}},
        "age": {},
    },
}
