"""Renders a chat template in a process of its own, of bounded time and memory: a template is a program that somebody
else wrote. Started by `model.template` as a file, so it imports nothing of this package and no transformers.

Standard input: a JSON object of the `template`, the `calls` (what it is rendered with, one after another), and the
bounds `seconds`, `bytes` and `characters`. Standard output: a list of texts, or `{"error": reason}`. The environment is
the one that transformers makes, but for what would render differently from one time to the next (clock, chance).
"""

import json
import resource
import sys
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says; it is rendered as it stands."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _by_chance(*_: Any) -> None:
    raise jinja2.TemplateError("it writes what comes by chance (random, lipsum)")


def _json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _json
    made.globals["raise_exception"] = _raise
    made.globals["lipsum"] = made.filters["random"] = _by_chance
    return made


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def _rendered(asked: Any) -> list[str]:
    template = _environment().from_string(asked["template"])
    texts: list[str] = []
    for call in asked["calls"]:
        pieces, left = [], asked["characters"]
        for piece in template.generate(**call):
            pieces.append(piece)
            left -= len(piece)
            if left < 0:
                raise ValueError(f"it writes more than {asked['characters']} characters")
        texts.append("".join(pieces))
    return texts


def main() -> None:
    """Answer what standard input asks."""
    asked = json.load(sys.stdin)
    _limit(resource.RLIMIT_CPU, asked["seconds"])
    _limit(resource.RLIMIT_AS, asked["bytes"])
    try:
        answer: Any = _rendered(asked)
    except MemoryError:
        answer = {"error": f"it takes more than {asked['bytes'] >> 20} MiB of memory"}
    except Exception as error:
        answer = {"error": str(error) or type(error).__name__}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
