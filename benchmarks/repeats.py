"""A recipe from several seeds, beside other recipes or a specialist: what each seed gives, what difference is shown.

    python benchmarks/repeats.py CONVERSATIONS OUT --name default --seeds 0-2 --split test --against specialist
    python benchmarks/repeats.py CONVERSATIONS OUT --name short --set train.stages.align.steps=900 --seeds 0-2
    python benchmarks/repeats.py CONVERSATIONS OUT --name once --stages specialize --seeds 0-2 \
        --set train.stages.specialize.trains.tower=full
    python benchmarks/repeats.py CONVERSATIONS OUT --baseline default --looks 4 --report FILE.md

Every seed trains all stages, or those of `--stages`, without Ray in a process of its own, and is evaluated on the
split; `OUT/NAME/seed-N.json` keeps its figures and costs, and is not made again. Killed, the same command goes on at
the stage and the step where it was; its seconds are then marked as not comparable. The specialist (`specialist.py`) has
the same seconds in all as the recipe of the same seed took, both from the start of their process: imports, decoding,
loading and training. Means, differences by seed and t intervals are those of the ablation (`studies.ablation.report`);
p values are corrected (Holm) over all figures and recipes of the table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from repeats_report import figures_of, markdown, terminal

from facemllm.core import digests
from facemllm.core.files import atomic_write
from facemllm.errors import UserError, guarded
from facemllm.settings import Settings, load
from facemllm.tables import CONVERSATIONS, open_table
from facemllm.tracking.runs import commit
from facemllm.version import ledger
from facemllm.workflow.runs import plain_name
from studies.ablation.__main__ import numbers
from studies.ablation.report import machine
from studies.ablation.running import WITHOUT_MAP

SPECIALIST = "specialist"
CODE = ("facemllm.train.torchrun", "facemllm.evaluate.run")
_COSTS = {"samples": "faces", "tokens": "tokens", "flops": "operations", "peak_memory_bytes": "peak_memory_bytes"}


@dataclass(frozen=True)
class Work:
    """One seed of one recipe: `folder` keeps what is half done; `key` names all that its figures follow from."""

    name: str
    profile: str
    overrides: tuple[str, ...]
    conversations: Path
    folder: Path
    seed: int
    split: str
    stages: tuple[str, ...]
    key: str

    @property
    def record(self) -> Path:
        """Where its figures and costs are kept."""
        return self.folder.with_name(f"seed-{self.seed}.json")

    def settings(self) -> Settings:
        """The settings of this seed, with its `stages` alone if it names any. Raises UserError for an unknown one."""
        found = load(self.profile, [*self.overrides, f"seed={self.seed}", f"evaluate.split={self.split}"])
        if unknown := [name for name in self.stages if name not in found.stages()]:
            raise UserError(f"--stages {','.join(unknown)}: choose among {', '.join(found.stages())}")
        chosen = {name: stage for name, stage in found.stages().items() if not self.stages or name in self.stages}
        return found.model_copy(update={"train": found.train.model_copy(update={"stages": chosen})})


def works(
    name: str,
    profile: str,
    overrides: Sequence[str],
    conversations: Path,
    out: Path,
    seeds: Sequence[int],
    split: str,
    stages: Sequence[str] = (),
) -> list[Work]:
    """The seeds of a recipe, in order. Raises UserError when its settings are refused, or when `out` holds a seed of
    other settings, data or code under this name."""
    table = open_table(conversations, CONVERSATIONS)
    code = [digests.of_code(module) for module in CODE]
    found = []
    for seed in seeds:
        folder = out / plain_name(name) / f"seed-{seed}"
        work = Work(name, profile, tuple(overrides), conversations.resolve(), folder, seed, split, tuple(stages), "")
        settings = work.settings()
        for use in ("train", "evaluate"):
            ledger.require(settings, table.sources, use)
        parts = settings.model_dump(include={"train", "model", "evaluate", "seed"}, mode="json")
        asked = settings.reformat.model_dump(include={"held_out", "forms"}, mode="json")
        work = replace(work, key=digests.of_json({"data": table.digest, "code": code, "reformat": asked, **parts}))
        if work.record.is_file() and _read(work.record)["key"] != work.key:
            raise UserError(
                f"{work.record} was made with other settings, data or code; give another --name, or remove {folder} "
                "and it to make it anew"
            )
        kept = folder / "key.json"
        if kept.is_file() and _read(kept)["key"] != work.key:
            raise UserError(f"{folder} was begun with other settings, data or code; give another --name, or remove it")
        found.append(work)
    return found


def train_and_evaluate(work: Work, begun: float) -> None:
    """Train all stages, evaluate the last one's model, and write the record. `begun` is when the process was started
    (seconds since the epoch); what came before the first stage counts as its start."""
    from facemllm.evaluate.run import evaluate
    from facemllm.train import torchrun

    settings = work.settings()
    began, resumed = time.time() - begun, False
    work.folder.mkdir(parents=True, exist_ok=True)
    atomic_write(work.folder / "key.json", json.dumps({"key": work.key}).encode())
    stages: dict[str, Any] = {}
    base: Path | None = None
    for name in settings.stages():
        out = work.folder / name

        def train(name: str = name, base: Path | None = base, out: Path = out) -> dict[str, Any]:
            started = time.perf_counter()
            result = torchrun.train(name, settings, work.conversations, base, out, work.folder / "work")
            assert result is not None  # one rank
            wall, cost = time.perf_counter() - started, result.cost
            counted = {said: cost[key] for key, said in _COSTS.items() if cost.get(key) is not None}
            seconds = {"seconds": cost["seconds"], "start": wall - cost["seconds"]}
            return {"resumed": bool(result.resumed_from), "steps": result.steps, **seconds, **counted}

        facts, kept = _once(work.folder / f"{name}.json", out, train)
        resumed |= kept or facts.pop("resumed")
        stages[name], base = facts, out
    assert base is not None
    evaluation = work.folder / "evaluation"

    def measure() -> dict[str, Any]:
        started = time.perf_counter()
        evaluate(settings, base, digests.of_tree(base), work.conversations, evaluation)
        return {"seconds": time.perf_counter() - started}

    spent, _ = _once(work.folder / "evaluation.json", evaluation, measure)
    metrics = _read(evaluation / "metrics.json")
    first = next(iter(stages.values()))
    first["start"] += began
    _write(work, stages, figures_of(metrics), metrics, resumed, evaluation_seconds=spent["seconds"])
    shutil.rmtree(work.folder / "work", ignore_errors=True)


def train_specialist(work: Work, rival: Path, begun: float) -> None:
    """Train a specialist for as many seconds in all as the record `rival` took, ask it the split, write its record."""
    import torch
    from specialist import answer, train

    from facemllm.core.machine import cores
    from facemllm.evaluate.baselines import baselines, training_sheet
    from facemllm.model.families import family_of
    from facemllm.model.pretrained import load_model
    from facemllm.scoring import combinations, consistency, summary
    from facemllm.scoring.sheet import read_sheet
    from facemllm.train.pixels import pixel_cache
    from facemllm.train.stage import decide_precision

    settings, ours = work.settings(), _read(rival)
    torch.set_num_threads(settings.train.threads or cores())
    table = open_table(work.conversations, CONVERSATIONS)
    learner, processor = load_model(rival.with_suffix("") / list(settings.stages())[-1])
    everything = pixel_cache(table, family_of(learner.config, processor), work.folder / "cache")
    places = {name: at for at, name in enumerate(row["image_id"] for row in table.iterate(["image_id"]))}
    learnt, asked = training_sheet(table), read_sheet(table, work.split)
    assert learnt is not None

    def pixels(images: Sequence[str]) -> Any:
        return np.asarray(everything[[places[name] for name in images]])

    shown, bf16 = pixels(learnt.images), decide_precision(settings.train.precision, "cpu") == "bf16"
    start = time.time() - begun
    seconds = max(1.0, ours["seconds"] - start)
    net, images = train(learnt, shown, processor.image_processor, seconds, work.seed, bf16=bf16)
    said = answer(net, asked, pixels(asked.images), processor.image_processor)
    rivals = baselines(settings, table, asked, learnt)
    found = summary.summarise(asked, summary.Answers.of(said), rivals, settings.evaluate.bootstrap, settings.seed)
    held_out = [one["names"] for one in table.manifest["about"].get("held_out_combinations") or ()]
    metrics = {
        **found,
        # what has no head (captions, what is held out) is not asked
        "tasks": {name: body for name, body in found["tasks"].items() if (body["unreadable"] or 0) < 1},
        "consistency": {"relations": consistency.measure(settings, asked, said)["relations"]},
        "combinations": combinations.measure(settings, asked, said, rivals, held_out),
        **{"n_images": len(asked.images), "n_subjects": asked.people_count},
    }
    operations = _operations(net, shown, processor.image_processor) * images
    stages = {"training": {"seconds": seconds, "start": start, "faces": images, "operations": operations}}
    _write(work, stages, figures_of(metrics), metrics, False)
    shutil.rmtree(work.folder, ignore_errors=True)


def _operations(net: Any, pixels: Any, image_processor: Any) -> float:
    """Floating-point operations of training the specialist on one face, counted on a few."""
    import torch

    from facemllm.core import cost
    from facemllm.model.inputs import normalise

    few = normalise(torch.from_numpy(pixels[:2]), image_processor)
    with cost.operations() as counter:
        net(few).sum().backward()
    return float(counter.get_total_flops()) / len(few)


def _once(note: Path, made: Path, make: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], bool]:
    """What `make` tells of what it made, and whether it was made before."""
    if note.is_file() and made.is_dir():
        return _read(note), True
    shutil.rmtree(made, ignore_errors=True)
    facts = make()
    atomic_write(note, json.dumps(facts).encode())
    return dict(facts), False


def _write(
    work: Work, stages: Mapping[str, Any], found: Any, metrics: Mapping[str, Any], resumed: bool, **more: Any
) -> None:
    figures, kinds = found
    numeric = {n: {k: v for k, v in one.items() if k != "resumed"} for n, one in stages.items()}
    chosen = [f"--stages {','.join(work.stages)}"] if work.stages else []
    record = {
        **{"variant": work.name, "seed": work.seed, "key": work.key, "split": work.split, "resumed": resumed},
        **{"profile": work.profile, "overrides": [*work.overrides, *chosen]},
        "stages": numeric,
        "seconds": sum(one["seconds"] + one["start"] for one in numeric.values()),
        "processor_seconds": time.process_time(),
        **more,
        **{"images": metrics["n_images"], "people": metrics["n_subjects"]},
        **{"figures": {WITHOUT_MAP: figures}, "metrics": kinds, "machine": machine(), "commit": commit()},
    }
    atomic_write(work.record, (json.dumps(record, indent=2) + "\n").encode())


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text("utf-8")))


def _alone(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function in a process of its own, given when that was begun. Raises UserError when that is killed, or its
    loss is not finite."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(partial(function, *arguments), time.time()).result()
    except BrokenExecutor:
        raise UserError("the process that trains was killed, maybe for memory; run the same command to go on") from None
    except FloatingPointError as error:
        raise UserError(str(error)) from None


def repeat(found: Sequence[Work], against: str | None, run: Callable[..., None] = _alone) -> None:
    """Make what has no record yet, seed by seed, each recipe's seed followed by its specialist."""
    for work in found:
        if not work.record.is_file():
            print(f"{work.name}, seed {work.seed}", flush=True)
            run(train_and_evaluate, work)
        if against != SPECIALIST:
            continue
        name = f"{SPECIALIST} to {work.name}"
        key = digests.of_json([work.key, digests.of_file(Path(__file__).with_name("specialist.py"))])
        folder = work.folder.parent.with_name(name) / work.folder.name
        rival = replace(work, name=name, folder=folder, key=key)
        if not rival.record.is_file() or _read(rival.record)["key"] != rival.key:
            print(f"{name}, seed {work.seed}", flush=True)
            run(train_specialist, rival, work.record)


def records(out: Path, split: str) -> list[dict[str, Any]]:
    """All records of `out` on this split, by recipe and seed."""
    found = [_read(path) for path in sorted(out.glob("*/seed-*.json"))]
    return sorted((one for one in found if one["split"] == split), key=lambda one: (one["variant"], one["seed"]))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conversations", type=Path, help="folder of a conversations table")
    parser.add_argument("out", type=Path, help="folder of records; what it holds is not made again")
    parser.add_argument("--name", default="default", help="name of the recipe")
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--stages", default="", help="train these alone, as in align,specialize; none: all")
    parser.add_argument("--seeds", default="", help="as in 0-2 or 0,3; none: only report")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument(
        "--against", choices=(SPECIALIST,), help="train a specialist for the same seconds, seed by seed"
    )
    parser.add_argument("--baseline", help="recipe that the others are held against; default: --name")
    parser.add_argument("--looks", type=int, help="how often validation was looked at to choose the recipe")
    parser.add_argument("--report", type=Path, help="Markdown file to write")
    given = parser.parse_args()
    if given.looks is not None and given.looks < 0:
        raise UserError("--looks: a count, 0 or more")
    recipe = (given.name, given.profile, given.overrides, given.conversations, given.out)
    stages = [name.strip() for name in given.stages.split(",") if name.strip()]
    repeat(works(*recipe, numbers(given.seeds), given.split, stages), given.against)
    found = records(given.out, given.split)
    baseline = given.baseline or given.name
    if baseline not in {one["variant"] for one in found}:
        known = ", ".join(dict.fromkeys(one["variant"] for one in found)) or "none"
        raise UserError(f"{given.out} holds no seed of {baseline} on {given.split}; there are: {known}")
    print(terminal(found, baseline, given.looks))
    if given.report is not None:
        atomic_write(given.report, markdown(found, baseline, given.looks).encode())
        print(given.report)


if __name__ == "__main__":  # seeds are trained in processes that import this module, too
    guarded(main)
