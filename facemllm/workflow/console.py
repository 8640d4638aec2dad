"""What a pipeline run shows in a terminal: the live table of steps, then the results and what to do next."""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from facemllm.core.store import FACE
from facemllm.settings import Settings
from facemllm.workflow import runs


def follow(console: Console, view: runs.RunView, child: subprocess.Popen[bytes], started: float) -> None:
    """Show the steps until the child process ends: a live table in a terminal, a line a change elsewhere."""
    if console.is_terminal:
        with Live(console=console, refresh_per_second=4, get_renderable=lambda: runs.steps_table(view, started)):
            while child.poll() is None:
                view.refresh()
                time.sleep(0.2)
            view.refresh()
        return
    while True:
        ended = child.poll() is not None
        for name, step in view.refresh().items():
            told = step.message or step.figure
            console.print(
                f"{name:<15}{step.state:<9}{runs.clock(step.seconds):<14}{told}", markup=False, soft_wrap=True
            )
        if ended:
            return
        time.sleep(0.2)


def results(console: Console, settings: Settings, summary: Mapping[str, Any], folder: Path) -> None:
    """Print the results table, where everything is, and what a person can do next."""
    from facemllm.report.terminal import results_table
    from facemllm.serve.deploy import curl_example
    from facemllm.tracking.runs import experiment_url

    if summary["tasks"]:
        console.print()
        console.print(results_table(summary))
    steps = summary["steps"]
    cached = sum(step["cached"] for step in steps)
    console.print(f"\n{runs.clock(summary['seconds'])}, {cached} of {len(steps)} steps cached")
    lines = [("report", str(folder / "report.html")), ("MLflow", experiment_url(settings))]
    if summary["gate"]:
        reasons = "; ".join(summary["gate"]["reasons"])
        lines.append(("gate", "passed" if summary["gate"]["passed"] else f"refused: {reasons}"))
    if summary["model"]["version"]:
        model = summary["model"]
        lines.append(("model", f"{model['name']} version {model['version']}, digest {model['digest'][:12]}"))
        lines.append(("approval", str(summary["approval"])))
    for label, text in lines:
        console.print(f"[bold]{label:<10}[/]", end="")
        console.print(text, markup=False, soft_wrap=True)
    if summary["endpoint"]:
        console.print("[bold]ask it    [/]")
        console.print(
            curl_example(summary["endpoint"], picture=shlex.quote(str(folder / FACE))), markup=False, soft_wrap=True
        )
    if summary["approval"] == "pending":
        version = summary["model"]["version"]
        command = ".venv/bin/facemllm promote"
        profile = "" if settings.profile == "laptop" else f" --profile {settings.profile}"
        console.print("[bold]next[/]      a person looks at the report and decides, then the pipeline goes on:")
        console.print(
            f'  {command} approve {version}{profile} --by "Your Name" --reason "..."', markup=False, soft_wrap=True
        )
        console.print(
            f'  {command} reject {version}{profile} --by "Your Name" --reason "..."', markup=False, soft_wrap=True
        )
        console.print(f"  .venv/bin/python pipeline.py run{profile and f' {profile.strip()}'}", markup=False)
