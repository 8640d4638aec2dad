"""Facial expression in eight classes: the usual seven and contempt (AffectNet)."""

from facemllm.tasks.base import Option, Task
from facemllm.tasks.expression import CONTEMPT, WORDS
from facemllm.tasks.items import Choice
from facemllm.tasks.labels import column

_EIGHT = {**WORDS, **CONTEMPT}

TASK = Task(
    name="expression_8",
    metric="accuracy",
    unit="",
    items=(
        Choice(
            name="expression_8",
            templates=("Which of eight expressions does the face show?", "Which of eight emotions is shown?"),
            unseen=("Of eight expressions, which is shown?",),
            options=tuple(Option(value=value, text=words[0]) for value, words in _EIGHT.items()),
            source=column("expression"),
            patterns=_EIGHT,
            claim="the face looks {}",
        ),
    ),
    use="the expression shown; it tells no feeling, mood or intent",
)
