"""Compound expressions: the eleven of RAF-DB, two basic ones at a time (Li, Deng, Du, CVPR 2017)."""

from facemllm.tasks.base import Option, Task
from facemllm.tasks.items import Choice
from facemllm.tasks.labels import column

ELEVEN = (
    *("happily_surprised", "happily_disgusted", "sadly_fearful", "sadly_angry", "sadly_surprised", "sadly_disgusted"),
    *("fearfully_angry", "fearfully_surprised", "angrily_surprised", "angrily_disgusted", "disgustedly_surprised"),
)

TASK = Task(
    name="expression_compound",
    metric="accuracy",
    unit="",
    items=(
        Choice(
            name="expression_compound",
            templates=("Which compound expression does the face show?", "Which two emotions are shown together?"),
            unseen=("What compound emotion is on the face?",),
            options=tuple(Option(value=value, text=value.replace("_", " ")) for value in ELEVEN),
            source=column("expression"),
            patterns={value: (value.replace("_", " "),) for value in ELEVEN},
            claim="the face looks {}",
        ),
    ),
    use="the expression shown; it tells no feeling, mood or intent",
)
