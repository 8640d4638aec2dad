"""Writing an export: one split of a conversations table, row by row, beside it where the pictures come from.

    llava       OUT/train.json, a list as LLaVA's train.py reads it; pictures in OUT/images (its image_folder)
    sharegpt    OUT/train.json and OUT/dataset_info.json for LLaMA-Factory (dataset_dir and media_dir: OUT)
    trl         OUT/train.parquet, `messages` and `images` (embedded) for TRL's SFTTrainer and for `datasets`
    facebench   OUT/test.jsonl, rows as FaceBench's inference.py reads them; pictures in OUT/images (its images-dir)
    facexbench  OUT/benchmark/*.json and OUT/benchmark/images, four options and a letter, one file an item

OUT/SOURCES.json says whose the pictures are and what may be done with them. An export is a copy: forgetting a person
does not reach it. A folder appears whole or not at all; memory is flat.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from facemllm.core import digests, progress
from facemllm.core.files import partial_folder, publish
from facemllm.errors import UserError
from facemllm.reformat.formats import FaceBench, FaceXBench, Format, Llava, ShareGpt, Trl
from facemllm.settings import Settings
from facemllm.tables import CONVERSATIONS, SPLITS, Table, open_table
from facemllm.version import ledger
from facemllm.version.tombstones import Tombstones

SOURCES = "SOURCES.json"


TRAINERS: Mapping[str, type[Format]] = {"llava": Llava, "sharegpt": ShareGpt, "trl": Trl}
BENCHMARKS: Mapping[str, type[Format]] = {"facebench": FaceBench, "facexbench": FaceXBench}
"""Formats to evaluate with: of the test split, unless another is asked for."""
FORMATS = {**TRAINERS, **BENCHMARKS}


def export(settings: Settings, conversations: Path, out: Path, name: str, split: str | None = None) -> dict[str, Any]:
    """Write one split of a conversations table to the folder `out`; unless given, `test` for a benchmark's format and
    `train` for a trainer's. Returns rows `read`, `kept` and left out (`quarantined`), `entries` written, and the
    `digest` of the folder. Raises UserError: unknown format or split, no sound table, no row to write, a row that was
    forgotten, a source whose terms do not allow what the split is for, or `out` exists."""
    if name not in FORMATS:
        raise UserError(f"no format '{name}'; choose one of {', '.join(FORMATS)}")
    split = split or ("test" if name in BENCHMARKS else "train")
    if split not in SPLITS:  # it names files
        raise UserError(f"no split '{split}'; choose one of {', '.join(SPLITS)}")
    table = open_table(conversations, CONVERSATIONS)
    ledger.require(settings, table.sources, "train" if split == "train" else "evaluate")
    Tombstones.of(settings).refuse(table, str(conversations))
    partial, read, kept, entries = partial_folder(out), 0, 0, 0
    try:
        made = FORMATS[name](partial, split)
        try:
            with progress.bar(f"writing {name}", table.rows) as bar:
                for row in table.iterate(split=split):
                    written = made.add(row)
                    read, kept, entries = read + 1, kept + (written > 0), entries + written
                    bar.update(read)
        finally:
            made.close()
        if not kept:
            why = f"none of its {read} rows can be said in this format" if read else f"it has no row of split '{split}'"
            raise UserError(f"{conversations}: nothing to export as {name}: {why}")
        _write_sources(settings, table, partial)
        publish(partial, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {
        **{"format": name, "split": split, "read": read, "kept": kept, "quarantined": read - kept},
        "entries": entries,
        "digest": digests.of_tree(out),
    }


def _write_sources(settings: Settings, table: Table, folder: Path) -> None:
    rows = ledger.entries(settings)
    content = {
        "conversations": table.digest,
        "note": "Copied from a conversations table. What may be done with it is what every source allows; third_party "
        "is handing its pictures on. `facemllm forget` does not reach this copy: make it again afterwards.",
        "uses": ledger.allowed(settings, table.sources),
        "sources": [rows[key].model_dump() for key in table.sources],
    }
    (folder / SOURCES).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
