"""Facial expression: the seven that most datasets share. A contempt label gives no question, yet is understood."""

from facemllm.tasks.base import Option, Task
from facemllm.tasks.items import Choice
from facemllm.tasks.labels import column

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

TASK = Task(
    name="expression",
    metric="accuracy",
    unit="",
    items=(
        Choice(
            name="expression",
            templates=(
                "What expression does the face show?",
                "Which emotion is shown?",
                "How does the person feel?",
            ),
            unseen=("Which expression is shown?", "What emotion does the face show?"),
            options=tuple(Option(value=value, text=words[0]) for value, words in WORDS.items()),
            source=column("expression"),
            patterns={**WORDS, **CONTEMPT},
            claim="the face looks {}",
        ),
    ),
    use="the expression shown; it tells no feeling, mood or intent",
)
