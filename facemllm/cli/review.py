"""`facemllm review`: the page on which requests are read and decided."""

from __future__ import annotations

from typing import Annotated

import typer

from facemllm.settings import Settings
from facemllm.workflow.options import Result


def review(
    settings: Settings,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Show only, and print the command that signs where the key is.")
    ] = False,
    port: Annotated[int | None, typer.Option(help="Default: services.review_port.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; other than loopback with --read-only alone.")
    ] = "127.0.0.1",
    name: Annotated[
        list[str],
        typer.Option("--name", help="Host name that browsers ask for, where it is another: HOST or HOST:PORT."),
    ] = [],
) -> Result:
    """Open the page of requests and decisions; on the machine where your key lies it signs."""
    from facemllm.review.app import serve

    serve(settings, host, port or settings.services.review_port, read_only, name)
    return {}, "stopped"
