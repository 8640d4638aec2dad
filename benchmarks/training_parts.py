"""What each device of ours brings alone, what Ray costs, and what a kill costs: a part of `training.py`.

    packing      a face's questions in one row, against the same questions one a row
    buckets      passes of a few faces of like length, against all faces of a step padded to the longest
    shared rows  several faces in a row, as many as it holds, against a row a face
    cache        a frozen tower's features from disk, against computing them at every step; filling it is measured apart
    ray          `launch.train` against `train_worker`, the same stage without Ray, each a process from start to end
    resume       a launch killed (SIGKILL) after half of its steps and started again, against one left alone

These differ in nothing else: same loop, weights and number of questions a step. Ray and resume run
the whole of a stage, tables and model file included, so that seconds are those a user waits.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
from common import median
from training_contenders import EVERY, Contender, rate, spread
from training_material import prepare, stage_of

MICRO = 4
PASSES = 3  # over the faces that the cache is measured on
STEPS = 100  # of a stage with and without Ray

ALONE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "packing": ("everything", {}, {"single": True}),
    "buckets": ("frozen tower", {"job": {"micro_images": MICRO}}, {"job": {"micro_images": 0}}),
    "shared rows": ("frozen tower", {}, {"job": {"row_tokens": 0}}),
    "cache": ("frozen tower", {"job": {"feature_cache": True}}, {"job": {"feature_cache": False}}),
}
"""What trains, options of ours with the device, options without."""

CAPTIONED = {"caption": 1.5, "attributes": 1.0, "expression": 1.0, "age": 1.0, "gender": 1.0, "head_pose": 1.0}
"""The mixture of the stage `specialize`: many rows hold a caption and are long, the others short."""


def alone(
    folder: Path, table: Path, names: Iterable[str], rounds: int, steps: int, precision: str
) -> dict[str, dict[str, Any]]:
    """Single devices: samples a second with and without, and the ratio. Takes two rounds at least."""
    found = {}
    for name in names:
        trains, with_it, without = ALONE[name]
        stage = stage_of(trains, steps, tasks=CAPTIONED)
        more = {"faces": steps * stage["batch_images"] // PASSES} if name == "cache" else {}
        prepare(folder / name, table, stage, 1)
        samples = stage["batch_images"] * stage["turns_per_image"]
        runs: dict[str, list[dict[str, Any]]] = {"with": [], "without": []}
        with ExitStack() as stack:
            alive = {
                "with": stack.enter_context(Contender(folder / name, kind="ours", **with_it, **more)),
                "without": stack.enter_context(Contender(folder / name, kind="ours", **without, **more)),
            }
            for number in range(rounds):
                for one in alive if number % 2 == 0 else reversed(alive):
                    runs[one].append(alive[one].run(steps=steps, every=EVERY, precision=precision))
        rates = {one: [rate(run, samples) for run in made] for one, made in runs.items()}
        found[name] = {
            "ratio": spread([a / b for a, b in zip(rates["with"], rates["without"], strict=True)]),
            "samples_a_second": {one: spread(values) for one, values in rates.items()},
            "padding": {one: round(made[0]["padding"], 3) for one, made in runs.items()},
            "peak_mib": {one: max(run["peak_mib"] for run in made) for one, made in runs.items()},
        }
        if name == "cache":
            ready = [run["marks"][0][1] for run in runs["with"]]  # the first run fills it
            found[name]["filling_seconds"] = round(max(0.0, ready[0] - median(ready[1:])), 2)
    return found


def launched(folder: Path, table: Path, rounds: int, steps: int, how: str) -> dict[str, Any]:
    """Seconds of a whole stage by `how`: ray, bare, or killed and resumed; each round in processes of its own."""
    found = []
    for number in range(rounds):
        place = folder / f"{how}-{number}"
        place.mkdir(parents=True)
        order = {"how": "bare" if how == "bare" else "ray", "table": str(table), "folder": str(place), "steps": steps}
        started = time.perf_counter()
        if how == "killed":
            _run_and_kill(order, place)
        found.append({**_run(order), "seconds": time.perf_counter() - started})
    return {
        "seconds": spread([one["seconds"] for one in found]),
        "loop_seconds": spread([one["loop_seconds"] for one in found]),
        "resumed_from": found[0]["resumed_from"],
    }


def _run(order: Mapping[str, Any]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, json.dumps(order)], check=True, text=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _run_and_kill(order: Mapping[str, Any], place: Path) -> None:
    """Start a stage and kill the launcher with all it has started, once more than half of the steps are made."""
    process = subprocess.Popen(
        [sys.executable, __file__, json.dumps(order)], stdout=subprocess.DEVNULL, start_new_session=True
    )
    while not (place / "half").exists() and process.poll() is None:
        time.sleep(0.02)
    for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        one.send_signal(signal.SIGKILL)
    process.wait()


class AtHalf:
    """Leaves a note once half of the steps are made."""

    def __init__(self, note: Path, step: int) -> None:
        self.note, self.step = note, step

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        """As `on_log` of `launch.train`."""
        if step > self.step:
            self.note.touch()


def train(order: Mapping[str, Any]) -> dict[str, Any]:
    """Train the profile's first stage for so many steps, by Ray or without; runs in a process of its own."""
    from facemllm.settings import load
    from facemllm.train.launch import train as by_ray
    from facemllm.train.stage import prepare_run
    from facemllm.train.worker import train_worker

    folder, steps = Path(order["folder"]), order["steps"]
    changes = [f"train.stages.align.steps={steps}", f"train.checkpoint_every={max(1, steps // 10)}"]
    settings = load("laptop", changes)
    paths = (Path(order["table"]), None, folder / "model", folder / "work", folder.parent / "cache")
    on_log = AtHalf(folder / "half", steps // 2)
    if order["how"] == "ray":
        result = by_ray("align", settings, *paths, on_log=on_log)
    else:
        done = train_worker(prepare_run("align", settings, *paths), on_log)
        assert done is not None
        result = done
    return {"loop_seconds": result.cost["seconds"], "resumed_from": result.resumed_from}


def measure(folder: Path, table: Path, quick: bool, rounds: int, precision: str) -> dict[str, Any]:
    """All parts; the quick ones are packing and the cache alone."""
    if quick:
        return alone(folder, table, ("packing", "cache"), 2, 10, precision)
    parts = alone(folder, table, ALONE, min(3, rounds), 20, precision)
    (folder / "warm").mkdir(parents=True)
    _run({"how": "bare", "table": str(table), "folder": str(folder / "warm"), "steps": 1})  # decodes the pictures
    repeats = {"bare": 2, "ray": 2, "killed": 1}
    found = {how: launched(folder, table, number, STEPS, how) for how, number in repeats.items()}
    seconds = {how: one["seconds"]["median"] for how, one in found.items()}
    parts["ray"] = {
        "seconds": round(seconds["ray"] - seconds["bare"], 2),
        "share": round(seconds["ray"] / seconds["bare"] - 1, 3),
        "loop_share": round(median_of(found, "ray") / median_of(found, "bare") - 1, 3),
        "steps": STEPS,
        **{how: found[how] for how in ("bare", "ray")},
    }
    parts["resume"] = {"seconds_lost": round(seconds["killed"] - seconds["ray"], 2), **found["killed"]}
    return parts


def median_of(found: Mapping[str, Any], how: str) -> float:
    """Median seconds of the loop alone."""
    return float(found[how]["loop_seconds"]["median"])


def show(parts: Mapping[str, Any]) -> None:
    """Print them."""
    print(f"\n{'alone':<14}{'with/s':>10}{'without/s':>11}  ratio")
    for name, part in parts.items():
        if name not in ALONE:
            continue
        rates, ratio = part["samples_a_second"], part["ratio"]
        line = f"{name:<14}{rates['with']['median']:>10,.0f}{rates['without']['median']:>11,.0f}"
        line += f"  {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
        line += f", padding {part['padding']['with']:.0%} against {part['padding']['without']:.0%}"
        print(line + (f", filled in {part['filling_seconds']} s" if "filling_seconds" in part else ""))
    if "ray" not in parts:
        return
    ray = parts["ray"]
    bare = ray["bare"]["seconds"]["median"]
    print(
        f"ray: {ray['seconds']:+.1f} s on {bare:.1f} s ({ray['share']:+.0%}) for a stage of {ray['steps']} steps",
        end="",
    )
    print(f"; the loop alone {ray['loop_share']:+.1%}")
    lost = parts["resume"]
    print(f"resume: {lost['seconds_lost']:+.1f} s lost by a kill at half, going on from step {lost['resumed_from']}")


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(train(json.loads(sys.argv[1]))), file=answers)
