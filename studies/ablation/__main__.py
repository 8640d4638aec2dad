"""`python -m studies.ablation CONVERSATIONS OUT`: train the variants of a recipe, say which differences are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from facemllm.cli.options import Conversations, Json, Profile, Sets, say
from facemllm.errors import guarded
from studies.ablation.ablate import ablate, numbers
from studies.ablation.report import words

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    conversations: Conversations,
    out: Annotated[Path, typer.Argument(help="Folder of finished models' figures; what it holds is not made again.")],
    variants: Annotated[str, typer.Option(help="Names in variants.yaml, as in base,logic; all if empty.")] = "",
    seeds: Annotated[str, typer.Option(help="As in 0-4 or 0,2; all of variants.yaml if empty.")] = "",
    jobs: Annotated[int, typer.Option(min=1, help="Models trained at a time, one thread each.")] = 1,
    report: Annotated[Path | None, typer.Option(help="Markdown page to write as well, its plot beside it.")] = None,
    profile: Profile = "ablation",
    set_: Sets = [],
    as_json: Json = False,
) -> None:
    """Train every variant of the recipe from several seeds and say which differences are shown.

    Killed, it goes on where it was when run again.
    """
    names = [name.strip() for name in variants.split(",") if name.strip()]
    results = ablate(profile, set_, conversations, out, variants=names, seeds=numbers(seeds), jobs=jobs, page=report)
    said = "\n".join(words(results["variants"], results["baseline"], results["controls"]))
    say(as_json, results, f"{said}\n{report or out / 'results.json'}")


if __name__ == "__main__":  # models are trained in processes that import this module, too
    guarded(app)
