"""The forms an item can take: one of several, yes or no, a number, a set, free text. Each is data and a reader."""

from facemllm.tasks.items.boolean import Boolean
from facemllm.tasks.items.choice import Choice
from facemllm.tasks.items.labels import attribute, column, exactly_one, number_text
from facemllm.tasks.items.number import Number
from facemllm.tasks.items.open import Open
from facemllm.tasks.items.several import Several, Thing

__all__ = [
    "Boolean",
    "Choice",
    "Number",
    "Open",
    "Several",
    "Thing",
    "attribute",
    "column",
    "exactly_one",
    "number_text",
]
