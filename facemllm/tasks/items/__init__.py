"""The forms an item can take: one of several, yes or no, a number on a grid, a set. Each is data and a reader."""

from facemllm.tasks.items.boolean import Boolean
from facemllm.tasks.items.choice import Choice
from facemllm.tasks.items.labels import attribute, column, exactly_one, number_text
from facemllm.tasks.items.number import Number
from facemllm.tasks.items.several import Several, Thing

__all__ = ["Boolean", "Choice", "Number", "Several", "Thing", "attribute", "column", "exactly_one", "number_text"]
