"""The figures of all tasks, with intervals over people: `task.item`, `task` (macro mean of its items) and `closed_mean`
(mean balanced accuracy of all items answered by choosing a class, of attributes held out of training apart); the same
of kinds of faces (how far turned, occluded) and of disturbed pictures.

An item's figure comes from its own form of question; other ways to ask it are looked at in `consistency`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from facemllm import tasks
from facemllm.scoring import metrics, stats
from facemllm.scoring.metrics import ACCURACY, BALANCED, CLOSED_MEAN, Array, Metric, Parsed, mean
from facemllm.scoring.sheet import Answers, Key, Mask, Rows, Sheet, read_some
from facemllm.settings import Settings
from facemllm.tables import PREDICTIONS, open_table
from facemllm.tables.schemas import CELEBA
from facemllm.tasks import ZERO_SHOT

BY_LIKELIHOOD = "by_likelihood"
CELEBA_TASKS = ("attributes", "presence", "presence_of_persons")
"""The tasks whose items CelebA's forty names are, each in one of them."""
FRONTAL, PROFILE = 15.0, 45.0
"""Degrees of yaw to either side: up to which a face counts as frontal, and from which as a profile."""
_OCCLUDING = {("Wearing_Hat", "yes"), ("eyewear", "Sunglasses"), ("Sunglasses", "yes")}

Figures = dict[str, dict[str, Array]]
"""Replicates by name and metric, a figure's own metric first."""


def of_item(sheet: Sheet, key: Key, rows: Rows, parsed: Parsed, metric: Metric) -> stats.Sums:
    """The sums of some of an item's questions under a metric."""
    added_NK = metric.columns(*_judged(sheet, key, rows, parsed, metric))
    return stats.Sums(metric, stats.by_subject(sheet.subjects[rows], added_NK, sheet.people_count))


def marks_of(sheet: Sheet, key: Key, rows: Rows, parsed: Parsed) -> Array:
    """How good each answer to some of an item's questions is by its task's metric (`Metric.marks`)."""
    metric = metrics.of(tasks.get(key[0]))
    return metric.marks(*_judged(sheet, key, rows, parsed, metric))


def _judged(
    sheet: Sheet, key: Key, rows: Rows, parsed: Parsed, metric: Metric
) -> tuple[list[str], list[str | None], list[float]]:
    """What a metric judges by: the true answers, those given, and the grid of options of a number."""
    grid = [float(option.value) for option in sheet.questions[key].options] if metric.answers == "number" else []
    return [sheet.answers[row] for row in rows], [parsed[row] for row in rows], grid


def replicate(sheet: Sheet, parsed: Parsed, resamples: int, seed: int, only: Mask | None = None) -> Figures:
    """Every figure on the sample (first entry) and on resampled people, of the questions where `only` is true if given;
    same seed and sheet, same people."""
    sums: dict[tuple[Key, str], stats.Sums] = {}
    for key, rows in sheet.rows.items():
        kept = rows if only is None else rows[only[rows]]
        owner = tasks.get(key[0])
        for name in (owner.metric, *metrics.also(owner)) if len(kept) else ():
            sums[key, name] = of_item(sheet, key, kept, parsed, metrics.get(name))
    drawn = stats.replicate(sums, resamples, seed)
    parts: dict[str, dict[str, list[Array]]] = {}
    for (key, metric), values in drawn.items():
        closed = [CLOSED_MEAN] if metric == BALANCED and is_closed(sheet, key) else []
        for name in (".".join(key), key[0], *closed):
            parts.setdefault(name, {}).setdefault(metric, []).append(values)
    return {name: {metric: mean(each) for metric, each in own.items()} for name, own in parts.items()}


def heads(figures: Figures) -> dict[str, Array]:
    """Replicates of each figure's own metric."""
    return {name: next(iter(by_metric.values())) for name, by_metric in figures.items()}


def is_closed(sheet: Sheet, key: Key) -> bool:
    """Whether an item counts in `closed_mean`."""
    return key[0] != ZERO_SHOT and metrics.is_choice(tasks.get(key[0]), sheet.questions[key])


def rows_of(sheet: Sheet, name: str) -> Rows:
    """Positions of the questions behind a figure (`task`, `task.item`, `task.balanced_accuracy`, `closed_mean`)."""
    if name == CLOSED_MEAN:
        return np.concatenate([rows for key, rows in sheet.rows.items() if is_closed(sheet, key)])
    task, _, item = name.partition(".")
    return sheet.rows[task, item] if (task, item) in sheet.rows else sheet.of_task(task)


def summarise(
    sheet: Sheet, answers: Answers, baselines: Mapping[str, Parsed], resamples: int, seed: int
) -> dict[str, Any]:
    """The figures of all tasks: value, 95 % interval, number asked, unreadable share, baselines, items beneath.

    An open question that is answered by a class has the share of each class that is found (`recall_by_class`): of
    `unanswerable`, how often it is said that a thing cannot be told, and how often an answerable question is answered.
    Where every question of `zero_shot` has probabilities of its options, `also` holds `by_likelihood`: the balanced
    accuracy of the likeliest option, whatever free decoding would write.

    Returns `tasks` by name, `closed_mean` and `celeba_40` (mean accuracy over CelebA's attributes). A figure that
    cannot be computed is None, never NaN.
    """
    replicates = replicate(sheet, answers.parsed, resamples, seed)
    for name, values in _by_likelihood(sheet, answers, resamples, seed).items():
        replicates[name][BY_LIKELIHOOD] = values
    rivals = {name: (said, replicate(sheet, said, 0, seed)) for name, said in baselines.items()}

    def figure(name: str, metric: str | None = None) -> dict[str, Any]:
        own, rows = replicates[name], rows_of(sheet, name)
        metric = metric or next(iter(own))
        known = metrics.get(metric)
        people = len(np.unique(sheet.subjects[rows]))
        error = stats.standard_error(own[metric]) if people > 1 else 0.0
        detectable = stats.minimum_detectable_difference(error)
        return {
            "metric": metric,
            **stats.spread(own[metric], people),
            "n": len(rows),
            "unreadable": stats.plain_mean(known.is_unreadable(answers.parsed[row]) for row in rows),
            "refused": stats.plain_mean(answers.refused[rows]),
            "minimum_detectable_difference": stats.plain(detectable),
            "baselines": {
                rival: stats.plain(found[name][metric][0]) if any(said[row] is not None for row in rows) else None
                for rival, (said, found) in rivals.items()
            },
            "higher_is_better": known.higher_is_better,
            "also": {other: stats.spread(values, people) for other, values in own.items() if other != metric},
        }

    result: dict[str, Any] = {}
    for name in dict.fromkeys(task for task, _ in sheet.rows):
        task = tasks.get(name)
        own = [item for owner, item in sheet.rows if owner == name]
        items = {item: figure(f"{name}.{item}") for item in own if len(own) > 1 or name == ZERO_SHOT}
        if BALANCED in metrics.also(task):
            items[BALANCED] = {**figure(name, BALANCED), "also": {}}
        head = {**figure(name), "unit": task.unit}
        if metrics.of(task).answers == "facts":
            rows = sheet.of_task(name)
            said = [answers.parsed[row] for row in rows]
            head["recall_by_kind"] = metrics.recall_by_kind([sheet.answers[row] for row in rows], said)
        if metrics.of(task).answers == "class" and all(sheet.questions[name, item].form == "open" for item in own):
            for body, rows in [
                (head, sheet.of_task(name)),
                *((items[i], sheet.rows[name, i]) for i in own if i in items),
            ]:
                said = [answers.parsed[row] for row in rows]
                body["recall_by_class"] = metrics.recall_by_class([sheet.answers[row] for row in rows], said)
        result[name] = {**head, "items": {item: {**body, "unit": task.unit} for item, body in items.items()}}
    return {
        "tasks": result,
        CLOSED_MEAN: figure(CLOSED_MEAN) if CLOSED_MEAN in replicates else None,
        "celeba_40": _celeba(replicates, sheet.people_count),
    }


def _by_likelihood(sheet: Sheet, answers: Answers, resamples: int, seed: int) -> dict[str, Array]:
    """Balanced accuracy of the likeliest options of `zero_shot`, replicated, by figure."""
    rows = [own for (task, _), own in sheet.rows.items() if task == ZERO_SHOT]
    if not rows or not answers.likeliest or any(answers.likeliest[row] is None for own in rows for row in own):
        return {}
    only = np.zeros(len(sheet.answers), dtype=bool)
    only[np.concatenate(rows)] = True
    found = replicate(sheet, answers.likeliest, resamples, seed, only)
    return {name: by_metric[BALANCED] for name, by_metric in found.items() if BALANCED in by_metric}


def _celeba(replicates: Figures, people: int) -> dict[str, Any] | None:
    """Mean accuracy over CelebA's forty attributes, as the field reports it, and their mean balanced accuracy; None
    unless all forty are asked."""
    items = [next(filter(None, (replicates.get(f"{t}.{name}") for t in CELEBA_TASKS)), None) for name in CELEBA]
    known = [item for item in items if item is not None]
    if len(known) < len(items):
        return None
    both = (ACCURACY.name, BALANCED)
    return {metric: stats.spread(mean(item[metric] for item in known), people) for metric in both}


def slices(settings: Settings, sheet: Sheet, parsed: Parsed) -> dict[str, Any]:
    """Figures of the faces of each slice by the labels asked about: `people`, `n` questions, `closed_mean`, `tasks`.
    Slices are `frontal`, `turned`, `profile` (where yaw is known), `occluded` and `unoccluded` (by hat or sunglasses).
    One of fewer people than `evaluate.min_group` is `too_few` and has no figures; one without a face is left out."""
    found = {}
    for name, chosen in _kinds_of_faces(sheet).items():
        if not chosen.any():
            continue
        people = len(np.unique(sheet.people[chosen]))
        enough = people >= settings.evaluate.min_group
        only = chosen[sheet.faces]
        drawn = heads(replicate(sheet, parsed, settings.evaluate.bootstrap, settings.seed, only)) if enough else {}
        found[name] = {
            "people": people,
            "n": int(sum(only[rows].sum() for rows in sheet.rows.values())),
            "too_few": not enough,
            CLOSED_MEAN: stats.spread(drawn[CLOSED_MEAN], people) if CLOSED_MEAN in drawn else stats.NOTHING,
            "tasks": {task: stats.spread(drawn[task], people) for task, _ in sheet.rows if task in drawn},
        }
    return found


def disturbed(
    settings: Settings, sheet: Sheet, parsed: Parsed, folder: Path, trained: Mapping[str, bool] | None = None
) -> dict[str, Any]:
    """What disturbing the pictures does, by kind: `closed_mean` of the same questions `before` and `after`, the paired
    `change`, and the same by task; `trained` tells whether training shows such pictures, too (None: not known, or no
    picture is changed). `folder`, if it is there, holds a predictions table a kind."""
    found = {}
    for kind in sorted(path.name for path in folder.iterdir()) if folder.is_dir() else ():
        rows, said = read_some(open_table(folder / kind, PREDICTIONS), sheet)
        only = np.zeros(len(sheet.answers), dtype=bool)
        only[rows] = True
        draws = settings.evaluate.bootstrap, settings.seed
        before, after = (heads(replicate(sheet, answers, *draws, only)) for answers in (parsed, said))
        people = len(np.unique(sheet.subjects[rows]))
        changes = {
            name: {
                "before": stats.spread(values, people),
                "after": stats.spread(after[name], people),
                "change": stats.spread(after[name] - values, people),
            }
            for name, values in before.items()
            if "." not in name
        }
        found[kind] = {
            "faces": len(np.unique(sheet.faces[rows])),
            "trained": (trained or {}).get(kind),
            **changes.pop(CLOSED_MEAN, dict.fromkeys(("before", "after", "change"), stats.NOTHING)),
            "tasks": changes,
        }
    return found


def _kinds_of_faces(sheet: Sheet) -> dict[str, Mask]:
    turn = abs(metrics.numbers(sheet.said(("head_pose", "yaw"), sheet.answers)))
    occluded, known = np.zeros(len(sheet.images), dtype=bool), np.zeros(len(sheet.images), dtype=bool)
    for key in sheet.rows:
        if values := [value for item, value in _OCCLUDING if item == key[1]]:
            said = sheet.said(key, sheet.answers)
            known |= [answer is not None for answer in said]
            occluded |= [answer in values for answer in said]
    return {
        "frontal": turn <= FRONTAL,
        "turned": (turn > FRONTAL) & (turn <= PROFILE),
        "profile": turn > PROFILE,
        "occluded": occluded,
        "unoccluded": known & ~occluded,
    }
