"""A contender in a process of its own: `python training_contenders.py FOLDER OPTIONS`, then runs by JSON lines.

Each line on standard input is the arguments of a run; the answer is one line on standard output: `marks` (step,
seconds, loss), peak memory. So weights, data and libraries are loaded before the clock starts, contenders take turns,
and peaks of memory are clean. `Contender` is the other end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import Memory, median

HERE = Path(__file__).resolve()
EVERY = 5  # steps between marks; those before the first are warm-up


class Ours:
    """`run_stage` on a prepared folder, rows as the profile packs them. `single`: one question a row, all else equal;
    `faces`: so many of the corpus; `job`: other fields of `settings.train`."""

    def __init__(
        self, folder: Path, single: bool = False, faces: int | None = None, job: Mapping[str, Any] | None = None
    ) -> None:
        from training_material import Material

        from facemllm.model.families import family_of
        from facemllm.tables import CONVERSATIONS, open_table
        from facemllm.train.corpus import FaceDataset
        from facemllm.train.data import read_turns, tokenise
        from facemllm.train.pixels import pixel_cache

        self.material, self.single, self.job = Material.open(folder), single, dict(job or {})
        model, processor = self.material.model()
        table = open_table(self.material.table, CONVERSATIONS)
        self.digest = table.digest
        family = family_of(model.config, processor)
        corpus = tokenise(read_turns(table, "train"), family.frame)
        if faces is not None:
            corpus = first_faces(corpus, faces)
        if single:
            corpus = one_turn_a_row(corpus)
        started = time.perf_counter()
        self.dataset = FaceDataset(corpus, pixel_cache(table, family, folder / "cache"))
        self.decoding = time.perf_counter() - started

    def run(self, steps: int, every: int, precision: str, device: str = "cpu") -> dict[str, Any]:
        """Train fresh weights for so many steps; `marks` are (step, seconds, mean loss since the last mark)."""
        from training_material import stage_run

        from facemllm.settings import Stage, load
        from facemllm.train.loop import run_stage

        settings = load("laptop")
        train = {
            "precision": precision,
            "micro_images": 0,
            "feature_cache": True,
            "recompute": False,
            "compile": False,
            "divergence": 0.0,
        }
        train = settings.train.model_copy(update=train | self.job)
        settings = settings.model_copy(update={"seed": self.material.seed, "train": train})
        stage = Stage.model_validate({**self.material.stage, "steps": steps})
        if self.single:
            images = stage.batch_images * stage.turns_per_image
            stage = stage.model_copy(update={"batch_images": images, "turns_per_image": 1})
        marks: list[tuple[int, float, float]] = []
        padding: list[float] = []

        def log(step: int, metrics: dict[str, float]) -> None:
            marks.append((step, time.perf_counter() - started, metrics["loss"]))
            padding.append(metrics["padding"])

        model, processor = self.material.model()
        run = stage_run(
            stage,
            settings,
            self.material.folder,
            self.material.table,
            made_from={"conversations": self.digest},
            cache=self.material.folder / "cache",
            device=device,
            log_every=every,
        )
        started = time.perf_counter()
        outcome = run_stage(run, model, processor, self.dataset, log=log)
        return {
            "marks": marks,
            "tokens_per_step": outcome.tokens / steps,
            "padding": sum(padding) / len(padding),
            "flops_per_step": outcome.flops / steps,
            "decoding": self.decoding,
        }


def first_faces(corpus: Any, count: int) -> Any:
    """The first so many rows of a corpus."""
    turns = int(corpus.turn_starts[count])
    names = ("prompt", "answer", "task", "follows", "fact", "item", "form", "share")
    per_turn = {name: getattr(corpus, name)[:turns] for name in names}
    rows = {"image_id": corpus.image_id[:count], "pixel_row": corpus.pixel_row[:count]}
    return replace(corpus, turn_starts=corpus.turn_starts[: count + 1], **rows, **per_turn)


def one_turn_a_row(corpus: Any) -> Any:
    """The same questions, each with a picture of its own."""
    import numpy as np

    rows = np.repeat(np.arange(len(corpus)), np.diff(corpus.turn_starts))
    starts = np.arange(len(rows) + 1, dtype=np.int64)
    return replace(corpus, image_id=corpus.image_id.take(rows), pixel_row=corpus.pixel_row[rows], turn_starts=starts)


def rate(found: Mapping[str, Any], samples: int) -> float:
    """Samples a second between the first and the last mark, so many a step."""
    (first, began, _), (last, ended, _) = found["marks"][0], found["marks"][-1]
    return float(samples * (last - first) / (ended - began))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    found = {"median": median(values), "low": min(values), "high": max(values)}
    return {name: round(value, 3) for name, value in found.items()}


class Contender:
    """A contender's process, seen from outside: `run` waits for the answer. Ended by leaving the block."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.options = options
        self._process = subprocess.Popen(
            [sys.executable, str(HERE), str(folder), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(self, **arguments: Any) -> dict[str, Any]:
        """Have it train; raises RuntimeError when its process ended instead."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"contender {self.options} ended with code {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found


def make(folder: Path, options: Mapping[str, Any]) -> Any:
    """The contender that `options` describe: `kind` is ours, hf or trl."""
    if options["kind"] == "ours":
        return Ours(folder, **{name: value for name, value in options.items() if name != "kind"})
    from training_peers import Peer

    return Peer(folder, **options)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    with Memory(interval_s=0.05) as loading:
        contender = make(Path(sys.argv[1]), json.loads(sys.argv[2]))
    for line in sys.stdin:
        arguments = json.loads(line)
        with Memory(interval_s=0.05) as memory:
            found = contender.run(**arguments)
        found["peak_mib"] = max(memory.samples + loading.samples, default=0) >> 20
        if arguments.get("device", "cpu") != "cpu":
            import torch

            found["device_peak_mib"] = torch.cuda.max_memory_allocated() >> 20
            torch.cuda.reset_peak_memory_stats()
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
