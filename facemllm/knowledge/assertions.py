"""What an answer says of a face: the characteristics that it affirms and denies, by name.

A characteristic is a thing that a yes/no item asks for, named by the item, or a value of a choice. Canonical values
are lower case and attribute names are not, so an attribute is the same characteristic whichever question asks for it;
any other value is `item=value`.
"""

from __future__ import annotations

from facemllm.tasks import asking
from facemllm.tasks.base import Item, Question, Task


def characteristic(item: Item, value: str) -> str:
    """The characteristic that a value of a yes/no item or of a choice is about."""
    if item.form == "boolean":
        return item.name
    return value if value != value.lower() else f"{item.name}={value}"


def asserted(task: Task, question: Question, answer: str) -> tuple[list[str], list[str]]:
    """Names that a canonical answer affirms and denies, to a question about a choice or a yes/no item as it was asked:
    a chosen value denies the others, a refuted claim denies its own. Nothing when it is no answer to the question."""
    item = task.item(question.item)
    values = [option.value for option in item.options]
    left = [value for value in values if asking.implied(task, question, value) == answer]
    if item.form == "boolean":
        return ([item.name] if left == ["yes"] else []), ([item.name] if left == ["no"] else [])
    names = [characteristic(item, value) for value in left]
    denied = [characteristic(item, value) for value in values if left and value not in left]
    return (names if len(names) == 1 else []), denied
