"""Marking answers: the true answers of a split, a model's parsed answers, and every figure that follows from the two.

Truth comes from the conversations, never from a predictions file, and every question of the split must be answered
once. An answer that cannot be read (`parsed` is null) is wrong: for a class it is none of them, for facts it states
none, for a number it takes the worst error on the option grid. Figures are named `task.item`, `task` (macro mean of
its items) and `closed_mean` (mean balanced accuracy of all items answered by choosing a class).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from facemllm import tasks
from facemllm.errors import UserError
from facemllm.records import Table
from facemllm.scoring import stats

CLOSED_MEAN = "closed_mean"
BALANCED = "balanced_accuracy"

Parsed = Sequence[str | None]


@dataclass(frozen=True)
class Sheet:
    """The questions of a split with their true answers, in table order; one entry a question in every column.

    `subjects` numbers people from 0; an image without a subject is a person of its own. `rows` holds the positions
    of each (task, item), `questions` how each is asked.
    """

    split: str
    sample_ids: list[str]
    image_ids: list[str]
    answers: list[str]
    subjects: npt.NDArray[np.int64]
    rows: Mapping[tuple[str, str], npt.NDArray[np.int64]]
    questions: Mapping[tuple[str, str], Any]

    @property
    def people(self) -> int:
        """Number of subjects."""
        return int(self.subjects.max()) + 1 if len(self.subjects) else 0


def read_sheet(conversations: Table, split: str) -> Sheet:
    """Read the questions of a split and their answers. Raises UserError when there are none.

    Turns that follow from earlier ones are left out: asked alone they have no meaning.
    """
    sample_ids: list[str] = []
    image_ids: list[str] = []
    answers: list[str] = []
    subjects: list[int] = []
    people: dict[str, int] = {}
    rows: dict[tuple[str, str], list[int]] = {}
    questions: dict[tuple[str, str], Any] = {}
    known: dict[tuple[str, str], Any] = {}
    for face in conversations.iterate(["image_id", "subject_id", "turns"], split):
        person = people.setdefault(face["subject_id"] or f"image {face['image_id']}", len(people))
        for turn in face["turns"]:
            if not is_asked(turn):
                continue
            name = turn["task"], turn["template"]
            question = known[name] if name in known else known.setdefault(name, tasks.question_of(turn))
            key = question.task, question.item
            questions.setdefault(key, question)
            rows.setdefault(key, []).append(len(sample_ids))
            sample_ids.append(turn["sample_id"])
            image_ids.append(face["image_id"])
            answers.append(turn["answer"])
            subjects.append(person)
    if not sample_ids:
        raise UserError(f"{conversations.path} has no questions in split '{split}'; choose another evaluation.split")
    if len(set(sample_ids)) < len(sample_ids):
        raise UserError(f"{conversations.path}: two questions of split '{split}' share a sample_id; reformat again")
    positions = {key: np.asarray(where, dtype=np.int64) for key, where in sorted(rows.items())}
    return Sheet(split, sample_ids, image_ids, answers, np.asarray(subjects, dtype=np.int64), positions, questions)


def is_asked(turn: Mapping[str, Any]) -> bool:
    """Whether a turn is evaluated: it stands alone and its answer is known."""
    return not turn["follows"] and turn["answer"] is not None


def read_parsed(predictions: Table, sheet: Sheet) -> list[str | None]:
    """The parsed answers of a predictions table, in the order of the sheet.

    Raises UserError unless every question of the sheet is answered exactly once and none besides.
    """
    found: dict[str, str | None] = {}
    for batch in predictions.batches(["sample_id", "parsed"]):
        names = batch.column("sample_id").to_pylist()
        if len(names) != len(set(names)) or not found.keys().isdisjoint(names):
            raise UserError(f"{predictions.path}: a sample_id occurs twice; each question is answered once")
        found.update(zip(names, batch.column("parsed").to_pylist(), strict=True))
    wanted = set(sheet.sample_ids)
    if missing := len(wanted - found.keys()):
        raise UserError(f"{predictions.path}: {missing} of {len(wanted)} questions have no prediction; predict again")
    if extra := len(found.keys() - wanted):
        raise UserError(f"{predictions.path}: {extra} predictions answer no question of these conversations")
    return [found[name] for name in sheet.sample_ids]


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


def errors(answers: Sequence[str], parsed: Parsed, grid: Sequence[float]) -> stats.Array:
    """Absolute errors of numbers; an unreadable one takes the worst error on the grid of options."""
    truth = np.array([float(answer) for answer in answers])
    low, high = (min(grid), max(grid)) if grid else (truth.min(), truth.max())
    stated = np.array([math.nan if (value := number(text)) is None else value for text in parsed])
    return np.where(np.isnan(stated), np.maximum(abs(truth - low), abs(high - truth)), abs(stated - truth))


def columns(metric: str, answers: Sequence[str], parsed: Parsed, grid: Sequence[float] = ()) -> stats.Array:
    """What each answer adds to the sums of a metric: (N, K), in the order `stats.of_totals` reads."""
    if metric == "mae":
        wrong = errors(answers, parsed, grid)
        return np.stack([wrong, np.ones_like(wrong)], axis=1)
    if metric == "fact_f1":
        pairs = [(facts(answer), facts(text)) for answer, text in zip(answers, parsed, strict=True)]
        return np.array([[len(true & said), len(said - true), len(true - said)] for true, said in pairs], dtype=float)
    right = np.array([answer == text for answer, text in zip(answers, parsed, strict=True)], dtype=float)
    if metric == "accuracy":
        return np.stack([right, np.ones_like(right)], axis=1)
    if metric == BALANCED:
        classes, index = np.unique(np.asarray(answers), return_inverse=True)
        asked = np.eye(len(classes))[index]
        return np.stack([asked * right[:, None], asked], axis=2).reshape(len(right), -1)
    raise ValueError(f"unknown metric '{metric}'")


def replicate(sheet: Sheet, parsed: Parsed, resamples: int, seed: int) -> dict[str, stats.Array]:
    """Every figure on the sample (first entry) and on resampled people; same seed and sheet, same people.

    Names: `task.item`, `task`, `closed_mean`, and `task.balanced_accuracy` beside plain accuracy.
    """
    sums: dict[str, stats.Sums] = {}
    parts: dict[str, list[str]] = {}
    for key, rows in sheet.rows.items():
        task, question = tasks.get(key[0]), sheet.questions[key]
        name = ".".join(key)
        for metric in dict.fromkeys([task.metric, *([BALANCED] if is_choice(task, question) else [])]):
            sums[f"{name} {metric}"] = _sums(sheet, parsed, rows, metric, question)
        parts.setdefault(name, []).append(f"{name} {task.metric}")
        parts.setdefault(task.name, []).append(f"{name} {task.metric}")
        if is_choice(task, question):
            parts.setdefault(CLOSED_MEAN, []).append(f"{name} {BALANCED}")
            if task.metric == "accuracy":
                parts.setdefault(f"{task.name}.{BALANCED}", []).append(f"{name} {BALANCED}")
    items = stats.replicate(sums, resamples, seed)
    return {name: stats.mean(items[part] for part in names) for name, names in parts.items()}


def is_choice(task: Any, question: Any) -> bool:
    """Whether a question is answered by choosing a class, so that it counts in `closed_mean`."""
    return bool(question.options) and task.metric in ("accuracy", BALANCED)


def summarise(
    sheet: Sheet, parsed: Parsed, baselines: Mapping[str, Parsed], resamples: int, seed: int
) -> dict[str, Any]:
    """The figures of all tasks: value, 95 % interval, number asked, unreadable share, baselines, items beneath.

    Returns `tasks` by name and `closed_mean`. A figure that cannot be computed is None, never NaN.
    """
    replicates = replicate(sheet, parsed, resamples, seed)
    rivals = {name: replicate(sheet, answers, 0, seed) for name, answers in baselines.items()}

    def figure(name: str, metric: str, rows: npt.NDArray[np.int64]) -> dict[str, Any]:
        found = stats.interval(replicates[name])
        several = len(np.unique(sheet.subjects[rows])) > 1  # one person resampled is always the same: no interval
        unread = sum(parsed[row] is None or (metric == "mae" and number(parsed[row]) is None) for row in rows)
        return {
            "metric": metric,
            "value": _plain(found.value),
            "low": _plain(found.low) if several else None,
            "high": _plain(found.high) if several else None,
            "n": len(rows),
            "unparsed": _plain(unread / len(rows)),
            "baselines": {rival: _plain(values[name][0]) for rival, values in rivals.items()},
            "higher_is_better": metric != "mae",
        }

    result: dict[str, Any] = {}
    choices: list[npt.NDArray[np.int64]] = []
    for name in dict.fromkeys(task for task, _ in sheet.rows):
        task = tasks.get(name)
        own = {item: rows for (owner, item), rows in sheet.rows.items() if owner == name}
        choices += [rows for item, rows in own.items() if is_choice(task, sheet.questions[name, item])]
        every = np.concatenate(list(own.values()))
        items = {item: figure(f"{name}.{item}", task.metric, rows) for item, rows in own.items() if len(own) > 1}
        if f"{name}.{BALANCED}" in replicates:
            items[BALANCED] = figure(f"{name}.{BALANCED}", BALANCED, every)
        head = {**figure(name, task.metric, every), "unit": task.unit}
        result[name] = {**head, "items": {item: {**body, "unit": task.unit} for item, body in items.items()}}
    closed = figure(CLOSED_MEAN, BALANCED, np.concatenate(choices)) if choices else None
    return {"tasks": result, CLOSED_MEAN: closed}


def clears_majority(figure: Mapping[str, Any]) -> bool:
    """Whether something was learnt: the whole 95 % interval lies on the good side of the majority baseline."""
    low, high, rival = figure["low"], figure["high"], figure["baselines"].get("majority")
    if low is None or high is None or rival is None:
        return False
    return bool(low > rival if figure["higher_is_better"] else high < rival)


def _sums(sheet: Sheet, parsed: Parsed, rows: npt.NDArray[np.int64], metric: str, question: Any) -> stats.Sums:
    answers = [sheet.answers[row] for row in rows]
    stated = [parsed[row] for row in rows]
    grid = [float(option.value) for option in question.options] if metric == "mae" else []
    added_NK = columns(metric, answers, stated, grid)
    return stats.Sums(metric, stats.by_subject(sheet.subjects[rows], added_NK, sheet.people))


def _plain(value: float) -> float | None:
    # six decimals: below them lies only the order of a floating-point sum
    return round(float(value), 6) if math.isfinite(value) else None
