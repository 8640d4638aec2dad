"""Attributes of hair, beard, eyes and things worn: five exclusive groups, four things that are there or not.

Names are those of CelebA and MAAD. A group gives a question only where exactly one member is true and none is unknown.
"""

from collections.abc import Mapping
from typing import Any

from facemllm.tasks.base import FollowUp, Option, Row, Task, attribute, exactly_one, hidden_from
from facemllm.tasks.items import Boolean, Choice, Words
from facemllm.tasks.wordings import kept

_COLORS = {
    "Black_Hair": ("black",),
    "Dark_Brown_Hair": ("dark brown",),
    "Brown_Hair": ("brown",),
    "Blond_Hair": ("blond", "blonde"),
    "Red_Hair": ("red",),
    "Gray_Hair": ("gray", "grey"),
    "White_Hair": ("white",),
}
_LENGTHS = {
    "Short_Hair": ("short",),
    "Medium_Hair": ("medium", "medium length", "shoulder length"),
    "Long_Hair": ("long",),
}
_EYES = {
    "Brown_Eyes": ("brown",),
    "Dark_Eyes": ("dark",),
    "Hazel_Eyes": ("hazel",),
    "Green_Eyes": ("green",),
    "Blue_Eyes": ("blue",),
    "Gray_Eyes": ("gray", "grey"),
}
_ANY_COLOR = "|".join(name for names in _COLORS.values() for name in names)
_ANY_LENGTH = "|".join(name for names in _LENGTHS.values() for name in names)
_ANY_SHAPE = "wavy|curly|straight|thick|thin"
_ANY_EYES = "|".join(name for names in _EYES.values() for name in names)
_SPECTACLES = ("glasses", "eyeglasses", "spectacles")
_IS = "(?:is|are|:|(?:seems?|appears?|looks?)(?: to be)?)(?: (?:most likely|probably))?"


def _group(name: str, members: Mapping[str, Words], **fields: Any) -> Choice:
    """A group of exclusive attributes in words and patterns; `fields` are those of a choice."""
    return Choice(
        name=name,
        options=tuple(Option(value=value, text=text) for value, (text, _) in members.items()),
        source=exactly_one(tuple(members)),
        patterns={value: patterns for value, (_, patterns) in members.items()},
        **fields,
    )


def _worn(name: str, text: str, place: str, noun: str, there: str = "Is there") -> Boolean:
    return Boolean(
        name=f"Wearing_{name}",
        templates=(f"Is the person wearing {text}?", f"{there} {text} on the {place}?"),
        unseen=(f"{there} {text}?", f"Does the person wear {text} on the {place}?", *kept(f"Wearing_{name}")),
        text=text,
        nouns=(noun,),
    )


def _no_hair(row: Row) -> bool:
    """The row says that the head is bald, or its segmentation shows no hair."""
    return attribute(row, "Bald") is True or hidden_from(row, "hair")


def _hair_under_hat(row: Row) -> bool:
    """The segmentation shows a hat and no hair: what is under it may be anything."""
    return attribute(row, "Wearing_Hat") is True and attribute(row, "Bald") is not True and hidden_from(row, "hair")


def _no_eyes(row: Row) -> bool:
    """The row says that sunglasses are worn, or its segmentation shows no eye."""
    return attribute(row, "Sunglasses") is True or hidden_from(row, "l_eye", "r_eye")


def _hair(words: tuple[str, ...], between: str) -> tuple[str, ...]:
    """Patterns of "brown hair", "brown short hair", "hair is brown", "brown haired"."""
    named = "|".join(words)
    return (
        rf"(?:{named})(?: colou?red)?(?:(?: ,)? (?:{between}|{_ANY_SHAPE})){{0,2}} hair(?:ed)?",
        rf"hair(?: colou?r| length)? {_IS} (?:{named})(?! (?:on|at|in)\b)",
    )


_HAIR_STYLE = _group(
    "hair_style",
    {
        "Bald": ("a bald head", ("(?:a )?bald(?: head)?",)),
        "Buzz_Cut": ("a buzz cut", ("(?:a )?buzz ?cut",)),
        **{value: (f"{words[0]} hair", _hair(words, _ANY_COLOR)) for value, words in _LENGTHS.items()},
        "Hair_Bun": ("a hair bun", ("(?:a )?(?:hair )?bun",)),
    },
    templates=("Which hair style?", "How is the hair worn?", "What is the person's hair style?"),
    unseen=("What style is the hair?", "Which hair style does this person have?", *kept("hair_style")),
    words=_LENGTHS,
    hidden=_hair_under_hat,
)
_STRANDS = "(?:highlights|streaks|strands|roots|tips)"
_HAIR_COLOR = _group(
    "hair_color",
    {
        value: (f"{words[0]} hair", (*_hair(words, _ANY_LENGTH), rf"(?:{'|'.join(words)}) {_STRANDS}"))
        for value, words in _COLORS.items()
    },
    templates=("Which hair color?", "What color is the hair?", "What hair color does this person have?"),
    unseen=("What is the color of the hair?", "Which color is the person's hair?", *kept("hair_color")),
    words=_COLORS,
    others=(rf"\w+ish (?:{_ANY_COLOR})(?: (?:{_ANY_LENGTH}))? hair",),
    hidden=_no_hair,
)
_BEARD = _group(
    "beard",
    {
        "No_Beard": ("no beard", ("clean shaven", "beardless")),
        "5_o_Clock_Shadow": ("stubble", ("5 o ?clock shadow", "stubble")),
        "Mustache": ("a mustache", ("(?:a )?mo?ustache",)),
        "Goatee": ("a goatee", ("(?:a )?goatee(?: beard)?",)),
        "Full_Beard": ("a full beard", ("(?:a )?full beard",)),
    },
    templates=("Which kind of beard?", "What facial hair is there?", "What beard does the person wear?"),
    unseen=("What kind of beard is there?", "Which facial hair does the person have?", *kept("beard")),
    absent="No_Beard",
    absence=("beard", "facial hair"),
)
_EYEWEAR = _group(
    "eyewear",
    {
        "No_Eyewear": ("no eyewear", ()),
        "Eyeglasses": ("glasses", _SPECTACLES),
        "Sunglasses": ("sunglasses", ("sunglasses",)),
    },
    templates=(
        *("Which eyewear is worn?", "What does the person wear over the eyes?"),
        "Which glasses does the person wear?",
    ),
    unseen=("What eyewear does the person wear?", "Which eyewear is there over the eyes?", *kept("eyewear")),
    absent="No_Eyewear",
    absence=("eyewear", *_SPECTACLES),
    others=(r"(?:sun|eye)?glasses(?: \w+){0,3} on \w+ (?:head|hat)",),
)
_EYE_COLOR = _group(
    "eye_color",
    {
        value: (
            f"{words[0]} eyes",
            (rf"(?:{'|'.join(words)})(?: colou?red)? eyes", rf"eye(?:s| colou?r) {_IS} (?:{'|'.join(words)})"),
        )
        for value, words in _EYES.items()
    },
    templates=("Which eye color?", "What color are the eyes?", "What eye color does this person have?"),
    unseen=("What is the color of the eyes?", "Which color are the person's eyes?", *kept("eye_color")),
    words=_EYES,
    others=(rf"\w+ish (?:{_ANY_EYES}) eyes",),
    hidden=_no_eyes,
)
_FOLLOW_UPS = (
    FollowUp(
        opener=Boolean(
            name="beard",
            templates=("Is there facial hair?", "Does the person have facial hair?"),
            text="facial hair",
            nouns=("(?:a )?(?:full )?beard", "facial hair", "(?:a )?goatee(?: beard)?", "(?:a )?mo?ustache", "stubble"),
        ),
        item="beard",
        templates=("And which kind of beard is it?", "What kind is it?"),
        absent="No_Beard",
    ),
    FollowUp(
        opener=Boolean(
            name="eyewear",
            templates=("Does the person wear eyewear?", "Is there eyewear over the eyes?"),
            text="eyewear",
            nouns=("eyewear", "(?:eye)?glasses", "spectacles", "sunglasses"),
        ),
        item="eyewear",
        templates=("And which eyewear is it?", "Which glasses are they?"),
        absent="No_Eyewear",
    ),
    FollowUp(
        opener=Boolean(
            name="hair", templates=("Can the hair be seen?", "Is there hair to be seen?"), text="hair", nouns=("hair",)
        ),
        item="hair_color",
        templates=("And what color is it?", "Which color is it?"),
    ),
)

TASK = Task(
    name="attributes",
    metric="balanced_accuracy",
    items=(
        _HAIR_STYLE,
        _HAIR_COLOR,
        _BEARD,
        _EYEWEAR,
        _EYE_COLOR,
        Boolean(
            name="Bangs",
            templates=("Does the person have bangs?", "Are there bangs on the forehead?"),
            unseen=("Are there bangs?", "Does this person have bangs on the forehead?", *kept("Bangs")),
            text="bangs",
            nouns=("bangs", "fringe"),
        ),
        _worn("Hat", "a hat", "head", "(?:a )?hat"),
        _worn("Earrings", "earrings", "ears", "earrings?", there="Are there"),
        _worn("Lipstick", "lipstick", "lips", "lipstick"),
    ),
    use="what is to be seen of hair, beard, eyes and things worn",
    follow_ups=_FOLLOW_UPS,
)
