"""A caption, judged by its facts: which of the other tasks' answers it states, as `age=35;gender=female`.

Things that are absent are no facts here: a caption that is silent about a hat says the same as one that denies it.
"""

from collections.abc import Mapping
from functools import lru_cache

from facemllm.tasks import age, attributes, expression, gender, head_pose
from facemllm.tasks.base import Item, Row, Task
from facemllm.tasks.items import Open
from facemllm.tasks.language import assertions

FACTS: tuple[Item, ...] = tuple(
    item for task in (gender.TASK, age.TASK, expression.TASK, attributes.TASK, head_pose.TASK) for item in task.items
)


@lru_cache(maxsize=64)  # a caption is read for its answer and for its agreement with the labels
def stated_facts(plain: str) -> Mapping[str, str]:
    """What a normalised text that does not hedge states, by item name; absent things ("no hat") included."""
    return {item.name: value for item in FACTS if (value := item.parse(plain)) is not None}


def read(text: str) -> str | None:
    """The facts that a text states, `item=value;...` sorted; None for none. A fact stated two ways is none."""
    plain = assertions(text)
    if not plain:
        return None
    stated = stated_facts(plain)
    values = {
        item.name: value for item in FACTS if (value := stated.get(item.name)) is not None and item.mention(value)
    }
    return facts_text(values) or None


def _label(row: Row) -> str | None:
    caption = row.get("caption")
    return None if caption is None else read(caption)


def facts_text(values: dict[str, str]) -> str:
    """Facts by item name as canonical text."""
    return ";".join(sorted(f"{name}={value}" for name, value in values.items()))


def facts(row: Row) -> dict[str, str]:
    """What a full caption of a row of `faces` would state: item name -> value of the option, absent things left out."""
    stated = {}
    for item in FACTS:
        label = item.label(row)
        if label is not None and item.mention(label) is not None:
            stated[item.name] = item.option_for(label).value
    return stated


TASK = Task(
    name="caption",
    metric="fact_f1",
    higher_is_better=True,
    unit="",
    items=(
        Open(
            name="caption",
            templates=(
                "Describe the face.",
                "What does this person look like?",
                "Describe the person in the picture.",
            ),
            labels=_label,
            says=lambda row: str(row["caption"]),
            reads=read,
        ),
    ),
    use="describing what is to be seen",
    reveals=("gender",),
)
