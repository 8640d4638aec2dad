"""Attributes that are there or not, name by name: the union of CelebA's forty, MAAD-Face's 47 and LFWA's 73.

Not here are Bangs, Wearing_Hat, Wearing_Earrings and Wearing_Lipstick, which `attributes` asks, and those that speak of
persons (Male, Asian, Black, Indian, White, Attractive, Attractive_Man, Attractive_Woman): `presence_of_persons` asks
them. `CELEBA_40` says which task has which of CelebA's names, for the mean accuracy that the field reports.
"""

from facemllm.tables.schemas import CELEBA
from facemllm.tasks import things
from facemllm.tasks.attributes import TASK as ATTRIBUTES
from facemllm.tasks.base import Task

_WORDS = (
    *(things.FACE, things.HAIR, things.BEARD, things.EYES, things.MOUTH, things.WORN, things.PICTURE, things.AGES),
)

TASK = Task(
    name="presence",
    metric="balanced_accuracy",
    higher_is_better=True,
    unit="",
    items=tuple(things.thing(name, words) for group in _WORDS for name, words in group.items()),
    use="what is to be seen of a face, and of the picture",
)

CELEBA_40 = {
    name: "attributes" if ATTRIBUTES.find(name) else "presence" if TASK.find(name) else "presence_of_persons"
    for name in CELEBA
}
"""CelebA's forty names, each with the task that has it as an item."""
