"""Accuracy at a time budget: a model of ours beside a specialist trained on the same faces for the same seconds.

The specialist (`specialist.py`) sees the training split's faces and the answers to its questions; both are asked the
test split's questions in their own form, and marked by the project's metrics. Intervals are 95 % bootstraps over people
(test sampling, not the noise of a seed); differences are paired: the same resampled people for both. `ahead` is who the
interval of the difference favours; `within` says whether ours lies inside the specialist's interval or beyond it on the
better side. The specialist's clock runs from its first batch; ours, as a user waits, holds starts of workers, imports
and sample answers: both starts are printed apart. What has no head (captions, items held out of training) is left out.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import report
from numpy.typing import NDArray


def compare(
    conversations: Path, seconds: float, model: Path, evaluation: Path | None, cache: Path, seed: int
) -> dict[str, Any]:
    """Train a specialist for so many seconds, ask both, and return figures by name and what was trained; `start` are
    the seconds before the specialist's first batch."""
    begun = time.perf_counter()
    from specialist import answer, train

    from facemllm.model.families import family_of
    from facemllm.model.pretrained import load_model
    from facemllm.scoring.sheet import read_parsed, read_sheet
    from facemllm.settings import load
    from facemllm.tables import CONVERSATIONS, PREDICTIONS, open_table
    from facemllm.train.pixels import pixel_cache
    from facemllm.train.stage import decide_precision

    settings = load("laptop", ["evaluate.generated_faces=0", "evaluate.disturbed_faces=0"])
    table = open_table(conversations, CONVERSATIONS)
    learner, processor = load_model(model)
    everything = pixel_cache(table, family_of(learner.config, processor), cache)
    places = {name: at for at, name in enumerate(row["image_id"] for row in table.iterate(["image_id"]))}
    learnt, asked = read_sheet(table, "train"), read_sheet(table, settings.evaluate.split)

    def pixels(images: Sequence[str]) -> NDArray[np.uint8]:
        return np.asarray(everything[[places[name] for name in images]])

    bf16 = decide_precision("auto", "cpu") == "bf16"
    start = time.perf_counter() - begun
    net, seen = train(learnt, pixels(learnt.images), processor.image_processor, seconds, seed, bf16=bf16)
    theirs = answer(net, asked, pixels(asked.images), processor.image_processor)
    if evaluation is None:
        evaluation = cache / "evaluation"
        _evaluate(settings, model, conversations, evaluation)
    found = open_table(evaluation / "predictions", PREDICTIONS)
    ours = read_parsed(found, asked)
    figures = paired(asked, ours, theirs, settings.evaluate.bootstrap, settings.seed)
    size = sum(parameter.numel() for parameter in net.parameters())
    return {"figures": figures, "images_seen": seen, "parameters": size, "seconds": seconds, "start": start}


def _evaluate(settings: Any, model: Path, conversations: Path, out: Path) -> None:
    from facemllm.core import digests
    from facemllm.evaluate.run import evaluate

    evaluate(settings, model, digests.of_tree(model), conversations, out)


def paired(
    sheet: Any, ours: Sequence[str | None], theirs: Sequence[str | None], resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Figures of both by name (task, task.item, closed_mean), their difference and who is ahead."""
    from facemllm.scoring import metrics, stats
    from facemllm.scoring.metrics import CLOSED_MEAN
    from facemllm.scoring.summary import replicate, rows_of

    both = [replicate(sheet, said, resamples, seed) for said in (ours, theirs)]

    def rounded(one: Any) -> list[float]:
        return [round(value, 4) for value in (one.value, one.low, one.high)]

    found: dict[str, dict[str, Any]] = {}
    several = {task for task, _ in sheet.rows if sum(owner == task for owner, _ in sheet.rows) > 1}
    for name in sorted(both[0], key=lambda name: (name != CLOSED_MEAN, name)):
        alone = "." in name and name.partition(".")[0] not in several  # the only item of its task
        if alone or all(theirs[row] is None for row in rows_of(sheet, name)):
            continue
        metric = next(iter(both[0][name]))
        up = metrics.get(metric).higher_is_better
        mine, other = (one[name][metric] for one in both)
        us, them, gap = stats.interval(mine), stats.interval(other), stats.interval(mine - other)
        ahead = "ours" if (gap.low > 0 if up else gap.high < 0) else "specialist"
        if gap.low <= 0 <= gap.high:
            ahead = "even"
        found[name] = {
            "metric": metric,
            "ours": rounded(us),
            "specialist": rounded(them),
            "difference": rounded(gap),
            "ahead": ahead,
            "within": bool(us.value >= them.low if up else us.value <= them.high),
        }
    return found


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    from facemllm.scoring.metrics import label as words_of

    size = found["parameters"] / 1e6
    print(f"specialist: {size:.2f} M parameters, {found['seconds']:.0f} s, {found['images_seen']:,} images")
    ours, theirs = found["starts"]["ours"], found["starts"]["specialist"]
    known = f"{ours:.0f} s of its {found['seconds']:.0f} s were starts ({ours / found['seconds']:.1%})" if ours else ""
    known = known.replace("%", " %") or f"what of its {found['seconds']:.0f} s were starts is not known (--starts)"
    print(f"ours: {known}; the specialist's start of {theirs:.0f} s is in no clock")
    print(f"{'':<40}{'ours':>24}{'specialist':>26}{'difference':>28}  ahead")
    for name, one in found["figures"].items():
        cells = [f"{v:.3f} [{low:.3f}, {high:.3f}]" for v, low, high in (one["ours"], one["specialist"])]
        value, low, high = one["difference"]
        gap = f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
        label = f"{name} ({words_of(one['metric'])})"
        print(f"{label:<40}{cells[0]:>24}{cells[1]:>26}{gap:>28}  {one['ahead']}{'' if one['within'] else ' *'}")
    print("* ours lies outside the specialist's interval, on the worse side")


def main(arguments: Any) -> None:
    """`--quality` of `training.py`."""
    with tempfile.TemporaryDirectory() as name:
        found = compare(
            arguments.conversations,
            arguments.seconds,
            arguments.model,
            arguments.evaluation,
            Path(name),
            arguments.seed,
        )
    found["starts"] = {"ours": arguments.starts, "specialist": round(found.pop("start"), 1)}
    show(found)
    ratios = {name: one["ours"][0] / one["specialist"][0] for name, one in found["figures"].items() if "." not in name}
    report(
        "quality at a time budget, against a specialist conv net",
        ratios,
        ["torch", "transformers"],
        **found,
    )
