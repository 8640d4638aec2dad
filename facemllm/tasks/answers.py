"""The one rule by which probabilities over a question's options become an answer, for evaluation and serving alike.

A choice or a yes/no question is answered by its most probable option; a number by the expectation over its grid, with
two decimals. `greedy` is the option the model would have written of its own accord, None when it would have written
something else: then there is no value, only the text that comes nearest. Nor is there one when a probability is not a
number: a broken model answers nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from facemllm.tasks.base import Question


@dataclass(frozen=True)
class Answer:
    """An answered question: canonical value (None = not answered), the words that say it, probability by value."""

    value: str | None
    text: str
    scores: dict[str, float]


def answer(question: Question, probabilities: Sequence[float], greedy: int | None) -> Answer:
    """Answer a closed question from the probabilities of its options, in their order."""
    assert question.options, f"{question.task}.{question.item} is an open question"
    weights = [float(p) for p in probabilities]
    assert len(weights) == len(question.options)
    scores = {option.value: weight for option, weight in zip(question.options, weights, strict=True)}
    if not all(map(math.isfinite, weights)) or sum(weights) <= 0:
        return Answer(None, "", scores)
    if question.form == "number":
        total = sum(weights)
        mean = sum(float(option.value) * weight for option, weight in zip(question.options, weights, strict=True))
        text = f"{round(mean / total, 2) + 0.0:.2f}"  # + 0.0 turns -0.0 into 0.0
        return Answer(None if greedy is None else text, text, scores)
    best = question.options[max(range(len(weights)), key=weights.__getitem__)]
    return Answer(None if greedy is None else best.value, best.text, scores)
