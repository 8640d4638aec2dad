"""Facial expression: the seven that most datasets share. A contempt label gives no question, yet is understood."""

from collections.abc import Callable, Mapping

from facemllm.tasks.base import Option, Row, Task, column
from facemllm.tasks.items import Choice
from facemllm.tasks.wordings import kept

WORDS = {
    "neutral": ("neutral", "neutrality", "expressionless"),
    "happiness": ("happy", "happiness", "joyful", "joy"),
    "sadness": ("sad", "sadness"),
    "surprise": ("surprised", "surprise"),
    "fear": ("fearful", "fear", "afraid", "scared"),
    "disgust": ("disgusted", "disgust"),
    "anger": ("angry", "anger"),
}
CONTEMPT = {"contempt": ("contemptuous", "contempt")}


def expression_task(
    name: str,
    words: Mapping[str, tuple[str, ...]],
    templates: tuple[str, ...],
    unseen: tuple[str, ...],
    *,
    understood: Mapping[str, tuple[str, ...]] | None = None,
    source: Callable[[Row], str | None] | None = None,
    claim: str = "the face looks {}",
) -> Task:
    """A task of one choice: by value the `words` that name it, the first being its text; others are `understood`.
    Unless a `source` says otherwise, the label is the row's expression."""
    item = Choice(
        name=name,
        templates=templates,
        unseen=unseen,
        options=tuple(Option(value=value, text=named[0]) for value, named in words.items()),
        source=source or column("expression"),
        patterns={**words, **(understood or {})},
        claim=claim,
    )
    use = "the expression shown; it tells no feeling, mood or intent"
    return Task(name=name, metric="accuracy", items=(item,), use=use)


TASK = expression_task(
    "expression",
    WORDS,
    ("What expression does the face show?", "Which emotion is shown?", "How does the person feel?"),
    ("Which expression is shown?", "What emotion does the face show?", *kept("expression")),
    understood=CONTEMPT,
)
