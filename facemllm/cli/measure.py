"""The commands of `facemllm` that ask, mark and compare models."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from facemllm.cli.options import Conversations, Json, Out, Profile, Sets, say
from facemllm.settings import load

Run = Annotated[
    str,
    typer.Argument(
        help="A run's name, a run or evaluation folder, a model version or alias, a digest, or an MLflow run id."
    ),
]


def add_to(app: typer.Typer) -> None:
    """Give the commands of this module to the command line."""
    app.command()(evaluate)
    app.command()(score)
    app.command("compare")(compare_runs)
    app.command("ablate")(ablate_variants)


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="A model directory; a model of transformers (folder or hub id); with --endpoint its name there."
        ),
    ],
    conversations: Conversations,
    out: Out,
    endpoint: Annotated[
        bool, typer.Option("--endpoint", help="Ask MODEL at the OpenAI-compatible endpoint of annotate.endpoint.")
    ] = False,
    base_url: Annotated[str, typer.Option(help="Address of another endpoint, as in https://host/v1.")] = "",
    profile: Profile = "laptop",
    set_: Sets = [],
    as_json: Json = False,
) -> None:
    """Answer every question about held-out identities; write predictions, metrics and a report.

    A model of another's is asked in words and read strictly. What it has answered is kept: run again to go on.
    """
    from facemllm.evaluate.command import evaluate as run_evaluation

    if endpoint or base_url:
        set_ = [*set_, f"annotate.vision_language.model={json.dumps(model)}"]
        set_ += [f"annotate.endpoint.base_url={json.dumps(base_url)}"] if base_url else []
    settings = load(profile, set_)
    metrics = run_evaluation(settings, model, conversations, out, endpoint=bool(endpoint or base_url))
    say(as_json, metrics, f"{out / 'report.html'}: {_headline(metrics)}")


def score(
    conversations: Conversations,
    predictions: Annotated[Path, typer.Argument(help="A predictions table, or an evaluation folder.")],
    out: Annotated[Path, typer.Argument(help="JSON file to write.")],
    profile: Profile = "laptop",
    set_: Sets = [],
    as_json: Json = False,
) -> None:
    """Compute the metrics again from saved predictions; no model is loaded."""
    from facemllm.evaluate.score import score as run_score

    metrics = run_score(load(profile, set_), conversations, predictions, out)
    say(as_json, metrics, f"{out}: {_headline(metrics)}")


def _headline(metrics: Mapping[str, Any]) -> str:
    """The one figure over all closed questions, where there are any."""
    value = (metrics["closed_mean"] or {}).get("value")
    return "no closed question was asked" if value is None else f"mean balanced accuracy {value:.3f}"


def compare_runs(
    first: Run,
    second: Run,
    html: Annotated[Path | None, typer.Option(help="Page to write as well.")] = None,
    conversations: Annotated[
        Path | None, typer.Option(help="The conversations both answered, where the store does not hold them.")
    ] = None,
    profile: Profile = "laptop",
    set_: Sets = [],
    as_json: Json = False,
) -> None:
    """Compare two runs question by question: differences with intervals, by task, item and group of people."""
    from facemllm.evaluate.compare import compare

    found = compare(load(profile, set_), first, second, conversations)
    if html is not None:
        from facemllm.report.comparison import write_page

        write_page(html, found)
    if as_json:
        say(as_json, found, "")
        return
    from rich.console import Console

    from facemllm.report.terminal import shown

    console = Console(width=None if sys.stdout.isatty() else 160)
    for part in shown(found):
        console.print(part)
    if html is not None:
        console.print(str(html), style="dim", markup=False)


def ablate_variants(
    conversations: Conversations,
    out: Annotated[Path, typer.Argument(help="Folder of finished models' figures; what it holds is not made again.")],
    variants: Annotated[str, typer.Option(help="Names of ablation.variants, as in base,logic; all if empty.")] = "",
    seeds: Annotated[str, typer.Option(help="As in 0-4 or 0,2; 0 to ablation.seeds if empty.")] = "",
    jobs: Annotated[int, typer.Option(min=1, help="Models trained at a time, one thread each.")] = 1,
    report: Annotated[Path | None, typer.Option(help="Markdown page to write as well, its plot beside it.")] = None,
    profile: Profile = "ablation",
    set_: Sets = [],
    as_json: Json = False,
) -> None:
    """Train every variant of the recipe from several seeds and say which differences are shown.

    Killed, it goes on where it was when run again.
    """
    from studies.ablation.ablate import ablate, numbers
    from studies.ablation.report import words

    names = [name.strip() for name in variants.split(",") if name.strip()]
    results = ablate(profile, set_, conversations, out, variants=names, seeds=numbers(seeds), jobs=jobs, page=report)
    said = "\n".join(words(results["variants"], results["baseline"], results["controls"]))
    say(as_json, results, f"{said}\n{report or out / 'results.json'}")
