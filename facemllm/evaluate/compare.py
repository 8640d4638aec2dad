"""The comparison itself: two evaluations found, paired, and every figure judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from facemllm.evaluate.find import conversations_of, find
from facemllm.scoring import paired
from facemllm.scoring.metrics import BALANCED, CLOSED_MEAN
from facemllm.scoring.stats import SHOWN
from facemllm.settings import Settings
from facemllm.tasks import ZERO_SHOT

BETTER, WORSE, SAME = "better", "worse", "no difference shown"


def compare(settings: Settings, first: str, second: str, conversations: Path | None = None) -> dict[str, Any]:
    """Two runs by name, paired (`scoring.paired.compare`), with `names` and a `verdict` on every figure and group.

    `conversations` is needed where the store holds them no more. Raises UserError unless both runs answered the same
    questions.
    """
    ours, theirs = find(settings, first), find(settings, second)
    table = conversations_of(ours, theirs, conversations)
    found = paired.compare(settings, table, ours.folder, theirs.folder)
    figures = {name: judged(entry) for name, entry in found["figures"].items()}
    groups = {
        task: {kind: {name: judged(entry) for name, entry in parts.items()} for kind, parts in kinds.items()}
        for task, kinds in found["groups"].items()
    }
    return {**found, "names": [first, second], "figures": figures, "groups": groups}


def judged(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A paired figure with its `verdict`, from the second run's point of view."""
    p, change = entry["p_holm"], entry["difference"]["value"]
    if p is None or p >= SHOWN or not change:
        return {**entry, "verdict": SAME}
    return {**entry, "verdict": BETTER if (change > 0) == entry["higher_is_better"] else WORSE}


def by_task(figures: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Figures as (task, item, figure) with items beneath their task; the mean of all closed questions first.

    An item that is all of its task is left out, but for `zero_shot`, where it names the attribute.
    """
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


def summary(comparison: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of tasks by verdict: where the second run is better, where worse, where nothing is shown."""
    found: dict[str, list[str]] = {BETTER: [], WORSE: [], SAME: []}
    for task, item, entry in by_task(comparison["figures"]):
        if not item and task != CLOSED_MEAN:
            found[entry["verdict"]].append(task)
    return found
