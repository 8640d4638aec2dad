"""What the commands share: the options of all, the arguments of some, and how a result is printed."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from facemllm.settings import load

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Face-MLLM Workflow, step by step."
)

Profile = Annotated[str, typer.Option(help="Settings overlay in profiles/.")]
Sets = Annotated[
    list[str],
    typer.Option(
        "--set", help="Override one key: --set train.workers=2; @cluster: as the pods of a run (cluster.overrides)."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Out = Annotated[Path, typer.Argument(help="Folder to write; must not exist.")]
Faces = Annotated[Path, typer.Argument(help="A faces table.")]
Conversations = Annotated[Path, typer.Argument(help="A conversations table.")]
Version = Annotated[str, typer.Argument(help="Version number of the registered model, or an alias.")]
By = Annotated[str | None, typer.Option("--by", help="Your name; default: git's user.name.")]
Reason = Annotated[str, typer.Option(help="Why, in a sentence.")]
PassphraseFd = Annotated[
    int | None, typer.Option("--passphrase-fd", help="Read the key's passphrase from this file descriptor: 3 3<file")
]

Result = tuple[Mapping[str, Any], str | Callable[[], object]]
"""What a command gives: its facts, and the same in words (or what prints them)."""
_SHARED = {"profile": (Profile, "laptop"), "set_": (Sets, []), "as_json": (Json, False)}


def command(app: typer.Typer, name: str, *, plain: bool = False) -> Callable[[Callable[..., Result]], object]:
    """Make a function of (settings, ...) a command of `app` that takes --profile, --set and --json, too.

    It is given the settings that these name; of its result the facts are printed with --json, else the words. A `plain`
    command has no --json.
    """

    def add(work: Callable[..., Result]) -> None:
        def run(profile: str, set_: list[str], as_json: bool = False, **given: Any) -> None:
            say(as_json, *work(load(profile, set_), **given))

        own = list(inspect.signature(work, eval_str=True).parameters.values())[1:]
        shared = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
            for name, (annotation, default) in _SHARED.items()
            if not (plain and name == "as_json")
        ]
        run.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *shared)}
        app.command(name, help=inspect.getdoc(work))(run)

    return add


def say(as_json: bool, facts: Mapping[str, Any], words: str | Callable[[], object]) -> None:
    """Print a result: one JSON object, or words."""
    if as_json:
        print(json.dumps(facts))
    elif callable(words):
        words()
    else:
        print(words)
