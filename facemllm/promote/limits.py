"""The limits that the gate judges by, each beside what plain `params.yaml` says: what was loosened, what tightened."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from facemllm.settings import Settings, plain


@dataclass(frozen=True)
class Limit:
    """A limit under its name among the settings. `value` None asks for nothing; the higher `strictness`, the fewer
    models pass."""

    value: Any
    strictness: float


@dataclass(frozen=True)
class Change:
    """A limit that is not the one of `params.yaml`, which is `default`."""

    key: str
    value: Any
    default: Any
    loosened: bool

    def __str__(self) -> str:
        return f"{self.key} {in_words(self.value)} instead of {in_words(self.default)}"


ABSENT = Limit(None, -math.inf)


def limits(settings: Settings) -> dict[str, Limit]:
    """Every setting that decides which models pass, by its name."""
    rules = settings.promote
    found: dict[str, Limit] = {}
    for name, bound in rules.thresholds.items():
        found[f"promote.thresholds.{name}"] = ABSENT
        if bound is not None:
            limit, sign = (bound.max, -1) if bound.min is None else (bound.min, 1)
            found[f"promote.thresholds.{name}"] = Limit(limit, sign * float(limit or 0.0))
    largest: dict[str, float | None] = {
        **{f"promote.fairness_gap.{name}": gap for name, gap in rules.fairness_gap.items()},
        "promote.champion_margin": rules.champion_margin,
        "promote.unreadable": rules.unreadable,
        **{f"promote.contradictions.{name}": share for name, share in rules.contradictions.model_dump().items()},
        **{f"promote.robustness.{name}": fall for name, fall in rules.robustness.model_dump().items()},
        **{f"promote.budget.{name}": most for name, most in rules.budget.model_dump().items()},
        "evaluate.min_group": settings.evaluate.min_group,
    }
    found |= {key: ABSENT if limit is None else Limit(limit, -limit) for key, limit in largest.items()}
    required: dict[str, bool] = {
        "promote.above_constant": rules.above_constant,
        "promote.every_task": rules.every_task,
        **{f"promote.uses.{use}": True for use in rules.uses},
        **{f"reformat.tasks.{name}": True for name in settings.reformat.tasks},
    }
    found |= {key: Limit(asked, float(asked)) for key, asked in required.items()}
    power, split = rules.fairness_power, settings.evaluate.split
    found["promote.fairness_power"] = Limit(power, float(power == "required"))
    found["evaluate.split"] = Limit(split, float(split == "test"))
    return found


def changes(settings: Settings) -> list[Change]:
    """The limits that differ from those of `params.yaml`, loosened ones first."""
    ours, usual = limits(settings), limits(plain())
    found = []
    for key in dict.fromkeys([*usual, *ours]):
        limit, default = ours.get(key, ABSENT), usual.get(key, ABSENT)
        if limit != default:
            found.append(Change(key, limit.value, default.value, limit.strictness < default.strictness))
    return sorted(found, key=lambda change: not change.loosened)


def marked(
    check: Mapping[str, Any], ours: Mapping[str, Limit], usual: Mapping[str, Limit], changed: Mapping[str, Change]
) -> dict[str, Any]:
    """A check with what its setting `asked` for, the `default` of `params.yaml`, and in which way they differ, if they
    do: `loosened` or `tightened`."""
    key = check["setting"]
    change = changed.get(key)
    words = None if change is None else "loosened" if change.loosened else "tightened"
    asked, default = (held.get(key, ABSENT).value for held in (ours, usual))
    return {**check, "asked": asked, "default": default, "change": words}


def in_words(value: Any) -> str:
    """A limit as people read it."""
    if value is None:
        return "any"
    if isinstance(value, bool):
        return "asked for" if value else "not asked for"
    return f"{value:g}" if isinstance(value, int | float) else str(value)
