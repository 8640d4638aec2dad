"""Reading and writing the tables, against `datasets` doing the same work.

    .venv/bin/python benchmarks/tables.py --rows 20000

The work: rows of `faces` (a 6 KB picture, labels, provenance) as Python dictionaries into Parquet shards; then every
row back as a dictionary with the columns that `reformat` reads, images as bytes. `datasets` writes with
`Dataset.from_list(...).to_parquet` (all rows in memory; its streaming way, `from_generator`, took six times as long)
and reads with `load_dataset(streaming=True)`, images not decoded. Ours also takes SHA-256 of every shard while writing,
and checks them while opening; these are counted. Ratios are time of `datasets` / time of ours: above 1 ours is faster.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import in_turns, median, report


def rows(count: int) -> Iterator[dict[str, Any]]:
    """Rows as a reader gives them."""
    from facemllm.core import digests
    from facemllm.tables import FACES, pairs, provenance

    generator = np.random.default_rng(0)
    names = [f"Attribute_{n}" for n in range(40)]
    said = [provenance(field, "source") for field in ("attributes", "age", "gender", "expression")]
    empty = dict.fromkeys(FACES.names)
    for number in range(count):
        data = generator.bytes(6000)
        yield empty | {
            "image_id": digests.of_bytes(data),
            "image": {"bytes": data, "path": None},
            "width": 178,
            "height": 218,
            "source": "celeba",
            "source_id": f"{number:06d}",
            "subject_id": f"{number // 20:032x}",
            "split": "train",
            "attributes": pairs(dict(zip(names, (bool(v) for v in generator.integers(0, 2, 40)), strict=True))),
            "age": 30.0,
            "gender": "female",
            "expression": "neutral",
            "caption": "A young woman with brown hair and a smile.",
            "provenance": said,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    import datasets

    from facemllm.reformat.questions import LABELS, RARE
    from facemllm.tables import FACES, TableWriter, open_table

    datasets.disable_progress_bars()
    columns = ["image", *LABELS, *RARE]
    made = list(rows(arguments.rows))  # so that both are measured on writing, not on making rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def write_ours() -> None:
            shutil.rmtree(folder / "ours", ignore_errors=True)
            with TableWriter(folder / "ours", FACES) as table:
                table.write(made)

        write_ours()
        features = datasets.load_dataset(
            "parquet", data_files=str(folder / "ours" / "part-*.parquet"), split="train", streaming=True
        ).features

        def write_theirs() -> None:
            datasets.Dataset.from_list(made, features=features).to_parquet(folder / "theirs.parquet")

        def read_ours() -> None:
            read = sum(len(row["image"]["bytes"]) > 0 for row in open_table(folder / "ours", FACES).iterate(columns))
            assert read == arguments.rows

        def read_theirs() -> None:
            dataset = datasets.load_dataset(
                "parquet", data_files=str(folder / "theirs.parquet"), split="train", streaming=True, columns=columns
            ).cast_column("image", datasets.Image(decode=False))
            assert sum(len(row["image"]["bytes"]) > 0 for row in dataset) == arguments.rows

        write = in_turns(arguments.rounds, ours=write_ours, theirs=write_theirs)
        read = in_turns(arguments.rounds, ours=read_ours, theirs=read_theirs)
    for what, seconds in (("write", write), ("read", read)):
        for who, times in seconds.items():
            print(f"{what:<6}{who:<8}{arguments.rows / median(times):>10,.0f} rows/s")
    report(
        "tables against datasets",
        {what: median(s["theirs"]) / median(s["ours"]) for what, s in (("write", write), ("read", read))},
        ["datasets", "pyarrow"],
        rows=arguments.rows,
        rounds=arguments.rounds,
    )


if __name__ == "__main__":
    main()
