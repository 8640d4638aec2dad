"""The step `annotate`: a Ray Data job that lets an annotator describe faces.

Only what the annotator reads travels through Ray (for the oracle, labels without images); its answers come back in
row order and join the streamed rows as the table is written. So memory stays flat, and the bytes depend neither on
the batch size nor on how many tasks run at once. Rows an annotator fails on go to quarantine with the reason. When it
cannot go on at all the job ends with one line, and what a model has answered stays in the store for the next run.

A model's words are held against the labels of the source: contradictions of its caption (`contradictions`) and of its
labels (`label_contradictions`) are counted by item in the manifest, as are rows that the ledger keeps from it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from facemllm.annotate.annotator import FILLED, Annotation, Annotator, Chained, Oracle
from facemllm.annotate.describer import Describer, endpoint, local
from facemllm.annotate.experts import Experts
from facemllm.annotate.job import answers
from facemllm.asking.bill import Bill
from facemllm.asking.local import digest_of, folder_of
from facemllm.asking.requests import JobStopped
from facemllm.core import progress
from facemllm.errors import UserError
from facemllm.settings import Settings
from facemllm.tables import FACES, PAIRED, Table, TableWriter, mapping, open_table, pairs, provenance
from facemllm.tasks.caption import disagreements, label_disagreements
from facemllm.version import ledger
from facemllm.version.tombstones import Tombstones

_ANNOTATORS: dict[str, Callable[[Settings, Table], Annotator]] = {
    "oracle": lambda settings, faces: Oracle(),
    "endpoint": lambda settings, faces: endpoint(settings, faces.sources),
    "local": lambda settings, faces: local(settings),
}


def annotate(settings: Settings, faces: Path, out: Path) -> Mapping[str, Any]:
    """Write `faces` with captions and the annotator's labels to `out`. Returns the manifest. Raises UserError if
    `faces` is no sound table or holds rows that were forgotten, `out` exists, the ledger forbids it, or the annotator
    cannot go on."""
    chosen = settings.annotate
    table = open_table(faces, FACES)
    Tombstones.of(settings).refuse(table, str(faces))
    ledger.require(settings, table.sources)
    main = annotator = _ANNOTATORS[chosen.annotator](settings, table)
    if chosen.experts.fields:
        annotator = Chained(Experts.of(settings), main)
    sizes: dict[str, Any] = {"batch_size": chosen.batch_size, "concurrency": chosen.concurrency}
    sizes["shard_mb"] = settings.ingest.shard_mb
    if not isinstance(main, Describer):
        return run(annotator, table, out, **sizes)
    with Bill(main.sender, main.model, table.rows) as bill:
        return run(annotator, table, out, bill=bill, forbidden=main.forbidden, **sizes)


def reads(settings: Settings) -> dict[str, Any]:
    """What the annotated table depends on beside code and faces: the annotator and all that shapes its answers.
    Concurrency, time-outs, retries, budgets and the endpoint's address are not among it."""
    chosen = settings.annotate
    found: dict[str, Any] = {"annotator": chosen.annotator, "experts": sorted(set(chosen.experts.fields))}
    if chosen.annotator != "oracle":
        found["vision_language"] = chosen.vision_language.model_dump()
    if chosen.annotator == "endpoint":
        found["prices"] = chosen.endpoint.input_price, chosen.endpoint.output_price
        if chosen.endpoint.third_party:
            rows = ledger.entries(settings).values()
            found["allowed"] = [row.key for row in rows if "third_party" in row.uses and row.status != "withdrawn"]
    if chosen.annotator == "local":
        found["weights"] = digest_of(folder_of(str(chosen.vision_language.model)))
    return found


def run(
    annotator: Annotator,
    faces: Table,
    out: Path,
    *,
    batch_size: int,
    concurrency: int,
    shard_mb: int = 256,
    bill: Bill | None = None,
    forbidden: Mapping[str, str] | None = None,
) -> Mapping[str, Any]:
    """`annotate` with any annotator. The answers of a model, which has a bill, are held against the labels, and its
    refusals counted."""
    about = {"annotator": annotator.name, "annotator_digest": annotator.digest, **faces.terms}
    writer = TableWriter(out, FACES, parents=[faces.digest], about=about, shard_mb=shard_mb)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    done = 0
    try:
        with (
            writer as table,
            progress.bar("annotating", faces.rows) as bar,
            closing(answers(annotator, faces, batch_size, concurrency)) as replies,
        ):
            for done, (row, (image_id, annotation, reason)) in enumerate(zip(faces.iterate(), replies, strict=True)):
                assert image_id == row["image_id"], "Ray Data returned answers out of order"
                if annotation is None:
                    table.quarantine(faces.digest, done, reason)
                    if bill is not None and row["source"] in (forbidden or {}):
                        counts["ledger_refused"][row["source"]] += 1
                else:
                    table.write([joined(row, annotation, annotator.digest)])
                    if bill is not None:
                        counts["contradictions"].update(disagreements({**row, "caption": annotation.caption}).keys())
                        counts["label_contradictions"].update(label_disagreements(annotation.labels, row).keys())
                bar.update(done + 1, "" if bill is None else bill.line())
            if bill is not None:  # by item, and by source
                names = ("contradictions", "label_contradictions", "ledger_refused")
                table.manifest["about"] |= {name: dict(sorted(counts[name].items())) for name in names}
    except JobStopped as stop:
        raise UserError(
            f"annotation stopped after {done:,} of {faces.rows:,} rows: {stop}. What was answered is kept; run again "
            "to go on"
        ) from None
    return writer.manifest


def _own_caption(row: Mapping[str, Any]) -> bool:
    """Whether the caption is the source's own; that of an earlier annotation gives way to a new one."""
    said = (entry["origin"] for entry in row["provenance"] or () if entry["field"] == "caption")
    return row["caption"] is not None and "source" in said


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
    if annotation.caption is not None and not _own_caption(row):
        new["caption"] = annotation.caption
        added.add("caption")
    entries = [entry for entry in row["provenance"] or () if entry["field"] not in added - set(PAIRED)]
    known = {entry["field"] for entry in entries}
    origin = "renderer" if row["source"] == "render" else "source"
    entries += [provenance(c, origin) for c in FILLED if row[c] not in (None, []) and c not in known]
    # The cost of a reply is counted once, on the first field that it gave.
    for place, column in enumerate(sorted(added)):
        by = {"origin": "annotator", "model_digest": digest, **annotation.by.get(column, {})}
        entries.append(provenance(column, cost=0.0 if place else annotation.cost, **by))  # type: ignore[arg-type]
    new["provenance"] = sorted(entries, key=lambda entry: entry["field"])
    return new
