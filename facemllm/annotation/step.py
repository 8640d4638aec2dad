"""The step `annotate`: a Ray Data job that lets an annotator describe faces.

Only what the annotator reads travels through Ray (for the oracle, labels without images); its answers come back in
row order and join the streamed rows as the table is written. So memory stays flat, and the bytes depend neither on
the batch size nor on how many tasks run at once. Rows an annotator fails on go to quarantine with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from facemllm import progress
from facemllm.annotation.annotator import LABELS, PAIRED, Annotation, Annotator
from facemllm.annotation.job import answers
from facemllm.annotation.oracle import Oracle
from facemllm.records import FACES, Table, TableWriter, mapping, open_table, pairs
from facemllm.settings import Settings

_ANNOTATORS = {"oracle": Oracle}


def annotate(settings: Settings, faces: Path, out: Path) -> Mapping[str, Any]:
    """Write `faces` with captions and the annotator's labels to `out`. Returns the manifest.

    Raises UserError if `faces` is no sound table or `out` exists.
    """
    chosen = settings.annotation
    return run(
        _ANNOTATORS[chosen.annotator](),
        open_table(faces, FACES),
        out,
        batch_size=chosen.batch_size,
        concurrency=chosen.concurrency,
        shard_mb=settings.data.shard_mb,
    )


def run(
    annotator: Annotator, faces: Table, out: Path, *, batch_size: int, concurrency: int, shard_mb: int = 256
) -> Mapping[str, Any]:
    """`annotate` with any annotator."""
    about = {"annotator": annotator.name, "annotator_digest": annotator.digest}
    writer = TableWriter(out, FACES, parents=[faces.digest], about=about, shard_mb=shard_mb)
    with (
        writer as table,
        progress.bar("annotating", faces.rows) as bar,
        closing(answers(annotator, faces, batch_size, concurrency)) as replies,
    ):
        for number, (row, (image_id, annotation, reason)) in enumerate(zip(faces.iterate(), replies, strict=True)):
            assert image_id == row["image_id"], "Ray Data returned answers out of order"
            if annotation is None:
                table.quarantine(faces.digest, number, reason)
            else:
                table.write([joined(row, annotation, annotator.digest)])
            bar.update(number + 1)
    return writer.manifest


def joined(row: Mapping[str, Any], annotation: Annotation, digest: str) -> dict[str, Any]:
    """A row with what the annotator adds, and an entry of provenance for every field that says something."""
    new = dict(row)
    added = set()
    for column, value in annotation.labels.items():
        if column in PAIRED:
            own = mapping(row[column])
            new[column] = pairs({**value, **own})
            changed = bool(value.keys() - own.keys())
        else:
            new[column] = value if row[column] is None else row[column]
            changed = row[column] is None and value is not None
        if changed:
            added.add(column)
    if annotation.caption is not None:
        new["caption"] = annotation.caption
        added.add("caption")
    entries = [entry for entry in row["provenance"] or () if entry["field"] not in added - set(PAIRED)]
    known = {entry["field"] for entry in entries}
    origin = "renderer" if row["source"] == "render" else "source"
    entries += [_entry(c, origin, None, 0.0) for c in LABELS if row[c] not in (None, []) and c not in known]
    # The cost of a reply is counted once, on the first field that it gave.
    for place, column in enumerate(sorted(added)):
        entries.append(_entry(column, "annotator", digest, 0.0 if place else annotation.cost))
    new["provenance"] = sorted(entries, key=lambda entry: entry["field"])
    return new


def _entry(field: str, origin: str, digest: str | None, cost: float) -> dict[str, Any]:
    return {
        "field": field,
        "origin": origin,
        "model_digest": digest,
        "prompt_hash": None,
        "time": None,
        "cost": cost,
    }
