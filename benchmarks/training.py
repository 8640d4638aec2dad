"""Training: samples a second against HF Trainer and TRL, what each of our devices brings, what Ray and a kill cost.

    .venv/bin/python benchmarks/training.py --quick              under two minutes: one stage, two parts, no Ray
    .venv/bin/python benchmarks/training.py --plot curves.png    under ten minutes on two quiet cores
    .venv/bin/python benchmarks/training.py --device cuda        a 1B LLaVA shape, random weights: tokens/s and MFU
    .venv/bin/python benchmarks/training.py --device cuda --quick   a 3B Qwen2.5-VL shape, and what else a GPU has to do
    .venv/bin/python benchmarks/training.py --dry                the same code on the CPU with a tiny shape

The tiny preset answers all questions of the laptop profile, once on a frozen tower, once with everything trainable. A
sample is a question with its answer. All train the same weights on the same questions, as many a step, with the same
optimiser and rates, bf16 where the processor is fast at it; each in a process of its own, in turns.

    ours            `run_stage`: a face's questions packed into one row, none seeing another, pictures decoded once
    hf, trl         the same questions one a row, as one must where they may not see one another: the same loss, to
                    float tolerance (`same_loss`: largest relative difference in fp32; the curves show it in bf16).
                    Pictures are decoded whenever they are shown, as these trainers do. `sequential` draws as ours does;
                    `grouped` puts like lengths together, which they offer, and is what the ratio is taken to
    hf prepared     the same as hf, but pictures are decoded and resized once, before the clock starts: the ratio to it
                    holds no picture work
    ... dialogue    friendlier: a face's questions as one ordinary dialogue, whose later turns read the earlier. It
                    shares the picture as ours does, but learns another conditional: its loss is not comparable

Ratios are samples a second of ours / of the peer: above 1 ours is faster; median and range over the rounds. Memory is
the peak of the whole process. `decoding` is what ours spends once a table. The parts (packing, buckets, feature cache,
Ray, resume) are in `training_parts.py`, the GPU in `training_cuda.py`; accuracy beside a specialist is in `repeats.py`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import median, report
from training_contenders import EVERY, Contender, rate, spread
from training_material import prepare, render_table, stage_of

DRAWN = 200  # steps whose questions the peers are given, enough to group them by length
CONTENDERS: dict[str, dict[str, Any]] = {
    "ours": {"kind": "ours"},
    "hf": {"kind": "hf", "grouped": True},
    "trl": {"kind": "trl", "grouped": True},
    "hf prepared": {"kind": "hf", "grouped": True, "prepared": True},
    "hf dialogue": {"kind": "hf", "turns": "many"},
    "trl dialogue": {"kind": "trl", "turns": "many"},
}
PEERS = tuple(name for name in CONTENDERS if name != "ours")


def side_by_side(folder: Path, table: Path, trains: str, rounds: int, steps: int, precision: str) -> dict[str, Any]:
    """All contenders in turns on one stage: rates, ratios, memory, loss curves and how equal the losses are."""
    stage = stage_of(trains, steps)
    prepare(folder, table, stage, max(steps, DRAWN))
    samples = stage["batch_images"] * stage["turns_per_image"]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    with ExitStack() as stack:
        alive = {name: stack.enter_context(Contender(folder, **options)) for name, options in CONTENDERS.items()}
        for number in range(rounds):
            for name in CONTENDERS if number % 2 == 0 else reversed(CONTENDERS):
                runs[name].append(alive[name].run(steps=steps, every=EVERY, precision=precision))
    first, curves = {}, {"ours": runs["ours"][0]["marks"]}
    for name in ("ours", "hf", "trl"):
        with Contender(folder, **{**CONTENDERS[name], **({} if name == "ours" else {"grouped": False})}) as contender:
            first[name] = contender.run(steps=1, every=1, precision="fp32")["marks"][0][2]
            if name != "ours":
                curves[f"{name}, sequential"] = contender.run(steps=steps, every=EVERY, precision=precision)["marks"]
    rates = {name: [rate(one, samples) for one in found] for name, found in runs.items()}
    decoding, faces = runs["ours"][0]["decoding"], _faces(table)
    epoch = faces * stage["turns_per_image"]
    return {
        "samples_a_second": {name: spread(values) for name, values in rates.items()},
        "ratios": {name: spread([a / b for a, b in zip(rates["ours"], rates[name], strict=True)]) for name in PEERS},
        "first_epoch": {
            name: round((epoch / median(rates[name])) / (epoch / median(rates["ours"]) + decoding), 3) for name in PEERS
        },
        "same_loss": max(abs(first[name] / first["ours"] - 1) for name in ("hf", "trl")),
        "peak_mib": {name: max(one["peak_mib"] for one in found) for name, found in runs.items()},
        "padding": {name: round(runs[name][0]["padding"], 3) for name in PEERS},
        "decoding_seconds": round(decoding, 2),
        "curves": {
            name: [[step * samples, round(loss, 4)] for step, _, loss in marks] for name, marks in curves.items()
        },
    }


def _faces(table: Path) -> int:
    from facemllm.tables import CONVERSATIONS, open_table

    return open_table(table, CONVERSATIONS).rows


def show(trains: str, found: Mapping[str, Any]) -> None:
    """Print one stage's figures and the curves side by side."""
    print(f"\n{trains}")
    print(f"{'':<14}{'samples/s':>10}  {'ours is faster by':<26}{'first epoch':>12}{'peak MiB':>10}{'padding':>9}")
    for name, figures in found["samples_a_second"].items():
        line = f"{name:<14}{figures['median']:>10,.0f}"
        if name in PEERS:
            ratio = found["ratios"][name]
            text = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
            line += f"  {text:<26}{found['first_epoch'][name]:>12.2f}"
        else:
            line += f"  {'':<38}"
        line += f"{found['peak_mib'][name]:>10,}"
        print(line + (f"{found['padding'][name]:>9.0%}" if name in PEERS else ""))
    print(f"loss of the first step in fp32: equal to {found['same_loss']:.1e}; loss after samples:")
    names = list(found["curves"])
    print(f"{'samples':>10}" + "".join(f"{name:>18}" for name in names))
    for points in zip(*found["curves"].values(), strict=True):
        print(f"{points[0][0]:>10,}" + "".join(f"{loss:>18.4f}" for _, loss in points))


def plot(found: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Loss against samples of all stages, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(found), 4), layout="constrained")
    for axis, (trains, stage) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for style, (name, points) in zip(("-", "--", ":"), stage["curves"].items(), strict=True):
            axis.plot(*zip(*points, strict=True), style, label=name)
        axis.set(title=trains, xlabel="samples", ylabel="loss of an answer token")
        axis.legend()
    figure.savefig(path, dpi=120)


def measure(arguments: argparse.Namespace) -> None:
    """Parts 1 and 2 on the CPU."""
    import training_parts

    from facemllm.train.stage import decide_precision

    precision = decide_precision("auto", "cpu")
    rounds = 2 if arguments.quick else max(2, arguments.rounds)
    steps = {"frozen tower": 15} if arguments.quick else {"frozen tower": 30, "everything": 15}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = arguments.conversations or render_table(folder, 100 if arguments.quick else 400)
        stages = {}
        for trains, count in steps.items():
            stages[trains] = side_by_side(folder / trains, table, trains, rounds, count, precision)
            show(trains, stages[trains])
        if arguments.plot:
            plot(stages, arguments.plot)
        parts = training_parts.measure(folder / "parts", table, arguments.quick, rounds, precision)
        training_parts.show(parts)
    ratios = {
        f"{trains}: {name}": found["ratios"][name]["median"] for trains, found in stages.items() for name in PEERS
    }
    ratios |= {name: part["ratio"]["median"] for name, part in parts.items() if "ratio" in part}
    packages = ["torch", "transformers", "trl", "accelerate", "ray"]
    report("training", ratios, packages, precision=precision, rounds=rounds, steps=steps, stages=stages, parts=parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--conversations", type=Path, help="a table of yours; otherwise faces are rendered")
    parser.add_argument("--plot", type=Path, help="write the loss curves to this PNG")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dry", action="store_true", help="the GPU's part with a tiny shape on the CPU")
    arguments = parser.parse_args()
    if arguments.dry or arguments.device == "cuda":
        import training_cuda

        training_cuda.main(arguments)
    else:
        measure(arguments)


if __name__ == "__main__":
    main()
