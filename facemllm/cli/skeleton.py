"""Start a task or a reader of one's own: `make task NAME=x`, `make reader NAME=x`.

A file is written, with its line in `params.yaml` or its row in the ledger, and a test that fails with what is left to
do: every line that says FILL IN. Nothing that is there already is overwritten.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from facemllm.core.files import atomic_write
from facemllm.errors import UserError
from facemllm.settings import PARAMS, root

_TEMPLATES = Path(__file__).with_name("skeletons")
_LEDGER = Path("facemllm/version/ledger.yaml")


def task(name: str) -> list[Path]:
    """Write the task `name`, ask it by `reformat.tasks`, and write its test. Returns the files that were touched."""
    _plain(name)
    module, test = Path(f"facemllm/tasks/{name}.py"), Path(f"tests/unit/test_task_{name}.py")
    params = root() / PARAMS
    text, count = re.subn(r"(?m)^(  tasks: \[)(.*)(\])", rf"\1\2, {name}\3", params.read_text("utf-8"), count=1)
    if not count:
        raise UserError(f"{params}: no line `tasks: [...]` under reformat; add {name} there by hand")
    _write({module: "task.py.jinja", test: "test_task.py.jinja"}, name)
    atomic_write(params, text.encode())
    return [module, Path(PARAMS), test]


def reader(name: str) -> list[Path]:
    """Write the reader of the source `name`, its ledger row, and its test. Returns the files that were touched."""
    stem, name = name.replace("-", "_"), name.replace("_", "-")  # sources are named with hyphens, modules cannot be
    _plain(stem)
    module, test = Path(f"facemllm/ingest/readers/{stem}.py"), Path(f"tests/unit/readers/test_{stem}.py")
    ledger = root() / _LEDGER
    rows = ledger.read_text("utf-8")
    if re.search(rf"(?m)^{re.escape(name)}:", rows):
        raise UserError(f"{_LEDGER}: the source '{name}' has a row already; choose another name")
    _write({module: "reader.py.jinja", test: "test_reader.py.jinja"}, name)
    atomic_write(ledger, (rows.rstrip("\n") + "\n" + _rendered("ledger.yaml.jinja", name)).encode())
    return [module, _LEDGER, test]


def _plain(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"NAME={name!r}: give a name in a-z, 0-9 and _ (or - for a reader), such as NAME=glasses")


def _write(files: dict[Path, str], name: str) -> None:
    for path in files:
        if (root() / path).exists():
            raise UserError(f"{path} exists already; choose another name or go on with that file")
    for path, template in files.items():
        atomic_write(root() / path, _rendered(template, name).encode())


def _rendered(template: str, name: str) -> str:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    return environment.get_template(template).render(name=name, module=name.replace("-", "_"))


def main(words: Sequence[str]) -> int:
    """Entry point of `python -m facemllm.cli.skeleton task|reader NAME`."""
    try:
        kind, name = words
        touched = {"task": task, "reader": reader}[kind](name)
    except (ValueError, KeyError):
        print("usage: python -m facemllm.cli.skeleton task|reader NAME", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(str(path) for path in touched))
    if kind == "task":
        print(f"asked by reformat.tasks; to train on it, add `{name}: 1.0` to a stage's tasks in {PARAMS}")
    print(f"what is left to do: .venv/bin/python -m pytest -q {touched[-1]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
