"""`import` of a CelebA-like tree, against a bare loop that opens, re-encodes and writes the same pictures.

    .venv/bin/python benchmarks/importing.py --rows 100000

Both read 178 x 218 JPEGs from disk and write JPEG bytes with 40 attributes into Parquet. The bare loop decodes and
encodes on one thread and checks nothing; `import` checks every picture, turns it upright, hashes it twice, parses
the native label files, looks for near-duplicates and leaked people, and keeps a quarantine. It is run with one thread
(the ratio that says what all this costs) and with one a core. Ratios are time of ours / time of the bare loop. Memory
is that of the process in MiB after a tenth, at the half and at its peak.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import Memory, median, report
from PIL import Image


def tree(root: Path, rows: int) -> None:
    """A tree in CelebA's layout, of pictures of noise, 20 a person."""
    pictures, labels = root / "Img" / "img_align_celeba", root / "Anno"
    for folder in (pictures, labels, root / "Eval"):
        folder.mkdir(parents=True)
    from facemllm.tables.schemas import CELEBA

    generator = np.random.default_rng(0)
    with (
        (labels / "list_attr_celeba.txt").open("w") as attributes,
        (labels / "identity_CelebA.txt").open("w") as people,
        (root / "Eval" / "list_eval_partition.txt").open("w") as splits,
    ):
        attributes.write(f"{rows}\n{' '.join(CELEBA)}\n")
        for number in range(1, rows + 1):
            name = f"{number:06d}.jpg"
            noise = generator.integers(0, 255, (14, 11, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((178, 218), Image.Resampling.BILINEAR).save(pictures / name, quality=92)
            attributes.write(f"{name}  {'  '.join('1' if v else '-1' for v in generator.integers(0, 2, 40))}\n")
            people.write(f"{name} {number // 20}\n")
            splits.write(f"{name} {(0, 0, 0, 0, 1, 2)[number // 20 % 6]}\n")


def bare(root: Path, out: Path) -> None:
    """What a script would do: for every row open, encode, collect, write a row group now and then."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = (root / "Anno" / "list_attr_celeba.txt").read_text().splitlines()
    names = lines[1].split()
    writer = None
    batch: list[dict[str, object]] = []
    for line in lines[2:]:
        name, *values = line.split()
        image = Image.open(root / "Img" / "img_align_celeba" / name).convert("RGB")
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        batch.append({"image": buffer.getvalue(), **dict(zip(names, (v == "1" for v in values), strict=True))})
        if len(batch) == 128:
            table = pa.Table.from_pylist(batch)
            writer = writer or pq.ParquetWriter(out, table.schema, compression="zstd")
            writer.write_table(table)
            batch = []
    if writer is not None:
        writer.close()


def ours(root: Path, out: Path, workers: int) -> None:
    from facemllm.ingest.run import import_source
    from facemllm.settings import load
    from facemllm.settings.data import Source

    settings = load("laptop", [f"ingest.workers={workers}", f"storage.home={out.parent / 'home'}"])
    import_source(settings, Source(name="celeba", root=str(root)), out)


def measured(what: str, root: Path) -> dict[str, object]:
    """Seconds and memory of one candidate in a process of its own."""
    with tempfile.TemporaryDirectory(dir=root.parent) as folder:
        command = [sys.executable, __file__, "--child", what, "--root", str(root), "--out", f"{folder}/out"]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def child(what: str, root: Path, out: Path) -> None:
    started = time.perf_counter()
    with Memory() as memory:
        if what == "bare":
            bare(root, out)
        else:
            ours(root, out, int(what.removeprefix("ours-")))
    print(json.dumps({"seconds": time.perf_counter() - started, "memory": memory.mib()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.root, arguments.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "celeba"
        tree(root, arguments.rows)
        found: dict[str, list[dict]] = {"bare": [], "ours-1": [], "ours-2": []}
        for number in range(arguments.rounds):
            for what in list(found) if number % 2 == 0 else list(reversed(found)):
                found[what].append(measured(what, root))
                print(f"{what:<8}{found[what][-1]}")
    seconds = {what: median([run["seconds"] for run in runs]) for what, runs in found.items()}
    report(
        "import of a CelebA-like tree",
        {f"{what} / bare": seconds[what] / seconds["bare"] for what in ("ours-1", "ours-2")},
        ["pillow", "pyarrow", "numpy"],
        rows=arguments.rows,
        rounds=arguments.rounds,
        rows_per_second={what: round(arguments.rows / value) for what, value in seconds.items()},
        memory_mib={what: runs[-1]["memory"] for what, runs in found.items()},
    )


if __name__ == "__main__":
    main()
