"""FaceInsight's templated description: one paragraph with a slot for each part of the face, made from the labels.

Slots are those of the figure in the paper (arXiv 2504.15624): person, shape, forehead, chin, hair, expression,
eyebrows, eyes and eyewear, nose, mouth, beard, accessories; a slot without a known fact is left out. The answer is
judged by its facts, as a caption is, but "no beard" and "no eyewear" are facts here: the slots ask for them.
"""

from collections.abc import Mapping
from functools import cache

from facemllm.tasks import age_range, attributes, expression, gender, presence
from facemllm.tasks.answers import assertions, listed
from facemllm.tasks.base import Item, Row, Task, known
from facemllm.tasks.caption import facts_text
from facemllm.tasks.items import Open

FEWEST = 3
"""A row with fewer facts is not described."""

_ITEMS = {
    item.name: item
    for task in (attributes.TASK, presence.TASK, gender.TASK, age_range.TASK, expression.TASK)
    for item in task.items
}

_SLOTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("The picture shows {}.", ("gender",)),
    ("The person is {}.", ("age_range",)),
    ("It is {}.", ("Oval_Face", "Square_Face", "Round_Face", "Chubby")),
    ("There are {}.", ("High_Cheekbones", "Rosy_Cheeks")),
    ("There is {}.", ("Fully_Visible_Forehead", "Partially_Visible_Forehead", "Obstructed_Forehead")),
    ("Below is {}.", ("Double_Chin", "Round_Jaw")),
    ("On the head is {}.", ("hair_color", "hair_style", "Wavy_Hair", "Straight_Hair", "Curly_Hair")),
    ("Around the face is {}.", ("Receding_Hairline", "Sideburns", "Bangs")),
    ("The face looks {}.", ("expression",)),
    ("Over the eyes are {}.", ("Bushy_Eyebrows", "Arched_Eyebrows")),
    ("One sees {}.", ("eye_color", "Narrow_Eyes", "Bags_Under_Eyes")),
    ("The person wears {}.", ("eyewear",)),
    ("In the middle is {}.", ("Big_Nose", "Pointy_Nose")),
    ("The mouth shows {}.", ("Mouth_Closed", "Mouth_Slightly_Open", "Mouth_Wide_Open", "Big_Lips", "Smiling")),
    ("The person has {}.", ("beard",)),
    (
        "The person wears {}.",
        ("Wearing_Hat", "Wearing_Earrings", "Wearing_Necklace", "Wearing_Necktie", "Wearing_Lipstick", "Heavy_Makeup"),
    ),
)
"""A sentence a slot, and the items whose facts fill it."""

_FACTS: tuple[Item, ...] = tuple(_ITEMS[name] for _, names in _SLOTS for name in names)


@cache
def _members(name: str) -> tuple[str, ...]:
    """Attributes that an exclusive group of `attributes` is made of; none for other items."""
    item = attributes.TASK.find(name)
    return tuple(option.value for option in item.options) if item is not None and item.form == "choice" else ()


def _fact(item: Item, row: Row, given: Mapping[str, bool | None]) -> str | None:
    """What the row says of an item, where that is worth a word. Of a group one true member is enough: sources that
    have no name for the others (CelebA has no red hair) describe hair, too."""
    if members := _members(item.name):
        true = [name for name in members if given.get(name)]
        return true[0] if len(true) == 1 else None
    label = item.label(row)
    return None if label == "no" else label


def facts(row: Row) -> dict[str, str]:
    """What a description of a row of `faces` states: item name -> canonical value."""
    given = known(row, "attributes")
    # copying would lose columns not yet decoded
    plain = row if given is row.get("attributes") else {**row, "attributes": given}
    return {item.name: value for item in _FACTS if (value := _fact(item, plain, given)) is not None}


def paragraph(stated: Mapping[str, str]) -> str:
    """The paragraph that states these facts."""
    sentences = []
    for sentence, names in _SLOTS:
        given = [(_ITEMS[name], stated[name]) for name in names if name in stated]
        words = [item.mention(value) or item.option_for(value).text for item, value in given]
        if words:
            sentences.append(sentence.format(listed(words)))
    return " ".join(sentences)


def read(text: str) -> str | None:
    """The facts that a text states, `item=value;...` sorted; None for none. A fact stated two ways is none."""
    plain = assertions(text)
    if not plain:
        return None
    stated = {item.name: value for item in _FACTS if (value := item.parse(plain)) not in (None, "no")}
    return facts_text({name: str(value) for name, value in stated.items()}) or None


def _label(row: Row) -> str | None:
    stated = facts(row)
    return facts_text(stated) if len(stated) >= FEWEST else None


TASK = Task(
    name="description",
    metric="fact_f1",
    items=(
        Open(
            name="description",
            templates=("Describe this face part by part.", "Describe the face in detail, from shape to accessories."),
            labels=_label,
            says=lambda row: paragraph(facts(row)),
            reads=read,
        ),
    ),
    use="describing what is to be seen, part by part",
    reveals=("gender",),
)
