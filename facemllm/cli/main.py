"""`facemllm`: every step and every decision as a command.

Exit codes: 0 done; 1 refused or failed, one line on standard error says why; 2 wrong usage. `--json` prints one JSON
object on standard output. Heavy libraries are imported by the command that needs them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from facemllm.cli import data, gc, keys, lineage, promotion, review
from facemllm.core import digests
from facemllm.core.machine import on_plain_path
from facemllm.errors import UserError, guarded
from facemllm.settings import Settings, load
from facemllm.workflow.options import (
    Conversations,
    Json,
    Out,
    Profile,
    Result,
    Sets,
    Version,
    app,
    command,
    say,
)

services_app = typer.Typer(no_args_is_help=True, help="Local servers: MLflow, Ray, staging, production.")
app.add_typer(data.version, name="version")
app.add_typer(promotion.promote, name="promote")
app.add_typer(keys.keys, name="keys")
command(app, "lineage")(lineage.lineage)
app.command("gc")(gc.gc)
command(app, "review", plain=True)(review.review)
app.add_typer(lineage.audit, name="audit")
app.add_typer(services_app, name="services")

Run = Annotated[
    str,
    typer.Argument(
        help="A run's name, a run or evaluation folder, a model version or alias, a digest, or an MLflow run id."
    ),
]


def main() -> None:
    """Entry point of the `facemllm` command."""
    guarded(on_plain_path)
    guarded(app)


@app.command()
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
    from facemllm.evaluate.models import evaluate as run_evaluation

    if endpoint or base_url:
        set_ = [*set_, f"annotate.vision_language.model={json.dumps(model)}"]
        set_ += [f"annotate.endpoint.base_url={json.dumps(base_url)}"] if base_url else []
    settings = load(profile, set_)
    metrics = run_evaluation(settings, model, conversations, out, endpoint=bool(endpoint or base_url))
    say(as_json, metrics, _shown(metrics, f"{out / 'report.html'}: "))


@command(app, "score")
def score(
    settings: Settings,
    conversations: Conversations,
    predictions: Annotated[Path, typer.Argument(help="A predictions table, or an evaluation folder.")],
    out: Annotated[Path, typer.Argument(help="JSON file to write.")],
) -> Result:
    """Compute the metrics again from saved predictions; no model is loaded."""
    from facemllm.evaluate import run

    metrics = run.score(settings, conversations, predictions, out)
    return metrics, _shown(metrics, f"{out}: ")


def _shown(metrics: Mapping[str, Any], where: str) -> str | Callable[[], object]:
    """What to say of an evaluation: its headline, or of a benchmark the whole table."""
    if "benchmark" not in metrics:
        return where + _headline(metrics)
    from facemllm.report import leaderboard

    return lambda: leaderboard.show([leaderboard.lines(metrics)])


@app.command()
def leaderboard(
    models: Annotated[Path, typer.Argument(help="A YAML list of models: name, kind, where, fine_tuned_from.")],
    conversations: Conversations,
    out: Annotated[Path, typer.Argument(help="Folder for answers and tables; what is there is not asked again.")],
    profile: Profile = "laptop",
    set_: Sets = [],
    as_json: Json = False,
) -> None:
    """Ask several models the same questions, before and after fine-tuning, and print them in one table.

    Kinds: ours (a model directory or a registered version), hub (a folder of any image-text model), endpoint (an
    address; `model` names it there). Killed, it goes on where it was. Exits with 1 when a model failed.
    """
    from facemllm.core.files import atomic_write
    from facemllm.evaluate import leaderboard as boards
    from facemllm.evaluate.listed import read_list
    from facemllm.promote.registry import find_version, model_dir
    from facemllm.report import leaderboard as report

    settings = load(profile, set_)
    listed = read_list(models)
    board = boards.leaderboard(
        settings, listed, conversations, out, lambda name: model_dir(settings, find_version(settings, name))
    )
    found = list(report.tables(board))
    atomic_write(out / "leaderboard.md", report.markdown(found).encode())
    say(as_json, board, lambda: report.show(found))
    if any(row["error"] is not None for row in board["models"]):
        raise typer.Exit(1)


def _headline(metrics: Mapping[str, Any]) -> str:
    """The one figure over all closed questions, where there are any; a line a combination held out of training."""
    from facemllm.report.terminal import combinations

    value = (metrics["closed_mean"] or {}).get("value")
    figure = "no closed question was asked" if value is None else f"mean balanced accuracy {value:.3f}"
    return "\n".join([figure, *combinations(metrics.get("combinations") or {})])


@command(app, "compare")
def compare_runs(
    settings: Settings,
    first: Run,
    second: Run,
    html: Annotated[Path | None, typer.Option(help="Page to write as well.")] = None,
    conversations: Annotated[
        Path | None, typer.Option(help="The conversations both answered, where the store does not hold them.")
    ] = None,
) -> Result:
    """Compare two runs question by question: differences with intervals, by task, item and group of people."""
    from facemllm.evaluate.compare import compare
    from facemllm.promote.registry import find_version

    found = compare(settings, first, second, lambda name: find_version(settings, name).evaluation, conversations)
    if html is not None:
        from facemllm.report.terminal import write_page

        write_page(html, found)

    def show() -> None:
        from rich.console import Console

        from facemllm.report.terminal import shown

        console = Console(width=None if sys.stdout.isatty() else 160)
        for part in shown(found):
            console.print(part)
        if html is not None:
            console.print(str(html), style="dim", markup=False)

    return found, show


@command(app, "step")
def step(
    settings: Settings,
    name: Annotated[str, typer.Argument(help="annotate, or a stage in train.stages.")],
    input_: Annotated[
        list[str], typer.Option("--input", help="NAME=DIGEST of a result in the store; default: this profile's.")
    ] = [],
    package: Annotated[str, typer.Option(help="Digest of the package that is to do it: other code refuses.")] = "",
) -> Result:
    """Do one step on results in the store, as a RayJob does; its result goes there, too."""
    from facemllm.workflow.steps import steps

    if package not in ("", own := digests.of_package()):
        raise UserError(
            f"this image holds other code (package {own[:12]}) than that which asks for the work ({package[:12]}); "
            "name one image by its digest in cluster.image"
        )
    if name not in (known := ("annotate", *settings.stages())):
        raise UserError(f"step {name}: the steps that can be done alone are {', '.join(known)}")
    given = dict(one.partition("=")[::2] for one in input_)
    if unknown := given.keys() - steps(settings)[name].inputs.keys():
        raise UserError(f"--input {', '.join(sorted(unknown))}: {name} takes {', '.join(steps(settings)[name].inputs)}")
    digest = _executed(settings, name, **given)
    return {"digest": digest, "path": str(settings.home / "store" / digest)}, digest


def _executed(settings: Settings, name: str, **given: str) -> str:
    """Output of a step under the inputs that are given; the rest are those remembered for these settings."""
    from facemllm.workflow import runner
    from facemllm.workflow.steps import steps

    sources = steps(settings)[name].inputs
    values = {key: given.get(key, "") for key in sources}
    records = runner.recall_all(settings) if not all(values.values()) else {}
    for key, source in sources.items():
        if not values[key] and source not in records:
            raise UserError(f"{name} needs the result of '{source}'; run that first, or give its digest")
        values[key] = values[key] or str(records[source]["output"])
    return runner.execute(name, settings, **values)


@command(app, "serve", plain=True)
def serve(
    settings: Settings,
    model: Annotated[Path, typer.Argument(help="A model directory.")],
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 18090,
) -> Result:
    """Serve a model directory with KServe in the foreground, on loopback."""
    from facemllm.core.servers import model_server
    from facemllm.serve import server
    from facemllm.signing import manifest

    if not model.is_dir():
        raise UserError(f"{model} is not a model directory")
    service = model_server(settings, "staging", model, manifest.of(model).digest, "")
    raise SystemExit(server.main([*service.command[3:], "--port", str(port), "--grpc-port", "0"]))


@command(app, "deploy")
def deploy(settings: Settings, version: Version) -> Result:
    """Put a registered version into staging. Production is `pipeline.py release VERSION`."""
    url = _executed(settings, "deploy", version=version)
    return {"version": version, "endpoint": url}, url


@command(services_app, "up", plain=True)
def services_up(
    settings: Settings,
    names: Annotated[list[str] | None, typer.Argument(help="Of the four servers; default: mlflow.")] = None,
) -> Result:
    """Start local servers, or adopt those that run; production only with the model released last, if still approved."""
    from facemllm.core import services
    from facemllm.serve import release
    from facemllm.serve.local import production

    if "production" in (names or []) and (problem := release.problem(settings)):
        raise UserError(problem)
    started = [
        production.up(settings) if name == "production" else services.up(settings, name) for name in names or ["mlflow"]
    ]
    return {}, "\n".join(one.url for one in started)


@command(services_app, "status")
def services_status(settings: Settings) -> Result:
    """Tell which local servers run, and why one that should does not."""
    from facemllm.core import services
    from facemllm.serve import release

    rows, note = services.status(settings), release.problem(settings)
    lines = [f"{'name':<12}{'state':<12}{'pid':<10}{'since':<21}{'restarts':<10}address"]
    for row in rows:
        since = time.strftime("%F %T", time.localtime(row.since)) if row.since else "-"
        lines.append(f"{row.name:<12}{row.state:<12}{row.pid or '-':<10}{since:<21}{row.restarts:<10}{row.url or '-'}")
        lines += [f"{'':<12}{row.why}"] if row.why else []
    lines += [f"warning: {note}"] if note else []
    return {"services": [asdict(row) for row in rows], "warning": note or None}, "\n".join(lines)


@services_app.command("down")
def services_down(
    names: Annotated[list[str] | None, typer.Argument(help="Default: all.")] = None,
    profile: Annotated[
        str | None, typer.Option(help="Settings overlay in profiles/; default: the servers of every profile.")
    ] = None,
    set_: Sets = [],
) -> None:
    """Stop local servers and say which; none of their processes is left."""
    from facemllm.core import services

    settings = load(profile or "laptop", set_)
    homes = [settings.home] if profile or set_ else services.homes(settings)
    stopped = [f"stopped {name} of {home}" for home in homes for name in services.down(settings, names, home)]
    print("\n".join(stopped) or "no local server runs")


if __name__ == "__main__":
    main()
