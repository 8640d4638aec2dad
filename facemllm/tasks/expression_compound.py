"""Compound expressions: the eleven of RAF-DB, two basic ones at a time (Li, Deng, Du, CVPR 2017)."""

from facemllm.tasks.expression import expression_task

ELEVEN = (
    *("happily_surprised", "happily_disgusted", "sadly_fearful", "sadly_angry", "sadly_surprised", "sadly_disgusted"),
    *("fearfully_angry", "fearfully_surprised", "angrily_surprised", "angrily_disgusted", "disgustedly_surprised"),
)

TASK = expression_task(
    "expression_compound",
    {value: (value.replace("_", " "),) for value in ELEVEN},
    ("Which compound expression does the face show?", "Which two emotions are shown together?"),
    ("What compound emotion is on the face?",),
)
