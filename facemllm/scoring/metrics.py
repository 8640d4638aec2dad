"""The metrics: what each answer adds to a figure's sums, and how sums become the figure.

An answer that cannot be read (`parsed` is null) is wrong: for a class it is none of them, for facts it states none, for
a number it takes the worst error on the option grid, for a yes/no unit it is a miss or a false alarm. Two steps, so
that sums can be added up by person and drawn again (`stats`). Legend: N answers, K sums of a figure, R resamples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Parsed = Sequence[str | None]

CLOSED_MEAN = "closed_mean"
WITHOUT_NUMBERS = "fact_f1_without_numbers"
WITHIN = 5.0
_EXACT = 2.0**30  # sums of multiples of its inverse are exact in a double, so they do not depend on their order


@dataclass(frozen=True, kw_only=True)
class Metric:
    """All that is known of a metric.

    `answers` is what it judges. `columns(answers, parsed, grid)` are the sums (N, K) that each answer adds, with the
    values of the option grid for numbers; `value` makes figures (R,) of total sums (R, K), NaN where nothing was asked.
    `constant` is the answer that scores best if given to every question, of a metric that a task may name. The value is
    in the unit of its task if `in_unit`, else a share; `also` names what is reported beside it, of tasks whose unit is
    one of `units`, if there are any. Where it is the mean over true classes, `of_class` is its figure of one class;
    any other that a task may name is a quotient, of `terms` of the sums: numerator and denominator.
    """

    name: str
    label: str
    answers: Literal["class", "number", "facts"] = "class"
    columns: Callable[[Sequence[str], Parsed, Sequence[float]], Array]
    value: Callable[[Array], Array]
    constant: Callable[[Sequence[str]], str] | None = None
    higher_is_better: bool = True
    digits: int = 3
    in_unit: bool = False
    also: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    in_closed_mean: bool = False
    of_class: Metric | None = None
    terms: Callable[[Array], tuple[Array, Array]] | None = None

    def is_unreadable(self, text: str | None) -> bool:
        """Whether an answer counts as unreadable: none at all, or no number where one is asked."""
        return text is None or (self.answers == "number" and number(text) is None)

    def marks(self, answers: Sequence[str], parsed: Parsed, grid: Sequence[float] = ()) -> Array:
        """How good each answer is (N,), more is better: right (1) or not, the error below zero, facts shared less those
        missed or made up."""
        if self.answers == "number":
            return -self.columns(answers, parsed, grid)[:, 0]
        if self.answers == "facts":
            return np.asarray(self.columns(answers, parsed, grid) @ np.array([1.0, -1.0, -1.0]))
        return np.asarray(_right(answers, parsed).astype(float))


def get(name: str) -> Metric:
    """The metric of that name. Raises ValueError if there is none."""
    if name not in METRICS:
        raise ValueError(f"unknown metric '{name}'")
    return METRICS[name]


def of(task: Any) -> Metric:
    """The metric that a task names."""
    return get(task.metric)


def label(name: str) -> str:
    """A metric's name in words; that of another figure as it is."""
    return METRICS[name].label if name in METRICS else name.replace("_", " ")


def also(task: Any) -> tuple[str, ...]:
    """What is reported beside a task's own metric: mean accuracy (CelebA) beside balanced accuracy, the class mean
    (RAF-DB) beside overall accuracy, the share of errors of at most five years or degrees (cumulative score) beside
    their mean."""
    return tuple(name for name in of(task).also if not get(name).units or task.unit in get(name).units)


def is_choice(task: Any, question: Any) -> bool:
    """Whether a question is answered by choosing a class, so that it counts in `closed_mean`."""
    return bool(question.options) and of(task).in_closed_mean


def clears_constant(figure: Mapping[str, Any]) -> bool:
    """Whether something was learnt: the whole 95 % interval lies on the good side of the constant answer."""
    low, high, rival = figure["low"], figure["high"], figure["baselines"].get("constant")
    if low is None or high is None or rival is None:
        return False
    return bool(low > rival if figure["higher_is_better"] else high < rival)


def facts(text: str | None) -> frozenset[str]:
    """The facts of a canonical caption answer (`k=v;k=v`)."""
    return frozenset(part.strip() for part in (text or "").split(";") if part.strip())


def number(text: str | None) -> float | None:
    """A canonical number, or None when it is none."""
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def numbers(texts: Parsed) -> Array:
    """Canonical numbers, NaN for what is none."""
    return np.array([math.nan if (value := number(text)) is None else value for text in texts])


def errors(answers: Sequence[str], parsed: Parsed, grid: Sequence[float]) -> Array:
    """Absolute errors of numbers; an unreadable one takes the worst error on the grid of options."""
    truth, stated = numbers(answers), numbers(parsed)
    low, high = (min(grid), max(grid)) if grid else (truth.min(), truth.max())
    return np.where(np.isnan(stated), np.maximum(abs(truth - low), abs(high - truth)), abs(stated - truth))


def recall_by_class(answers: Sequence[str], parsed: Parsed) -> dict[str, dict[str, float]]:
    """Of each true class: the share that is answered so (`value`), and how many there are (`n`)."""
    right = Counter(answer for answer, said in zip(answers, parsed, strict=True) if said == answer)
    return {name: {"value": round(right[name] / n, 12), "n": n} for name, n in sorted(Counter(answers).items())}


def recall_by_kind(answers: Sequence[str], parsed: Parsed) -> dict[str, dict[str, float]]:
    """Of each kind of true facts (`age` of `age=35`): the share that is stated (`value`), and how many there are."""
    true, stated = Counter[str](), Counter[str]()
    for answer, text in zip(answers, parsed, strict=True):
        own = facts(answer)
        true.update(fact.partition("=")[0] for fact in own)
        stated.update(fact.partition("=")[0] for fact in own & facts(text))
    return {kind: {"value": round(stated[kind] / n, 12), "n": n} for kind, n in sorted(true.items())}


def ratio(top: Array, bottom: Array) -> Array:
    """Element-wise quotient; NaN where the denominator is zero."""
    return np.divide(top, bottom, out=np.full(np.broadcast(top, bottom).shape, np.nan), where=bottom != 0)


def mean(figures: Iterable[Array]) -> Array:
    """Macro mean of several figures, over those that are defined in each resample."""
    stacked = np.stack(list(figures))
    known = ~np.isnan(stacked)
    return ratio(np.where(known, stacked, 0.0).sum(0), known.sum(0).astype(float))


def exact(values: Array) -> Array:
    """Numbers to the nearest 2^-30, so that a sum of millions of them comes out the same in any order."""
    rounded: Array = np.round(values * _EXACT) / _EXACT
    return rounded


def _right(answers: Sequence[str], parsed: Parsed) -> npt.NDArray[np.bool_]:
    return np.asarray(np.asarray(answers, dtype=object) == np.asarray(parsed, dtype=object))


def _counted(values: npt.NDArray[Any]) -> Array:
    return np.stack([values.astype(float), np.ones(len(values))], axis=1)


def _right_by_class(answers: Sequence[str], parsed: Parsed, grid: Sequence[float]) -> Array:
    """Right and asked of each true class in turn."""
    classes, index = np.unique(np.asarray(answers, dtype=object), return_inverse=True)
    asked = np.eye(len(classes))[index]
    return np.stack([asked * _right(answers, parsed)[:, None], asked], axis=2).reshape(len(index), -1)


def _found(answers: Sequence[str], parsed: Parsed, grid: Sequence[float]) -> Array:
    """Hits, false alarms and misses of `yes`."""
    right, true = _right(answers, parsed), np.asarray(answers, dtype=object) == "yes"
    return np.stack([true & right, ~true & ~right, true & ~right], axis=1).astype(float)


def _facts(answers: Sequence[str], parsed: Parsed, grid: Sequence[float]) -> Array:
    """Facts shared, only stated, only true."""
    pairs = [(facts(answer), facts(text)) for answer, text in zip(answers, parsed, strict=True)]
    return np.array([[len(true & said), len(said - true), len(true - said)] for true, said in pairs], dtype=float)


def _facts_without_numbers(answers: Sequence[str], parsed: Parsed, grid: Sequence[float]) -> Array:
    """The same, without facts whose value is a number: an age or an angle counts only in its very step of the grid."""

    def kept(text: str | None) -> str:
        return ";".join(fact for fact in facts(text) if number(fact.partition("=")[2]) is None)

    return _facts(list(map(kept, answers)), list(map(kept, parsed)), grid)


def _counts(totals_RK: Array) -> tuple[Array, Array]:
    return totals_RK[:, 0], totals_RK[:, 1]


def _shared(totals_RK: Array) -> tuple[Array, Array]:
    shared, stated, true = totals_RK.T
    return 2 * shared, 2 * shared + stated + true


def _quotient(totals_RK: Array) -> Array:
    return ratio(*_counts(totals_RK))


def _f1(totals_RK: Array) -> Array:
    return ratio(*_shared(totals_RK))


def most_frequent(answers: Sequence[str]) -> str:
    """The commonest answer; ties fall to the first by name."""
    counts = Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))


def _most_frequent_facts(answers: Sequence[str]) -> str:
    """The set of facts, one a key, of the highest F1."""
    counts = Counter(fact for answer in answers for fact in facts(answer))
    best: dict[str, str] = {}
    for fact in sorted(counts, key=lambda fact: (-counts[fact], fact)):
        best.setdefault(fact.partition("=")[0], fact)
    # taken in order of frequency, F1 rises to one peak and falls: stop there
    chosen: list[str] = []
    shared, score = 0, 0.0
    for fact in best.values():
        shared += counts[fact]
        with_it = 2 * shared / (len(answers) * (len(chosen) + 1) + counts.total())
        if with_it <= score:
            break
        chosen.append(fact)
        score = with_it
    return ";".join(sorted(chosen))


ACCURACY = Metric(
    name="accuracy",
    label="accuracy",
    columns=lambda answers, parsed, grid: _counted(_right(answers, parsed)),
    value=_quotient,
    terms=_counts,
    constant=most_frequent,
    also=("balanced_accuracy",),
    in_closed_mean=True,
)
BALANCED_ACCURACY = Metric(
    name="balanced_accuracy",
    label="balanced accuracy",
    columns=_right_by_class,
    value=lambda totals_RK: mean(ratio(totals_RK[:, 0::2], totals_RK[:, 1::2]).T),  # over the classes that occur
    constant=most_frequent,
    also=("accuracy",),
    in_closed_mean=True,
    of_class=ACCURACY,
)
BALANCED = BALANCED_ACCURACY.name
METRICS = {
    metric.name: metric
    for metric in (
        ACCURACY,
        BALANCED_ACCURACY,
        Metric(
            name="mae",
            label="mean error",
            answers="number",
            columns=lambda answers, parsed, grid: _counted(exact(errors(answers, parsed, grid))),
            value=_quotient,
            terms=_counts,
            constant=lambda answers: f"{np.median([float(answer) for answer in answers]):.4f}",
            higher_is_better=False,
            digits=2,
            in_unit=True,
            also=("within_5",),
        ),
        Metric(
            name="within_5",
            label="within 5",
            answers="number",
            columns=lambda answers, parsed, grid: _counted(abs(numbers(parsed) - numbers(answers)) <= WITHIN + 1e-9),
            value=_quotient,
            units=("years", "degrees"),
        ),
        Metric(
            name="fact_f1",
            label="F1 of facts",
            answers="facts",
            columns=_facts,
            value=_f1,
            terms=_shared,
            constant=_most_frequent_facts,
            also=("precision", "recall", WITHOUT_NUMBERS),
        ),
        Metric(
            name="precision",
            label="precision",
            answers="facts",
            columns=_facts,
            value=lambda totals_RK: ratio(totals_RK[:, 0], totals_RK[:, 0] + totals_RK[:, 1]),
        ),
        Metric(
            name="recall",
            label="recall",
            answers="facts",
            columns=_facts,
            value=lambda totals_RK: ratio(totals_RK[:, 0], totals_RK[:, 0] + totals_RK[:, 2]),
        ),
        Metric(
            name=WITHOUT_NUMBERS,
            label="F1 of facts without numbers",
            answers="facts",
            columns=_facts_without_numbers,
            value=_f1,
        ),
        Metric(
            name="f1",
            label="F1",
            columns=_found,
            value=_f1,
            terms=_shared,
            constant=lambda answers: "yes",  # it counts hits of yes alone
            also=("accuracy",),
        ),
    )
}
