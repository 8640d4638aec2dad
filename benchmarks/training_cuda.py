"""The GPU's part of `training.py`: tokens a second, MFU and padding of published shapes, against HF Trainer and TRL.

    .venv/bin/python benchmarks/training.py --device cuda           a 1B LLaVA; one NVIDIA GPU with 40 GB or more
    .venv/bin/python benchmarks/training.py --device cuda --quick   a 3B Qwen2.5-VL; 80 GB or more, under ten minutes
    .venv/bin/python benchmarks/training.py --dry [--quick]         the same code with a tiny shape on the CPU

`--quick` also has ours with one question a row and compiled, and goes through `training_device.py`: NCCL, checkpoint
and resume, evaluation and serving on the device.

Weights are random and float32, arithmetic is bfloat16 autocast, the tower is frozen; the language model trains by
adapters (`lora`) or whole (`full`). All do as many questions an optimiser step, the peers in `MICRO` passes so that
their rows fit. MFU: operations that PyTorch counts in one step, less the share spent on padding, by time and the
device's dense bfloat16 peak. A peer does more operations a question, an image encoding and prefix each, so its MFU says
how busy it is, not how far it gets: that is samples a second.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import training_device
from common import median, report
from training_contenders import EVERY, Contender, rate, spread
from training_material import prepare, render_table, stage_of
from training_shapes import SHAPES

from facemllm.core import cost

MICRO = 4
MODES = ("lora", "full")
CONTENDERS: dict[str, dict[str, Any]] = {
    "ours": {"kind": "ours"},
    "hf": {"kind": "hf", "grouped": True, "micro": MICRO},
    "trl": {"kind": "trl", "grouped": True, "micro": MICRO},
    "hf dialogue": {"kind": "hf", "turns": "many"},
}
QUICK: dict[str, dict[str, Any]] = {
    **{name: CONTENDERS[name] for name in ("ours", "hf", "trl")},
    "ours, one a row": {"kind": "ours", "single": True, "job": {"micro_images": 24}},
    "ours, compiled": {"kind": "ours", "job": {"compile": True}},
}


def trains(mode: str) -> dict[str, str]:
    """The modules of a stage whose language model trains by `lora` or in `full`."""
    rest = {"segmentation": "frozen", "knowledge": "frozen"}
    embeddings = "full" if mode == "full" else "frozen"
    return {"tower": "frozen", "projector": "full", "embeddings": embeddings, "language": mode, **rest}


def measure(
    folder: Path,
    table: Path,
    shape: str,
    mode: str,
    rounds: int,
    steps: int,
    device: str,
    contenders: Mapping[str, Mapping[str, Any]] = CONTENDERS,
) -> dict[str, Any]:
    """All contenders on one mode: samples and tokens a second, MFU, padding and memory."""
    fewer = {"batch_images": 2} if device == "cpu" else {}
    stage = stage_of("frozen tower", steps, trains=trains(mode), learning_rate=1e-5, **fewer)
    prepare(folder, table, stage, steps + 50, SHAPES[shape])
    samples = stage["batch_images"] * stage["turns_per_image"]
    peak = cost.peak_flops(device, "bf16")
    found: dict[str, Any] = {}
    for name, options in contenders.items():
        if options.get("job", {}).get("compile") and (mode == "full" or device == "cpu"):
            continue  # the same language model as with adapters; for a CPU it compiles for minutes
        with Contender(folder, **options) as contender:
            runs = [contender.run(steps=steps, every=EVERY, precision="bf16", device=device) for _ in range(rounds)]
        rates = [rate(run, samples) for run in runs]
        useful = runs[0]["flops_per_step"] * (1 - runs[0]["padding"])
        found[name] = {
            "samples_a_second": spread(rates),
            "tokens_a_second": round(median(rates) / samples * runs[0]["tokens_per_step"]),
            "tflops_a_step": round(useful / 1e12, 3),
            "mfu": round(useful * median(rates) / samples / peak, 4) if peak else None,
            "padding": round(runs[0]["padding"], 4),
            "peak_mib": max(run["peak_mib"] for run in runs),
            "device_peak_mib": max(run.get("device_peak_mib", 0) for run in runs) or None,
            "loss": [round(loss, 4) for _, _, loss in runs[0]["marks"]],
        }
    return found


def _device_name(device: str) -> str:
    if device == "cpu":
        return "cpu"
    import torch

    return torch.cuda.get_device_name()


def main(arguments: argparse.Namespace) -> None:
    """`--device cuda` and `--dry` of `training.py`."""
    device = "cpu" if arguments.dry else "cuda"
    shape, rounds, steps = ("dry", 1, 10) if arguments.dry else ("llava-1b", min(arguments.rounds, 3), 20)
    if arguments.quick:
        shape, rounds, steps = "qwen-dry" if arguments.dry else "qwen-vl-3b", 1, 10
    contenders = QUICK if arguments.quick else CONTENDERS
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("error: --device cuda: PyTorch sees no GPU here; --dry runs the same code on the CPU")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = arguments.conversations or render_table(folder, 50 if arguments.dry else 400)
        modes = {mode: measure(folder / mode, table, shape, mode, rounds, steps, device, contenders) for mode in MODES}
        works = training_device.check(folder, table, device) if arguments.quick else {}
    for mode, found in modes.items():
        print(f"\n{mode} ({shape} on {_device_name(device)})")
        print(f"{'':<18}{'samples/s':>10}{'tokens/s':>10}{'MFU':>7}{'padding':>9}{'device MiB':>12}")
        for who, figures in found.items():
            mfu = "" if figures["mfu"] is None else f"{figures['mfu']:.0%}"
            print(
                f"{who:<18}{figures['samples_a_second']['median']:>10,.1f}{figures['tokens_a_second']:>10,}{mfu:>7}"
                f"{figures['padding']:>9.0%}{figures['device_peak_mib'] or '':>12}"
            )
    for what, said in works.items():
        print(f"{what:<28}{said}")
    ratios = {
        f"{mode}: {who}": found["ours"]["samples_a_second"]["median"] / figures["samples_a_second"]["median"]
        for mode, found in modes.items()
        for who, figures in found.items()
        if who != "ours"
    }
    packages = ["torch", "transformers", "trl", "accelerate", "peft"]
    report(
        "training on a GPU",
        ratios,
        packages,
        shape=shape,
        device=_device_name(device),
        rounds=rounds,
        modes=modes,
        works=works,
    )
