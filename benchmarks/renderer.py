"""Synthetic heads a second of one core, from random numbers to encoded JPEG, mask PNG and labels.

    .venv/bin/python benchmarks/renderer.py [--people 30] [--rounds 6] [--size 128]

One process, one thread, two pictures a person: the median over the rounds by processor time, which other work on the
machine hardly moves, and by the clock. On a shared AMD EPYC, 128 pixels: 96 pictures a second of processor.
"""

from __future__ import annotations

import argparse
import os
import time

from common import median, report

PICTURES_EACH = 2
SEED = 17


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=30, help="a round, two pictures of each (30)")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--size", type=int, default=128, help="pixels a side (128)")
    options = parser.parse_args()
    # before numpy and numba are imported
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"))
    from facemllm.heads.render import render_identity

    render_identity(SEED, 0, 1, options.size)  # compiles
    rates: dict[str, list[float]] = {"processor": [], "clock": []}
    for first in range(1, 1 + options.rounds * options.people, options.people):
        processor, clock = time.process_time(), time.perf_counter()
        pictures = sum(
            len(render_identity(SEED, first + person, PICTURES_EACH, options.size)) for person in range(options.people)
        )
        rates["processor"].append(pictures / (time.process_time() - processor))
        rates["clock"].append(pictures / (time.perf_counter() - clock))
        print(", ".join(f"{values[-1]:.1f} pictures a second ({kind})" for kind, values in rates.items()))
    figures = {f"per_{kind}_second": round(median(values), 1) for kind, values in rates.items()}
    report("renderer", {}, ("numpy", "numba", "pillow"), size=options.size, rounds=options.rounds, **figures)


if __name__ == "__main__":
    main()
