"""A caption, judged by its facts: which of the other tasks' answers it states, as `age=35;gender=female`.

Things that are absent are no facts here: a caption that is silent about a hat says the same as one that denies it.
Where captions, or an annotator's labels, contradict the labels of a face is found here, too. Strict in both directions:
silence, hedging and unknown labels contradict nothing, and a number only when it is off by more than `TOLERANCE`.
"""

from collections.abc import Mapping
from functools import lru_cache

from facemllm.tasks import age, attributes, expression, gender, head_pose
from facemllm.tasks.answers import TOLERANCE, assertions
from facemllm.tasks.base import Item, Row, Task, known
from facemllm.tasks.items import Open

FACTS: tuple[Item, ...] = tuple(
    item for task in (gender.TASK, age.TASK, expression.TASK, attributes.TASK, head_pose.TASK) for item in task.items
)


Differences = dict[str, tuple[str, str]]
"""Item name -> (what is stated, what is labelled), both canonical."""
_YES_NO = {True: "yes", False: "no"}


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


def disagreements(row: Row) -> Differences:
    """Facts that the caption of a row of `faces` states otherwise than the labels of the row do."""
    plain = assertions(row.get("caption") or "")
    if not plain:
        return {}
    found = {}
    for item in FACTS:
        labelled = item.label(row)
        stated = None if labelled is None else stated_facts(plain).get(item.name)
        if labelled is not None and stated is not None and _differ(item, stated, labelled):
            found[item.name] = stated, labelled
    return found


def label_disagreements(stated: Row, row: Row) -> Differences:
    """Labels given for a row that differ from its own; attributes are compared name by name (`yes` or `no`)."""
    found = {}
    given, own = known(stated, "attributes"), known(row, "attributes")
    for name in sorted(given.keys() & own.keys()):
        if None not in (given[name], own[name]) and given[name] != own[name]:
            found[name] = _YES_NO[given[name]], _YES_NO[own[name]]
    for item in FACTS:
        if item in attributes.TASK.items:
            continue
        says, labelled = item.label(stated), item.label(row)
        if says is not None and labelled is not None and _differ(item, says, labelled):
            found[item.name] = says, labelled
    return found


def _differ(item: Item, stated: str, labelled: str) -> bool:
    if item.form != "number":
        return stated != labelled
    if item.option_for(stated) == item.option_for(labelled):
        return False  # beyond the grid's end, both are said the same way
    return abs(float(stated) - float(labelled)) > TOLERANCE[item.name]


TASK = Task(
    name="caption",
    metric="fact_f1",
    items=(
        Open(
            name="caption",
            templates=("Describe the face.", "What does this person look like?", "Describe the person in the picture."),
            labels=lambda row: None if row.get("caption") is None else read(row["caption"]),
            says=lambda row: str(row["caption"]),
            reads=read,
        ),
    ),
    use="describing what is to be seen",
    reveals=("gender",),
)
