"""Step `ingest`: the configured sources become one `faces` table.

Every source has to stand in the ledger. Rows stream through in the order of the sources: drawn heads, or pictures read
from disk; those that were forgotten are left out, those that cannot be used are quarantined with file and reason.
While rows go by, they are put aside on disk and their perceptual hashes noted; once all are there, copies and people in
two splits are left out (`duplicates.py`), and the table is written, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from facemllm.core import digests, images, progress
from facemllm.core.machine import cores, ordered
from facemllm.errors import UserError
from facemllm.ingest.duplicates import Census
from facemllm.ingest.importing import HASH, folder_of, imported, split_of
from facemllm.ingest.reader import Refused, follow
from facemllm.settings import Ingest, Settings
from facemllm.settings.data import Source
from facemllm.tables import CONVERSATIONS, FACES, LABELS, PAIRED, TableWriter, pairs, provenance, subject_id
from facemllm.tables.schemas import fairness_groups
from facemllm.version import ledger
from facemllm.version.tombstones import FORGOTTEN, Tombstones

RENDER = Source(name="render")
_CHUNK = 10
# the order in which a drawn face's provenance has always stood: another one would change every digest
_LABELS = sorted((label.name for label in LABELS), key=("segmentation", "action_units").__contains__)


def import_source(
    settings: Settings, source: Source, out: Path, refuses: Callable[[str], str | None] = lambda text: None
) -> Mapping[str, Any]:
    """One dataset on disk as a table: `faces`, or `conversations` where it is a benchmark that is only measured on;
    `refuses` says why the words of a benchmark's question may not be asked. Raises UserError as `ingest`."""
    from facemllm.ingest import benchmarks

    if source.name == RENDER.name:
        raise UserError("drawn heads lie in no folder; draw them with: facemllm render OUT")
    if source.name not in benchmarks.KEYS:
        return ingest(settings, out, [source])
    ledger.require(settings, [source.name], "evaluate")
    follow(settings.ingest.links)
    about = {"sources": [source.name], "uses": ledger.allowed(settings, [source.name])}
    with (
        TableWriter(out, CONVERSATIONS, about=about, shard_mb=settings.ingest.shard_mb) as table,
        progress.bar(f"reading {source.name}", 0) as bar,
    ):
        first: Refused | None = None
        kept = 0
        for done, row in enumerate(benchmarks.read(source.name, folder_of(source), refuses), start=1):
            if isinstance(row, Refused):
                first = first or row
                table.quarantine(row.file, row.row, row.reason)
            else:
                kept += 1
                table.write([row])
            bar.update(done, f"{done} questions")
        if not kept:
            raise _nothing([source.name], first)
    return table.manifest


def ingest(settings: Settings, out: Path, sources: Sequence[Source] | None = None) -> Mapping[str, Any]:
    """Write the `faces` table of the configured sources, or of these, to `out` and return its manifest.

    `[RENDER]` draws `ingest.identities` synthetic heads, `ingest.images_per_identity` pictures of each. Raises
    UserError when a source is unknown, withdrawn or not where it is said to be, or when nothing could be read.
    """
    sources = settings.ingest.sources if sources is None else sources
    names = sorted({source.name for source in sources})
    ledger.require(settings, names)
    about = {"sources": names, "uses": ledger.allowed(settings, names), "seed": settings.seed}
    forgotten = Tombstones.of(settings)
    census = Census(settings.ingest.near_duplicate_bits)
    first: Refused | None = None
    for barred in sorted(forgotten.marks.look):
        census.bar(bytes.fromhex(barred))
    with TableWriter(out, FACES, about=about, shard_mb=settings.ingest.shard_mb) as table:
        for row in _rows(settings, sources):
            if isinstance(row, Refused):
                first = first or row
                table.quarantine(row.file, row.row, row.reason)
            elif forgotten.covers(row):
                census.bar(row[HASH])
                table.quarantine(row["source"], 0, FORGOTTEN)
            else:
                census.add(row["image_id"], row.pop(HASH), row["split"], row["subject_id"], _groups(row))
                table.defer(row)
        if not census.splits:
            raise _nothing(names, first)
        dropped = census.dropped()
        table.manifest["about"] |= {
            "duplicates": census.report(dropped),
            "groups": {"read": census.counted({}), "kept": census.counted(dropped)},
        }
        _settle(table, dropped)
    return table.manifest


def _nothing(names: Sequence[str], first: Refused | None) -> UserError:
    why = f"; {first.file}, row {first.row}: {first.reason}" if first else ""
    return UserError(f"nothing could be read from {', '.join(names)}{why}")


def _settle(table: TableWriter, dropped: Mapping[int, str]) -> None:
    """Write the rows that were put aside, but for those that are dropped, which join the quarantine."""
    number = 0
    for group in table.deferred():
        stays = []
        for row in group.select(["source", "source_id"]).to_pylist():
            if reason := dropped.get(number):
                name = row["source"] if reason == FORGOTTEN else f"{row['source']}/{row['source_id']}"
                table.quarantine(name, number, reason)
            stays.append(not reason)
            number += 1
        table.write_table(group if all(stays) else group.filter(pa.array(stays)))


def _groups(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    found = fairness_groups(row) | {"source": row["source"], "split": row["split"]}
    found |= {name: row[name] for name in ("ethnicity", "expression") if row.get(name) is not None}
    return tuple(sorted(found.items()))


def _rows(settings: Settings, sources: Sequence[Source]) -> Iterator[dict[str, Any] | Refused]:
    """Rows of all sources one after the other, with progress."""
    data = settings.ingest
    for source in sources:
        drawn = source.name == "render"
        total = data.identities * data.images_per_identity if drawn else 0
        rows = _rendered(settings) if drawn else imported(source, data, data.workers)
        name = "rendering heads" if drawn else f"reading {source.name}"
        refused = 0
        with progress.bar(name, total) as bar:
            for done, row in enumerate(rows, start=1):
                refused += isinstance(row, Refused)
                of = f" of {total}" if total else ""
                bar.update(done, f"{done}{of} {'heads' if drawn else 'faces'}" + f", {refused} refused" * (refused > 0))
                yield row


def _rendered(settings: Settings) -> Iterator[dict[str, Any]]:
    data = settings.ingest
    chunks = (range(start, min(start + _CHUNK, data.identities)) for start in range(0, data.identities, _CHUNK))
    for rows in ordered(partial(_render_chunk, settings.seed, data), chunks, data.workers or cores()):
        yield from rows


def _render_chunk(seed: int, data: Ingest, identities: range) -> list[dict[str, Any]]:
    from facemllm.heads.render import render_identity

    heads = (render_identity(seed, one, data.images_per_identity, data.image_size) for one in identities)
    return [face_row(head, data) for rows in heads for head in rows]


def face_row(head: Mapping[str, Any], data: Ingest) -> dict[str, Any]:
    """A rendered head as a row of `faces`: image named by its bytes, subject hashed, split drawn, provenance noted."""
    values = dict(head)
    subject = subject_id(values["source"], values.pop("subject"))
    image: bytes = values.pop("image")
    name = digests.of_bytes(image)
    maps = {column: pairs(values[column]) for column in PAIRED if column in values}
    return {
        **values,
        **maps,
        "image_id": name,
        "original_id": name,
        "image": {"bytes": image, "path": None},
        "segmentation": {"bytes": values["segmentation"], "path": None},
        "subject_id": subject,
        "split": split_of(subject, data.validation_share, data.test_share),
        "provenance": [provenance(column, "renderer") for column in _LABELS if values.get(column) is not None],
        # of the stored bytes, as everywhere else: on the raw pixels up to 4 of its 256 bits differ
        HASH: images.perceptual_hashes(Image.open(BytesIO(image))),
    }
