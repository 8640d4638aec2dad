"""Reformatting: faces to conversations, against what one would write with `datasets.map`.

    .venv/bin/python benchmarks/reformatting.py                                  # a million questions, the peer a tenth
    .venv/bin/python benchmarks/reformatting.py --questions 10000000 --peer 0    # memory over ten million questions
    .venv/bin/python benchmarks/reformatting.py --captions                       # every face has a caption, too

The work: from a faces table on disk (a 5 KB picture, CelebA's attributes, age, gender, expression, pose) to a
conversations table on disk, 40 questions a face, in one process. Ours is the step `reformat` itself: opening the table
and checking its bytes, drawing the wordings, checking every answer, naming every question and conversation by its
digest, Parquet and its SHA-256 are counted. With `--captions` the facts of a caption are read on top, a face each.
The peer makes the same messages and turns in the same words, without names by digest and without checks:
`load_dataset`, `map` over examples, `to_parquet`, wordings prepared in advance. Ratios are questions a second of ours /
of the peer: above 1 ours is faster. Seconds are the processor's (user and system, all threads), since the machine is
shared: questions by them are questions a second on one core. Memory is that of the process while ours runs.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from common import Memory, report

LABELLED = ("presence", "expression", "age", "gender", "head_pose")


def rows(count: int, *, captions: bool) -> Iterator[dict[str, Any]]:
    """Labelled faces as a reader of CelebA gives them, with what a pose and an age estimator add."""
    from facemllm import tasks
    from facemllm.annotate.annotator import caption
    from facemllm.tables import FACES, pairs, provenance
    from facemllm.tables.schemas import CELEBA

    generator = np.random.default_rng(0)
    said = [provenance(field, "source") for field in ("attributes", "age", "gender", "expression")]
    empty = dict.fromkeys(FACES.names)
    moods = [option.value for option in tasks.get("expression").items[0].options]
    texts: list[str] = []
    for number in range(count):
        data = generator.bytes(5000)
        truths = generator.integers(0, 2, len(CELEBA)).astype(bool).tolist()
        age, yaw, pitch, roll = generator.uniform((5, -50, -20, -15), (85, 50, 20, 15)).round(2).tolist()
        row = empty | {
            "image_id": hashlib.sha256(data).hexdigest(),
            "image": {"bytes": data, "path": None},
            "width": 178,
            "height": 218,
            "source": "celeba",
            "source_id": f"{number:06d}",
            "subject_id": f"{number // 20:032x}",
            "split": "train",
            "attributes": dict(zip(CELEBA, truths, strict=True)),
            "age": age,
            "gender": ("female", "male")[number % 2],
            "skin_tone": 1 + number % 10,
            "expression": moods[number % len(moods)],
            "yaw": yaw,
            "pitch": pitch,
            "roll": roll,
            "provenance": said,
        }
        if captions:
            if len(texts) < 10_000:
                texts.append(
                    f"{caption(row)} The light comes from above, and the background is plain and out of focus."
                )
            row["caption"] = texts[number % len(texts)]
        yield row | {"attributes": pairs(row["attributes"])}


def settings_for(captions: bool) -> Any:
    """The default settings, for these tasks, asked outright."""
    from facemllm.settings import load

    limits = load(
        "laptop",
        [
            "reformat.held_out=[]",
            "reformat.held_out_combinations=[]",
            "reformat.forms.statement=0",
            "reformat.unseen_wordings=false",
        ],
    )
    asked = [*(["caption"] if captions else []), *LABELLED]
    return limits.model_copy(update={"reformat": limits.reformat.model_copy(update={"tasks": asked})})


def peer(faces: Path, out: Path, cache: Path, count: int) -> int:
    """The same with `datasets`; returns the number of questions."""
    import datasets

    from facemllm import tasks

    prepared = [
        (task, item, [option.value for option in item.options], {o.value: o.text for o in item.options})
        for task in LABELLED
        for item in tasks.get(task).items
    ]

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        row["attributes"] = {pair["name"]: pair["value"] for pair in row["attributes"]}
        messages, turns = [], []
        for task, item, options, words in prepared:
            label = item.label(row)
            if label is None:
                continue
            index = zlib.crc32(f"{row['image_id']} {item.name}".encode()) % len(item.templates)
            reply = words[label] if label in words else item.option_for(label).text
            picture = [] if messages else [{"type": "image", "text": None}]
            messages += [
                {"role": "user", "content": [*picture, {"type": "text", "text": item.templates[index]}]},
                {"role": "assistant", "content": [{"type": "text", "text": reply}]},
            ]
            template = f"{item.name}/{index}"
            turns.append(
                {
                    "task": task,
                    "form": item.form,
                    "template": template,
                    "options": options,
                    "answer": label,
                    "follows": False,
                }
            )
        return {"images": [row["image"]], "messages": messages, "turns": turns}

    datasets.disable_progress_bars()
    shards = str(faces / "part-*.parquet")
    table = datasets.load_dataset("parquet", data_files=shards, split=f"train[:{count}]", cache_dir=str(cache))
    table = table.cast_column("image", datasets.Image(decode=False))
    drop = [name for name in table.column_names if name not in ("image_id", "split", "source", "subject_id")]
    made = table.map(ask, remove_columns=drop)
    made.to_parquet(out / "peer.parquet")
    return sum(len(turns) for turns in made["turns"])


def _turns(folder: Path) -> Iterator[pa.Array]:
    """Numbers of turns, read from the lists' lengths alone."""
    for shard in sorted(folder.glob("part-*.parquet")):
        with pq.ParquetFile(shard) as file:
            for batch in file.iter_batches(columns=["turns.list.element.follows"], batch_size=65536):
                yield pc.list_value_length(batch.column("turns"))


def timed(work: Callable[[], int]) -> dict[str, float]:
    """Questions by second of processor and of the clock."""
    clock, processor = time.perf_counter(), time.process_time()
    questions = work()
    processor, clock = time.process_time() - processor, time.perf_counter() - clock
    return {"questions": questions, "per_core_second": questions / processor, "per_second": questions / clock}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1_000_000)
    parser.add_argument("--peer", type=float, default=0.1, help="share of the faces that the peer does; 0: none")
    parser.add_argument("--captions", action="store_true", help="every face has a caption, too (the peer has no match)")
    arguments = parser.parse_args()
    from facemllm.reformat.run import reformat
    from facemllm.tables import FACES, TableWriter

    limits = settings_for(arguments.captions)
    faces = max(1, arguments.questions // (41 if arguments.captions else 40))
    found, memory = {}, Memory(interval_s=0.5)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with TableWriter(folder / "faces", FACES) as table:
            table.write(rows(faces, captions=arguments.captions))

        def ours() -> int:
            reformat(limits, folder / "faces", folder / "talks")
            return sum(pc.sum(lengths).as_py() for lengths in _turns(folder / "talks"))

        with memory:
            found["ours"] = timed(ours)
        shutil.rmtree(folder / "talks")
        if arguments.peer and not arguments.captions:
            count = max(1, int(faces * arguments.peer))
            found["datasets"] = timed(lambda: peer(folder / "faces", folder, folder / "cache", count))
    for who, figures in found.items():
        print(f"{who:<10}{figures['per_core_second']:>10,.0f} questions a second and core")
    ratios = {}
    if "datasets" in found:
        ratios["questions a core second"] = found["ours"]["per_core_second"] / found["datasets"]["per_core_second"]
    rounded = {who: {key: round(value) for key, value in figures.items()} for who, figures in found.items()}
    packages = ["datasets", "pyarrow"]
    report("reformatting against datasets.map", ratios, packages, memory_mib=memory.mib(), figures=rounded)


if __name__ == "__main__":
    main()
