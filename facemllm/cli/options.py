"""What the commands share: their options and arguments, and how a result is said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

Profile = Annotated[str, typer.Option(help="Settings overlay in profiles/.")]
Sets = Annotated[list[str], typer.Option("--set", help="Override one key: --set train.workers=2")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Out = Annotated[Path, typer.Argument(help="Folder to write; must not exist.")]
Faces = Annotated[Path, typer.Argument(help="A faces table.")]
Conversations = Annotated[Path, typer.Argument(help="A conversations table.")]
Version = Annotated[str, typer.Argument(help="Version number of the registered model, or an alias.")]
By = Annotated[str | None, typer.Option("--by", help="Your name; default: git's user.name.")]
Reason = Annotated[str, typer.Option(help="Why, in a sentence.")]


def say(as_json: bool, facts: Mapping[str, Any], text: str) -> None:
    """Print a result: one JSON object, or words."""
    print(json.dumps(facts) if as_json else text)
