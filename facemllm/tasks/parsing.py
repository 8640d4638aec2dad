"""Face parsing in questions: which parts can be seen, which are hidden, from the 19-class segmentation.

Hidden is what has no pixel, whether something covers it or it is turned away; where a part has only a few pixels,
nothing is asked about it. The two sides of a part count as one: whose left the classes mean does not matter then.
"""

from functools import partial

from facemllm.tasks.base import Row, Task, shown, sizes
from facemllm.tasks.items import Boolean, Several, Thing

Named = dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
"""A part's classes in the map, and patterns that name it."""

PARTS: Named = {
    "hair": (("hair",), ("hair",)),
    "eyebrows": (("l_brow", "r_brow"), ("eyebrows?", "brows?")),
    "eyes": (("l_eye", "r_eye"), ("eyes?",)),
    "ears": (("l_ear", "r_ear"), ("ears?",)),
    "nose": (("nose",), ("nose",)),
    "lips": (("u_lip", "l_lip"), ("lips?", "mouth")),
    "neck": (("neck",), ("neck",)),
}
WORN: Named = {
    "glasses": (("eye_g",), ("(?:eye)?glasses", "sunglasses")),
    "hat": (("hat",), ("hat",)),
    "earrings": (("ear_r",), ("earrings?",)),
    "necklace": (("neck_l",), ("necklace",)),
    "clothes": (("cloth",), ("clothes", "clothing")),
}


def _which(parts: Named, wanted: bool, row: Row) -> list[str] | None:
    found = sizes(row)
    if found is None:
        return None
    states = {name: shown(found, classes) for name, (classes, _) in parts.items()}
    return None if None in states.values() else [name for name, state in states.items() if state is wanted]


def _there(part: str, row: Row) -> bool | None:
    found = sizes(row)
    return None if found is None else shown(found, (part,))


def _one_hidden(classes: tuple[str, ...], row: Row) -> bool | None:
    found = sizes(row)
    states = [None] if found is None else [shown(found, (name,)) for name in classes]
    return True if False in states else None if None in states else False


def _things(parts: Named) -> tuple[Thing, ...]:
    return tuple(Thing(value=part, text=part, patterns=patterns) for part, (_, patterns) in parts.items())


def _hidden(part: str, *classes: str) -> Boolean:
    """Whether one of two sides cannot be seen."""
    return Boolean(
        name=f"{part}_hidden",
        templates=(f"Is an {part} hidden?", f"Can one of the {part}s not be seen?"),
        unseen=(f"Is one of the {part}s hidden?",),
        text=f"a hidden {part}",
        nouns=(f"(?:a |one )?hidden {part}", f"(?:an |one )?{part} is (?:hidden|covered)"),
        claim="{} is in the picture",
        denial="{} is not in the picture",
        source=partial(_one_hidden, classes),
    )


TASK = Task(
    name="parsing",
    metric="fact_f1",
    items=(
        Several(
            name="visible_parts",
            templates=("Which parts of the face can be seen?", "List the visible parts of the face."),
            unseen=("Of the face, which parts are visible?",),
            things=_things(PARTS),
            source=partial(_which, PARTS, True),
            around="visible|seen|shown|parts?|face|following|person|shows?|picture",
        ),
        Several(
            name="hidden_parts",
            templates=("Which parts of the face are hidden?", "List the hidden parts of the face."),
            unseen=("Of the face, which parts are hidden?",),
            things=_things(PARTS),
            source=partial(_which, PARTS, False),
            around="hidden|covered|obscured|occluded|parts?|face|following",
        ),
        Several(
            name="things_worn",
            templates=("Which things are worn on the face and body?", "List the things that the person wears."),
            unseen=("Which things does the person wear?",),
            things=_things(WORN),
            source=partial(_which, WORN, True),
            around="wears?|wearing|worn|he|she|they|person|man|woman|visible|seen",
        ),
        _hidden("ear", "l_ear", "r_ear"),
        _hidden("eyebrow", "l_brow", "r_brow"),
        Boolean(
            name="neck_visible",
            templates=("Is the neck visible?", "Can the neck be seen?"),
            unseen=("Do you see the neck?",),
            text="the neck",
            nouns=("(?:the )?neck",),
            source=partial(_there, "neck"),
        ),
        Boolean(
            name="mouth_inside",
            templates=("Is the inside of the mouth visible?", "Can you see into the mouth?"),
            unseen=("Is the mouth so open that its inside shows?",),
            text="the inside of the mouth",
            nouns=("(?:the )?inside of the mouth",),
            source=partial(_there, "mouth"),
        ),
    ),
    use="which parts of the face can be seen",
)
