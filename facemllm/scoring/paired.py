"""Two models on the same questions: the same resampled people for both, so what they share cancels out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from facemllm import tasks
from facemllm.errors import UserError
from facemllm.scoring import fairness, stats
from facemllm.scoring.metrics import BALANCED, BALANCED_ACCURACY, CLOSED_MEAN, Array, also, of
from facemllm.scoring.sheet import BETWEEN, Rows, Sheet, read_parsed, read_sheet
from facemllm.scoring.summary import heads, marks_of, replicate, rows_of
from facemllm.settings import Settings
from facemllm.tables import CONVERSATIONS, PREDICTIONS, Table, open_table
from facemllm.tasks import ZERO_SHOT

BETTER, WORSE, SAME = "better", "worse", "no difference shown"
_NEEDED = ("model_digest", "conversations_digest", "predictions_digest", "split")


@dataclass(frozen=True)
class Pair:
    """Two evaluations of one split: what their `metrics.json` hold, the questions, both models' answers."""

    metrics: tuple[dict[str, Any], dict[str, Any]]
    sheet: Sheet
    parsed: tuple[list[str | None], list[str | None]]


def compare(settings: Settings, conversations: Path, first: Path, second: Path) -> dict[str, Any]:
    """Every figure of two evaluation folders, paired; a difference is the second's minus the first's.

    Returns, beside what identifies both, `figures` by name as in `metrics.json` (`task`, `task.item`, `closed_mean`)
    and `groups` by task, kind and group, each with its `difference`, p values and the `verdict` on the second. Holm's
    families are the tasks, the items, and all groups of people of all tasks; `closed_mean` stands alone. A group
    of fewer than `evaluate.min_group` people has no figures, and a figure over fewer has no p. Where the bootstrap
    finds no error, everybody who changed at all having changed alike, p is of an exact sign test over those people.

    Raises UserError unless both answered the same questions.
    """
    pair = read_pair(conversations, first, second)
    ours, theirs = pair.metrics
    return {
        "first": ours["model_digest"],
        "second": theirs["model_digest"],
        "conversations_digest": ours["conversations_digest"],
        "split": pair.sheet.split,
        "n_images": len(pair.sheet.images),
        "n_subjects": pair.sheet.people_count,
        "figures": _figures(settings, pair),
        "groups": _groups(settings, pair),
    }


def read_pair(conversations: Path, first: Path, second: Path) -> Pair:
    """Read two evaluation folders. Raises UserError unless both have answered the same questions of this table."""
    table = open_table(conversations, CONVERSATIONS)
    ours, theirs = read_metrics(first), read_metrics(second)
    for folder, metrics in ((first, ours), (second, theirs)):
        if metrics["conversations_digest"] != table.digest:
            raise UserError(
                f"{folder} was evaluated on conversations {metrics['conversations_digest'][:12]}, not on "
                f"{table.digest[:12]}; evaluate both models on the same conversations"
            )
    if ours["split"] != theirs["split"]:
        raise UserError(f"{first} is on split '{ours['split']}', {second} on '{theirs['split']}'; use one split")
    sheet = read_sheet(table, ours["split"])
    return Pair((ours, theirs), sheet, (read_parsed(_answers(first), sheet), read_parsed(_answers(second), sheet)))


def read_metrics(folder: Path) -> dict[str, Any]:
    """What `metrics.json` of an evaluation folder holds. Raises UserError if it is not about the predictions there."""
    try:
        metrics: Any = json.loads((folder / "metrics.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not an evaluation: no readable metrics.json ({error})") from None
    lacking = [name for name in _NEEDED if not isinstance(metrics, dict) or not isinstance(metrics.get(name), str)]
    if lacking:
        raise UserError(f"{folder} is not an evaluation: metrics.json does not state {lacking[0]}; evaluate again")
    if _answers(folder).digest != metrics["predictions_digest"]:
        raise UserError(f"{folder}: metrics.json does not belong to the predictions beside it; evaluate again")
    return dict(metrics)


def replicates(settings: Settings, pair: Pair) -> tuple[dict[str, Array], dict[str, Array]]:
    """Every figure of both models on the same resamples, by name; a task judged by accuracy also has
    `task.balanced_accuracy`."""
    found = []
    for parsed in pair.parsed:
        figures = replicate(pair.sheet, parsed, settings.evaluate.bootstrap, settings.seed)
        own = heads(figures) | {
            f"{name}.{BALANCED}": by_metric[BALANCED]
            for name, by_metric in figures.items()
            if name in tasks.all_names() and BALANCED in also(tasks.get(name))
        }
        found.append(own)
    return found[0], found[1]


def _answers(folder: Path) -> Table:
    return open_table(folder / "predictions", PREDICTIONS)


def _figures(settings: Settings, pair: Pair) -> dict[str, Any]:
    sheet = pair.sheet
    first, second = replicates(settings, pair)
    found = {}
    for name, values in first.items():
        task, _, item = name.partition(".")
        rows = rows_of(sheet, name)
        found[name] = _difference(settings, pair, (task, item), rows, values, second[name])
    families = (
        [name for name in found if name in tasks.all_names()],
        [name for name in found if "." in name],
        [CLOSED_MEAN] if CLOSED_MEAN in found else [],
    )
    return {name: entry for family in families for name, entry in _corrected({n: found[n] for n in family}).items()}


def _groups(settings: Settings, pair: Pair) -> dict[str, Any]:
    sheet = pair.sheet
    family: dict[tuple[str, str, str], dict[str, Any]] = {}
    for kind in sheet.kinds:
        for task, groups in fairness.disaggregate(sheet, pair.parsed[0], kind).items():
            enough = {name: group for name, group in groups.items() if group.people >= settings.evaluate.min_group}
            first, second = (fairness.replicates(settings, sheet, said, task, enough) for said in pair.parsed)
            for name, group in enough.items():
                entry = _difference(settings, pair, (task, ""), group.rows, first[name], second[name])
                family[task, BETWEEN.join(kind), name] = entry
    found: dict[str, Any] = {task: {} for task, _ in sheet.rows}
    for (task, kind_name, name), entry in _corrected(family).items():
        found[task].setdefault(kind_name, {})[name] = entry
    return found


def _difference(
    settings: Settings, pair: Pair, key: tuple[str, str], rows: Rows, first: Array, second: Array
) -> dict[str, Any]:
    task, item = key
    gap = second - first
    value, error = float(gap[0]), stats.standard_error(gap)
    people = len(np.unique(pair.sheet.subjects[rows]))
    p = float("nan")
    if people >= settings.evaluate.min_group:
        p = stats.p_value(value, error, people - 1) if error > 0 or value == 0 else _sign_test(pair, rows)
    detectable = stats.minimum_detectable_difference(error if people > 1 else 0.0)
    known = None if task == CLOSED_MEAN else tasks.get(task)
    metric = BALANCED_ACCURACY if known is None or item == BALANCED else of(known)
    return {
        "metric": metric.name,
        "unit": "" if known is None else known.unit,
        "higher_is_better": metric.higher_is_better,
        "first": stats.plain(first[0]),
        "second": stats.plain(second[0]),
        "difference": stats.spread(gap, people),
        "p": stats.plain(p),
        "n": len(rows),
        "people": people,
        "minimum_detectable_difference": stats.plain(detectable),
    }


def _sign_test(pair: Pair, rows: Rows) -> float:
    """Two-sided p of as many people answering better, and as many worse, as there are; NaN where nobody changed."""
    sheet, inside = pair.sheet, np.zeros(len(pair.sheet.answers), dtype=bool)
    inside[rows] = True
    change_S = np.zeros(sheet.people_count)
    for key, own in sheet.rows.items():
        kept = own[inside[own]]
        if len(kept):
            marks = [marks_of(sheet, key, kept, parsed) for parsed in pair.parsed]
            change_S += np.bincount(sheet.subjects[kept], marks[1] - marks[0], sheet.people_count)
    return stats.sign_test(change_S)


def _corrected(family: Mapping[Any, Mapping[str, Any]]) -> dict[Any, Any]:
    adjusted = stats.holm([float("nan") if entry["p"] is None else entry["p"] for entry in family.values()])
    return {
        name: judged({**entry, "p_holm": stats.plain(p)})
        for (name, entry), p in zip(family.items(), adjusted, strict=True)
    }


def judged(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A paired figure with its `verdict`, from the second run's point of view."""
    p, change = entry["p_holm"], entry["difference"]["value"]
    if p is None or p >= stats.SHOWN or not change:
        return {**entry, "verdict": SAME}
    return {**entry, "verdict": BETTER if (change > 0) == entry["higher_is_better"] else WORSE}


def by_task(figures: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Figures as (task, item, figure) with items beneath their task; the mean of all closed questions first. An item
    that is all of its task is left out, but for `zero_shot`, where it names the attribute."""
    heads = [name for name in figures if "." not in name]
    for task in sorted(heads, key=lambda name: name != CLOSED_MEAN):
        yield task, "", figures[task]
        items = [name.removeprefix(f"{task}.") for name in figures if name.startswith(f"{task}.")]
        alone = len([item for item in items if item != BALANCED]) == 1 and task != ZERO_SHOT
        for item in items:
            if item == BALANCED or not alone:
                yield task, item, figures[f"{task}.{item}"]


def by_group(groups: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
    """Groups as (task, kind, group, figure)."""
    for task, kinds in groups.items():
        for kind, parts in kinds.items():
            for name, entry in parts.items():
                yield task, kind, name, entry


def by_verdict(comparison: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of tasks by verdict: where the second run is better, where worse, where nothing is shown."""
    found: dict[str, list[str]] = {BETTER: [], WORSE: [], SAME: []}
    for task, item, entry in by_task(comparison["figures"]):
        if not item and task != CLOSED_MEAN:
            found[entry["verdict"]].append(task)
    return found
