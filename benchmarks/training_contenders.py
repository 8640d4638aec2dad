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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()


class Ours:
    """`run_stage` on a prepared folder. `single`: one question a row, all else equal."""

    def __init__(self, folder: Path, single: bool = False, **options: Any) -> None:
        from training_material import Material

        from facemllm.model.prompts import Frame
        from facemllm.records import CONVERSATIONS, open_table
        from facemllm.training.data import pixel_cache, read_turns, tokenise
        from facemllm.training.step_loss import Faces

        self.material, self.single, self.options = Material.open(folder), single, options
        model, processor = self.material.model()
        table = open_table(self.material.table, CONVERSATIONS)
        self.corpus = tokenise(read_turns(table, "train"), Frame.of(model, processor))
        started = time.perf_counter()
        self.faces = Faces(pixel_cache(table, processor.image_processor, folder / "pixels"))
        self.decoding = time.perf_counter() - started

    def run(self, steps: int, every: int, precision: str, device: str = "cpu") -> dict[str, Any]:
        """Train fresh weights for so many steps; `marks` are (step, seconds, mean loss since the last mark)."""
        from facemllm.settings import Stage, load
        from facemllm.training.loop import Job, run_stage

        stage = Stage.model_validate(self.material.stage | {"steps": steps} | self.options)
        corpus = self.corpus
        if self.single:
            corpus = one_turn_a_row(corpus)
            stage = stage.model_copy(
                update={"batch_images": stage.batch_images * stage.turns_per_image, "turns_per_image": 1}
            )
        settings = load("laptop")
        marks: list[tuple[int, float, float]] = []

        def log(step: int, metrics: dict[str, float]) -> None:
            marks.append((step, time.perf_counter() - started, metrics["loss"]))

        model, processor = self.material.model()
        job = Job(
            name="benchmark",
            stage=stage,
            lora=settings.training.lora,
            seed=self.material.seed,
            key="benchmark",
            model=settings.model,
            precision=precision,
            device=device,
            log_every=every,
        )
        started = time.perf_counter()
        outcome = run_stage(job, model, processor, corpus, self.faces, log=log)
        return {
            "marks": marks,
            "tokens_per_step": outcome.tokens / steps,
            "flops_per_step": outcome.flops / steps,
            "decoding": self.decoding,
        }


def one_turn_a_row(corpus: Any) -> Any:
    """The same questions, each with a picture of its own."""
    from dataclasses import replace

    import numpy as np

    turns = np.diff(corpus.turn_starts)
    return replace(
        corpus, pixel_row=np.repeat(corpus.pixel_row, turns), turn_starts=np.arange(turns.sum() + 1, dtype=np.int64)
    )


class Contender:
    """A contender's process, seen from outside: `run` waits for the answer. Ended by leaving the block."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.options = options
        self._process = subprocess.Popen(
            [sys.executable, str(HERE), str(folder), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(self, **arguments: Any) -> dict[str, Any]:
        """Have it train; raises RuntimeError when its process ended instead."""
        assert self._process.stdin is not None and self._process.stdout is not None
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
    from common import Memory

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
