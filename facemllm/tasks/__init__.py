"""Face-perception tasks, one a module. Question making, training, evaluation and serving all go through them.

A new task is a module in this folder that holds a `TASK` of its own name, and its name in `reformat.tasks`. Modules are
found by name, and the code of all of them counts in the keys of results. No task names, matches or searches people.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

from facemllm.errors import UserError
from facemllm.tasks import asking
from facemllm.tasks.base import Question, Task, fault_of

ZERO_SHOT = "zero_shot"
"""The task that knows every attribute that can be held out of training, and asks at evaluation for those that are."""


@cache
def all_names() -> tuple[str, ...]:
    """Names of all tasks, captions first, then in the order of the alphabet."""
    found = [module.name for module in pkgutil.iter_modules(__path__) if _task(module.name) is not None]
    return tuple(sorted(found, key=lambda name: (name != "caption", name)))


def get(name: str) -> Task:
    """The task of that name. Raises UserError listing the known ones."""
    task = _task(name)
    if task is None:
        raise UserError(f"no task '{name}'; known tasks: {', '.join(all_names())}")
    return task


@cache
def _task(name: str) -> Task | None:
    if not name.isidentifier() or name.startswith("_"):
        return None
    file = f"facemllm/tasks/{name}.py"
    try:
        task = getattr(import_module(f"{__name__}.{name}"), "TASK", None)
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        return None
    except SyntaxError as error:
        raise UserError(f"{file}, line {error.lineno}: {error.msg}") from None
    if task is None:
        return None
    if not isinstance(task, Task):
        raise UserError(f"{file}: TASK is no facemllm.tasks.Task")
    if fault := (f"its task calls itself '{task.name}'" if task.name != name else fault_of(task)):
        raise UserError(f"{file}: {fault}")
    return task


def question_of(turn: Mapping[str, Any]) -> Question:
    """The question that a stored turn asks (`asking.question_of`). Raises UserError if task or template is unknown."""
    question = asking.question_of(get(turn["task"]), turn)
    if question is None:
        raise UserError(f"task '{turn['task']}' has no template '{turn['template']}'; make the conversations again")
    return question


def read(question: Question, text: str) -> str | None:
    """The canonical answer to a question in a text; None unless exactly one is plainly given."""
    return asking.read(get(question.task), question, text)
