"""Facial expression in eight classes: the usual seven and contempt (AffectNet)."""

from facemllm.tasks.expression import CONTEMPT, WORDS, expression_task

TASK = expression_task(
    "expression_8",
    {**WORDS, **CONTEMPT},
    ("Which of eight expressions does the face show?", "Which of eight emotions is shown?"),
    ("Of eight expressions, which is shown?",),
)
