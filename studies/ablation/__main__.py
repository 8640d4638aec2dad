"""`python -m studies.ablation CONVERSATIONS OUT`: train and measure every variant from every seed, say what is shown.

A variant from a seed is a cell, named by all that its figures follow from: a finished cell is not made again, a changed
setting makes again only the cells that it touches, and cells that begin alike train what they share once.

Budget: settings of the profile. On two cores, `--jobs 2` trains two models at a time, one thread each.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import Field, model_validator

from facemllm.core import digests, machine, progress
from facemllm.core.files import atomic_write
from facemllm.errors import UserError, guarded
from facemllm.scoring.metrics import CLOSED_MEAN
from facemllm.settings import Settings, load
from facemllm.settings.data import Positive, Section
from facemllm.tables import CONVERSATIONS, open_table
from facemllm.tracking.runs import commit
from facemllm.version import ledger
from facemllm.workflow.options import Conversations, Json, Profile, Sets, say
from studies.ablation import report, running
from studies.ablation.running import HOW, Cell

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

PICTURE = Path("images") / "ablation.png"
FILE = Path(__file__).with_name("variants.yaml")


class Variant(Section):
    """A recipe: `set` are overrides as of --set, `stages` those it trains, in order (none: all). `says` is what it is,
    in a few words. `control` names a variant that it is held against beside the baseline."""

    says: Annotated[str, Field(min_length=1)]
    set: list[str]
    stages: list[str] = []
    control: str = ""


class Ablation(Section):
    """The variants, from how many seeds each, and which one the others are held against."""

    seeds: Positive
    baseline: str
    variants: Annotated[dict[str, Variant], Field(min_length=1)]

    @model_validator(mode="after")
    def _knows_its_baseline(self) -> Ablation:
        for name in (self.baseline, *(variant.control for variant in self.variants.values() if variant.control)):
            if name not in self.variants:
                raise ValueError(f"{name!r} is none of the variants {', '.join(self.variants)}")
        return self


def shipped() -> dict[str, Any]:
    """What `variants.yaml` holds."""
    plan: dict[str, Any] = yaml.safe_load(FILE.read_text("utf-8"))
    return plan


def ablation() -> Ablation:
    """The plan of `variants.yaml`. Raises ValueError when it is none."""
    return Ablation.model_validate(shipped())


def ablate(
    profile: str,
    overrides: Sequence[str],
    conversations: Path,
    out: Path,
    *,
    variants: Sequence[str] = (),
    seeds: Sequence[int] = (),
    jobs: int = 1,
    page: Path | None = None,
) -> dict[str, Any]:
    """Make the cells that `out` does not hold yet, then compare all of them; returns what `out/results.json` holds.

    `variants` and `seeds` choose among those of `variants.yaml`, all if empty; the baseline is always one. `page`
    is a Markdown file to write, its plot in `images/` beside it. Killed, it goes on where it was when called again.
    Raises UserError when a variant is unknown or its settings are refused.
    """
    settings = load(profile, overrides)
    table = open_table(conversations, CONVERSATIONS)
    for use in ("train", "evaluate"):
        ledger.require(settings, table.sources, use)
    chosen = ablation()
    if unknown := [name for name in variants if name not in chosen.variants]:
        raise UserError(f"--variants {','.join(unknown)}: choose among {', '.join(chosen.variants)}")
    wanted = {n: v for n, v in chosen.variants.items() if not variants or n in variants or n == chosen.baseline}
    code = digests.of_code("studies.ablation.running")
    found = cells(profile, overrides, wanted, list(seeds) or list(range(chosen.seeds)), table.digest, code)
    _make(found, conversations, out, jobs)
    records = [_read(out, cell) | {"variant": cell.variant} for cell in found]
    controls = {name: variant.control for name, variant in wanted.items() if variant.control in wanted}
    results = {
        "command": shlex.join(_command(profile, overrides, variants, seeds)),
        "baseline": chosen.baseline,
        "says": {name: variant.says for name, variant in wanted.items()},
        "controls": controls,
        "variants": report.together(records, chosen.baseline, controls),
        "images": records[0]["images"],
        "people": records[0]["people"],
        "sources": table.sources,
        "conversations": table.digest,
        "machine": report.machine(),
        "commit": commit(),
        "cells": [cell.digest for cell in found],
    }
    atomic_write(out / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    if page is not None:
        picture = page.parent / PICTURE
        picture.parent.mkdir(parents=True, exist_ok=True)
        report.drawn(results["variants"], chosen.baseline).savefig(picture, dpi=110, metadata={"Software": None})
        atomic_write(page, report.page(results, PICTURE.as_posix()).encode())
    return results


def _make(found: Sequence[Cell], conversations: Path, out: Path, jobs: int) -> None:
    missing = [cell for cell in found if not running.record_path(out, cell).is_file()]
    (out / "cells").mkdir(parents=True, exist_ok=True)
    work = [running.Work(group, conversations.resolve(), out.resolve()) for group in groups(missing)]
    done = len(found) - len(missing)
    with progress.bar("training", len(found)) as bar:
        bar.update(done, f"{done} models made before" if done else "")
        for one, _ in zip(work, machine.ordered(running.run, work, min(jobs, max(1, len(work)))), strict=True):
            done += len(one.cells)
            last = one.cells[-1]
            value = _read(out, last)["figures"]
            mean = value.get(running.WITH_MAP, value[running.WITHOUT_MAP]).get(CLOSED_MEAN)
            bar.update(done, f"{last.variant}, seed {last.seed}" + ("" if mean is None else f": {mean:.3f}"))


def _read(out: Path, cell: Cell) -> dict[str, Any]:
    return dict(json.loads(running.record_path(out, cell).read_text("utf-8")))


def _command(profile: str, overrides: Sequence[str], variants: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """What was asked for, without folders: those differ from machine to machine."""
    words = ["python", "-m", "studies.ablation", "CONVERSATIONS", "OUT", "--profile", profile]
    words += [word for override in overrides for word in ("--set", override)]
    words += ["--variants", ",".join(variants)] if variants else []
    return words + (["--seeds", ",".join(map(str, seeds))] if seeds else [])


def numbers(text: str) -> list[int]:
    """Seeds as they are written: `0-4` or `0,2,5`. Raises UserError for anything else."""
    found: list[int] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise UserError(f"--seeds {text}: expected numbers, as in 0-4 or 0,2,5")
        found += range(int(first), int(last if dash else first) + 1)
    return list(dict.fromkeys(found))


def cells(
    profile: str, overrides: Sequence[str], variants: Mapping[str, Variant], seeds: Sequence[int], table: str, code: str
) -> list[Cell]:
    """The cells in the order in which they are made: seed by seed, so that a half-finished ablation compares. `table`
    and `code` are digests of the conversations and of the code. Raises UserError naming a variant whose settings are
    refused."""
    return [
        _cell(name, variant, _load(name, variant, profile, overrides, seed), table, code)
        for seed in seeds
        for name, variant in variants.items()
    ]


def groups(found: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that share their first stage, together."""
    alike: dict[str, list[Cell]] = {}
    for cell in found:
        alike.setdefault(cell.keys[0], []).append(cell)
    return list(alike.values())


def _load(name: str, variant: Variant, profile: str, overrides: Sequence[str], seed: int) -> Settings:
    try:
        return load(profile, [*overrides, *variant.set, f"seed={seed}"])
    except UserError as error:
        raise UserError(f"variant {name}: {error}") from None


def _cell(name: str, variant: Variant, settings: Settings, table: str, code: str) -> Cell:
    begun = {
        "conversations": table,
        "code": code,
        "model": settings.model.model_dump(),
        "held_out": settings.reformat.held_out,
        "training": settings.train.model_dump(include=set(HOW)),
        "seed": settings.seed,
    }
    key, keys = digests.of_json(begun), []
    listed = list(settings.stages())
    stages = variant.stages or listed
    if stages != [stage for stage in listed if stage in stages]:
        raise UserError(f"variant {name}.stages: {stages} is no selection of {listed}, in that order")
    for stage in stages:
        key = digests.of_json([key, stage, settings.stages()[stage].model_dump()])
        keys.append(key)
    return Cell(name, settings, tuple(stages), tuple(keys))


@app.command()
def main(
    conversations: Conversations,
    out: Annotated[Path, typer.Argument(help="Folder of finished models' figures; what it holds is not made again.")],
    variants: Annotated[str, typer.Option(help="Names in variants.yaml, as in base,logic; all if empty.")] = "",
    seeds: Annotated[str, typer.Option(help="As in 0-4 or 0,2; all of variants.yaml if empty.")] = "",
    jobs: Annotated[int, typer.Option(min=1, help="Models trained at a time, one thread each.")] = 1,
    page: Annotated[Path | None, typer.Option("--report", help="Markdown page to write, its plot beside it.")] = None,
    profile: Profile = "ablation",
    set_: Sets = [],
    as_json: Json = False,
) -> None:
    """Train every variant of the recipe from several seeds and say which differences are shown.

    Killed, it goes on where it was when run again.
    """
    names = [name.strip() for name in variants.split(",") if name.strip()]
    results = ablate(profile, set_, conversations, out, variants=names, seeds=numbers(seeds), jobs=jobs, page=page)
    said = "\n".join(report.words(results["variants"], results["baseline"], results["controls"]))
    say(as_json, results, f"{said}\n{page or out / 'results.json'}")


if __name__ == "__main__":  # models are trained in processes that import this module, too
    guarded(app)
