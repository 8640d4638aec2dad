"""A caption, judged by its facts: which of the other tasks' answers it states, as `age=35;gender=female`.

Things that are absent are no facts here: a caption that is silent about a hat says the same as one that denies it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from facemllm.tasks import age, attributes, expression, gender, head_pose
from facemllm.tasks.base import Form, Item, Option, Row, Task
from facemllm.tasks.language import assertions

FACTS: tuple[Item, ...] = tuple(
    item for task in (gender.TASK, age.TASK, expression.TASK, attributes.TASK, head_pose.TASK) for item in task.items
)


@lru_cache(maxsize=64)  # a caption is read for its answer and for its agreement with the labels
def stated_facts(plain: str) -> Mapping[str, str]:
    """What a normalised text that does not hedge states, by item name; absent things ("no hat") included."""
    return {item.name: value for item in FACTS if (value := item.parse(plain)) is not None}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The caption as an item: open, and canonical as the sorted list of its facts."""

    name: str = "caption"
    templates: tuple[str, ...] = (
        "Describe the face.",
        "What does this person look like?",
        "Describe the person in the picture.",
    )
    unseen: tuple[str, ...] = ()
    hidden: None = None
    form: Form = "open"
    options: tuple[Option, ...] = ()

    @property
    def claims(self) -> Mapping[str, str]:
        """None."""
        return {}

    def reply(self, row: Row, label: str) -> str:
        """The row's own caption."""
        return str(row["caption"])

    def label(self, row: Row) -> str | None:
        """The facts that the row's own caption states."""
        caption = row.get("caption")
        return None if caption is None else self.parse(caption)

    def option_for(self, label: str) -> Option:
        """An open question has no options."""
        raise ValueError("a caption is an open question: it has no options")

    def mention(self, label: str) -> str | None:
        """A caption does not mention itself."""
        return None

    def parse(self, text: str) -> str | None:
        """The facts stated, `item=value;...` sorted; None when there is none. A fact stated two ways is none."""
        plain = assertions(text)
        if not plain:
            return None
        stated = stated_facts(plain)
        values = {
            item.name: value for item in FACTS if (value := stated.get(item.name)) is not None and item.mention(value)
        }
        return facts_text(values) or None


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
    items=(Facts(),),
    use="describing what is to be seen",
    reveals=("gender",),
)
