"""The step `reformat`: every known label of a face becomes a turn of a conversation about it.

The caption comes first, then the tasks in the order of the settings. What is asked, and how, is drawn by hashes of
image and item, so that adding a source, a row or a task leaves all other turns as they are; but balance goes by the
answers of a source, and a temperature by the sizes of all of them. Rows stream; memory is flat.

Which training faces, and which of their yes/no questions, are taken is decided before any is written. Faces are drawn
by a hash of their image, so a cap takes the same ones however many other sources there are; kept are counts, and the
hashes that fall into the bucket of a source in which its limit lies.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from facemllm.core import progress
from facemllm.core.digests import draw
from facemllm.errors import UserError
from facemllm.reformat.conversations import ConversationBatch
from facemllm.reformat.questions import BrokenQuestion, Chances, Plan, batches
from facemllm.reformat.unasked import Unasked
from facemllm.settings import Reformat, Settings
from facemllm.settings.data import Mixture
from facemllm.tables import CONVERSATIONS, FACES, SPLITS, Table, TableWriter, open_table
from facemllm.tasks import ZERO_SHOT
from facemllm.tasks.combinations import JOINED, KEY, Combinations
from facemllm.version import ledger
from facemllm.version.tombstones import FORGOTTEN, Tombstones

LEFT_OUT = "left out by the mixture (reformat.mixture)"
COMBINED = f"shows a combination held out of training ({KEY}): "
SILENT = "no known label answers a question"

_HASH = 64
_PLACE = _HASH - 16  # the bits above tell the bucket of a source in which its limit lies
_Taken = Callable[[Mapping[str, Any]], bool]


def reformat(settings: Settings, faces: Path, out: Path) -> Mapping[str, Any]:
    """Write the conversations about `faces` to `out`. Returns the manifest; its `held_out_questions` counts by name how
    often evaluation asks what is held out, 0 where no face has that label; `unasked` counts faces by label that nothing
    is asked about, and a note says which tasks would; `held_out_combinations` counts by split the faces that show each,
    and a note says which no face shows.

    A row goes to quarantine when its labels answer no question, when one of them cannot be answered, when it was
    forgotten, when the mixture leaves it out, or when it is of the training split and shows a held-out combination.
    Raises UserError if a task is unknown, or sensitive and without a reason, a held-out name, a combination or a cap
    does not fit, every training face shows a combination, `faces` is no sound table, or `out` exists.
    """
    plan = Plan(settings.reformat)
    table = open_table(faces, FACES)
    ledger.require(settings, table.sources)
    forgotten = Tombstones.of(settings)

    def gone(row: Mapping[str, Any]) -> bool:
        return forgotten.covers(row) or (row["split"] == "train" and bool(plan.combinations.shown(row)))

    taken, counts = _chosen(table, settings.reformat.mixture, gone, labels=bool(plan.combinations))
    chances: Chances = {}
    if settings.reformat.balance:
        chances = _chances(table, plan, settings.reformat.balance, lambda row: taken(row) and not gone(row))
    writer = TableWriter(
        out,
        CONVERSATIONS,
        parents=[table.digest],
        about=_about(settings.reformat, plan, table, counts),
        shard_mb=settings.ingest.shard_mb,
    )
    unasked = Unasked(plan.tasks, plan.held_out.names)
    made, number, zero = ConversationBatch(), 0, Counter(dict.fromkeys(plan.held_out.names, 0))
    shown = _Shown(plan.combinations)
    with writer, progress.bar("making questions", table.rows) as bar:
        for batch, found in batches(table, pictures=True):
            for place, row in enumerate(found):
                refusal = FORGOTTEN if forgotten.covers(row) else shown.refusal(row)
                refusal = refusal or (None if taken(row) else LEFT_OUT)
                try:
                    asked = plan.questions(row, chances) if refusal is None else []
                    if asked:
                        made.add(place, row, asked)
                        zero.update(one.question.item for one, _ in asked if one.question.task == ZERO_SHOT)
                    else:
                        refusal = refusal or SILENT
                except BrokenQuestion as error:
                    refusal = str(error)
                if refusal != FORGOTTEN:
                    unasked.see(row)
                if refusal:
                    writer.quarantine(table.digest, number + place, refusal)
            if len(made):
                writer.write_table(made.batch(batch))
            number += len(found)
            bar.update(number)
        writer.manifest["about"]["held_out_questions"] = dict(zero)
        if plan.combinations:
            writer.manifest["about"]["held_out_combinations"] = shown.manifest_entries()
        if unasked.counts:
            writer.manifest["about"]["unasked"] = unasked.counts
    for note in (*unasked.notes(), *shown.notes()):
        progress.event(note=note)
    return writer.manifest


class _Shown:
    """Counts the faces that show a held-out combination."""

    def __init__(self, combinations: Combinations) -> None:
        self._combinations = combinations
        self._counts = [dict.fromkeys(SPLITS, 0) for _ in combinations.names]
        self._training = self._left = 0

    def refusal(self, row: Mapping[str, Any]) -> str | None:
        """Why a training face is left out, if it is; any other face is counted alone."""
        found = self._combinations.shown(row)
        for place in found:
            self._counts[place][row["split"]] += 1
        if row["split"] != "train":
            return None
        self._training += 1
        self._left += not found
        return COMBINED + ", ".join(JOINED.join(self._combinations.names[place]) for place in found) if found else None

    def manifest_entries(self) -> list[dict[str, Any]]:
        """As the manifest has them. Raises UserError when no training face is left."""
        if self._training and not self._left:
            named = ", ".join(map(JOINED.join, self._combinations.names))
            raise UserError(f"{KEY}: every training face shows {named}; nothing is left to train on: take it out")
        every = zip(self._combinations.names, self._counts, strict=True)
        return [{"names": list(names), "faces": counts} for names, counts in every]

    def notes(self) -> list[str]:
        """A sentence for each combination that no face shows."""
        every = zip(self._combinations.names, self._counts, strict=True)
        silent = [JOINED.join(names) for names, counts in every if not any(counts.values())]
        return [f"{KEY}: no face shows {name}, so nothing is held out and nothing can be measured" for name in silent]


def _about(qa: Reformat, plan: Plan, table: Table, counts: Mapping[str, Any] | None) -> dict[str, Any]:
    about = {
        "tasks": [task.name for task in plan.tasks],
        "forms": {**qa.forms.model_dump(), "unseen": qa.unseen_wordings},
        "held_out": list(plan.held_out.names),
        "reasons": plan.reasons,
        "balance": qa.balance,
        **table.terms,
    }
    if counts is not None:
        about["mixture"] = {**qa.mixture.model_dump(), "sources": counts}
    return about


def _chosen(
    table: Table, mixture: Mixture, gone: _Taken, *, labels: bool
) -> tuple[_Taken, dict[str, dict[str, int]] | None]:
    """Tells which training faces are taken; and by source, how many there are (`faces`) and are taken (`taken`), None
    where the mixture asks for nothing. Faces that are `gone` do not count; `labels` tells whether it takes labels to
    know. Raises UserError when a cap names a source that the table does not hold."""
    if not mixture.caps and mixture.temperature == 1:
        return lambda row: True, None
    if unknown := sorted(set(mixture.caps) - set(table.sources)):
        raise UserError(
            f"reformat.mixture.caps names {', '.join(unknown)}, which the faces do not come from; they come from "
            f"{', '.join(table.sources)}"
        )
    buckets: dict[str, Counter[int]] = defaultdict(Counter)
    for source, number in _drawn(table, gone, labels):
        buckets[source][number >> _PLACE] += 1
    faces = {source: found.total() for source, found in sorted(buckets.items())}
    limits = _limits(faces, mixture)
    edges = {source: _edge(buckets[source], limits[source]) for source in faces}
    within: dict[str, list[int]] = defaultdict(list)
    for source, number in _drawn(table, gone, labels):
        if number >> _PLACE == edges[source][0]:
            within[source].append(number)
    below = {
        source: sorted(within[source])[left] if left < len(within[source]) else (bucket + 1) << _PLACE
        for source, (bucket, left) in edges.items()
    }

    def taken(row: Mapping[str, Any]) -> bool:
        return row["split"] != "train" or _number(row["image_id"]) < below[row["source"]]

    return taken, {source: {"faces": count, "taken": limits[source]} for source, count in faces.items()}


def _chances(table: Table, plan: Plan, strength: float, taken: _Taken) -> Chances:
    """How much of the more frequent answer of each yes/no item is kept in each source, so that at strength 1 both
    answers come out equally often. An item that has one answer alone in a source is left as it is."""
    items = [item for task in plan.tasks for item in task.items if item.form == "boolean"]
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for _, rows in batches(table, pictures=False):
        for row in rows:
            if row["split"] == "train" and taken(row):
                shown = plan.without_held_out(row)
                for item in items:
                    with suppress(Exception):  # the row is refused when it is asked
                        counts[(row["source"], item.name)][item.label(shown) or ""] += 1
    found = {}
    for key, answers in counts.items():
        answers.pop("", None)
        if len(answers) < 2:
            continue
        frequent, most = max(answers.items(), key=lambda pair: (pair[1], pair[0]))
        found[key] = frequent, 1 - strength * (1 - (answers.total() - most) / most)
    return found


def _limits(faces: Mapping[str, int], mixture: Mixture) -> dict[str, int]:
    capped = {source: min(count, mixture.caps.get(source, count)) for source, count in faces.items()}
    power = 1 / mixture.temperature
    whole = min((count ** (1 - power) for count in capped.values()), default=1.0)
    return {source: min(count, round(whole * count**power)) for source, count in capped.items()}


def _edge(buckets: Mapping[int, int], limit: int) -> tuple[int, int]:
    """The bucket in which the limit lies, and how many of it are taken."""
    for bucket in sorted(buckets):
        if limit < buckets[bucket]:
            return bucket, limit
        limit -= buckets[bucket]
    return 1 << (_HASH - _PLACE), 0


def _drawn(table: Table, gone: _Taken, labels: bool) -> Iterator[tuple[str, int]]:
    columns = ["image_id", "original_id", "source", "source_id", "subject_id"]
    plain = (batch.to_pylist() for batch in table.batches([*columns, "split"], split="train", batch_rows=16384))
    for rows in (found for _, found in batches(table, pictures=False)) if labels else plain:
        yield from ((r["source"], _number(r["image_id"])) for r in rows if r["split"] == "train" and not gone(r))


def _number(image_id: str) -> int:
    return draw(1 << _HASH, image_id, "mixture")
