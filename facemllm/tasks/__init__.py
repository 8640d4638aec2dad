"""Face-perception tasks, one a module. Question making, training, evaluation and serving all go through them.

A new task is a new module with a `TASK`, and a line below: imported by name, so that results are keyed by its code.
No task names, matches or searches people.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from facemllm.errors import UserError
from facemllm.tasks import age, attributes, caption, expression, gender, head_pose
from facemllm.tasks.base import Option, Question, Task, draw, groups, phrases_of

__all__ = [
    "Option",
    "Question",
    "Task",
    "all_names",
    "draw",
    "get",
    "groups",
    "phrases",
    "question_of",
    "question_text",
]

_TASKS = {
    task.name: task for task in (caption.TASK, attributes.TASK, expression.TASK, age.TASK, gender.TASK, head_pose.TASK)
}


def all_names() -> tuple[str, ...]:
    """Names of all tasks, captions first."""
    return tuple(_TASKS)


def get(name: str) -> Task:
    """The task of that name. Raises UserError listing the known ones."""
    if name not in _TASKS:
        raise UserError(f"no task '{name}'; known tasks: {', '.join(_TASKS)}")
    return _TASKS[name]


def phrases() -> tuple[str, ...]:
    """Every phrase that answers a closed question or mentions a fact in a caption, each once ("yes" and "no" too)."""
    return tuple(dict.fromkeys(text for task in _TASKS.values() for item in task.items for text in phrases_of(item)))


def question_of(turn: Mapping[str, Any]) -> Question:
    """The question that a stored turn asks. Raises UserError if its task or template is not known here."""
    return _question(turn)[0]


def question_text(turn: Mapping[str, Any]) -> str:
    """The wording in which a stored turn asks. Raises UserError if its task or template is not known here."""
    question, index = _question(turn)
    return question.templates[index]


def _question(turn: Mapping[str, Any]) -> tuple[Question, int]:
    item, _, index = str(turn["template"]).rpartition("/")
    for question in get(turn["task"]).questions():
        if question.item == item and index.isdecimal() and int(index) < len(question.templates):
            return question, int(index)
    raise UserError(f"task '{turn['task']}' has no template '{turn['template']}'; make the conversations again")
