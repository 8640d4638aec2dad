"""Which training faces, and which of their yes/no questions, are taken: decided before any is written.

Faces are drawn by a hash of their image, so a cap takes the same ones however many other sources there are. Memory is
flat: counts, and the hashes that fall into the bucket of a source in which its limit lies.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from facemllm.core.digests import draw
from facemllm.errors import UserError
from facemllm.reformat.questions import Chances, Plan, batches
from facemllm.settings import Mixture
from facemllm.tables import Table

_BITS = 16
_HASH = 64

Taken = Callable[[Mapping[str, Any]], bool]


def chosen(table: Table, mixture: Mixture, forgotten: Taken) -> tuple[Taken, dict[str, dict[str, int]] | None]:
    """Tells which training faces are taken; and by source, how many there are (`faces`) and are taken (`taken`), None
    where the mixture asks for nothing.

    Raises UserError when a cap names a source that the table does not hold.
    """
    if not mixture.caps and mixture.temperature == 1:
        return lambda row: True, None
    if unknown := sorted(set(mixture.caps) - set(table.sources)):
        raise UserError(
            f"reformat.mixture.caps names {', '.join(unknown)}, which the faces do not come from; they come from "
            f"{', '.join(table.sources)}"
        )
    buckets: dict[str, Counter[int]] = defaultdict(Counter)
    for source, number in _drawn(table, forgotten):
        buckets[source][number >> (_HASH - _BITS)] += 1
    faces = {source: found.total() for source, found in sorted(buckets.items())}
    limits = _limits(faces, mixture)
    edges = {source: _edge(buckets[source], limits[source]) for source in faces}
    within: dict[str, list[int]] = defaultdict(list)
    for source, number in _drawn(table, forgotten):
        if number >> (_HASH - _BITS) == edges[source][0]:
            within[source].append(number)
    below = {
        source: sorted(within[source])[left] if left < len(within[source]) else (bucket + 1) << (_HASH - _BITS)
        for source, (bucket, left) in edges.items()
    }

    def taken(row: Mapping[str, Any]) -> bool:
        return row["split"] != "train" or _number(row["image_id"]) < below[row["source"]]

    return taken, {source: {"faces": count, "taken": limits[source]} for source, count in faces.items()}


def chances(table: Table, plan: Plan, strength: float, taken: Taken) -> Chances:
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
    return 1 << _BITS, 0


def _drawn(table: Table, forgotten: Taken) -> Iterator[tuple[str, int]]:
    columns = ["image_id", "original_id", "source", "source_id", "subject_id"]
    for batch in table.batches([*columns, "split"], split="train", batch_rows=16384):
        yield from ((row["source"], _number(row["image_id"])) for row in batch.to_pylist() if not forgotten(row))


def _number(image_id: str) -> int:
    return draw(1 << _HASH, image_id, "mixture")
