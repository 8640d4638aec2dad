"""Attributes of hair, beard, eyes and things worn: five exclusive groups, four things that are there or not.

Names are those of CelebA and MAAD. A group gives a question only where exactly one member is true and none is unknown.
"""

from collections.abc import Mapping

from facemllm.tasks.base import Option, Task
from facemllm.tasks.items import Boolean, Choice, exactly_one

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

_HAIR_STYLE_TEXT = {
    "Bald": "a bald head",
    "Buzz_Cut": "a buzz cut",
    "Short_Hair": "short hair",
    "Medium_Hair": "medium hair",
    "Long_Hair": "long hair",
    "Hair_Bun": "a hair bun",
}
_BEARD_TEXT = {
    "No_Beard": "no beard",
    "5_o_Clock_Shadow": "stubble",
    "Mustache": "a mustache",
    "Goatee": "a goatee",
    "Full_Beard": "a full beard",
}
_EYEWEAR_TEXT = {"No_Eyewear": "no eyewear", "Eyeglasses": "glasses", "Sunglasses": "sunglasses"}


def _group(
    name: str,
    texts: Mapping[str, str],
    patterns: Mapping[str, tuple[str, ...]],
    templates: tuple[str, ...],
    words: Mapping[str, tuple[str, ...]] | None = None,
    absent: str | None = None,
    absence: tuple[str, ...] = (),
) -> Choice:
    return Choice(
        name=name,
        templates=templates,
        options=tuple(Option(value=value, text=text) for value, text in texts.items()),
        source=exactly_one(tuple(texts)),
        patterns=patterns,
        words=words or {},
        absent=absent,
        absence=absence,
    )


def _hair(words: tuple[str, ...], between: str) -> tuple[str, ...]:
    """Patterns of "brown hair", "brown short hair", "hair is brown", "brown haired"."""
    named = "|".join(words)
    return (
        rf"(?:{named})(?: colou?red)?(?: (?:{between}))? hair(?:ed)?",
        rf"hair(?: colou?r| length)? (?:is|:) (?:{named})",
    )


_HAIR_STYLE = _group(
    "hair_style",
    _HAIR_STYLE_TEXT,
    {
        "Bald": ("(?:a )?bald(?: head)?",),
        "Buzz_Cut": ("(?:a )?buzz ?cut",),
        **{value: _hair(words, _ANY_COLOR) for value, words in _LENGTHS.items()},
        "Hair_Bun": ("(?:a )?(?:hair )?bun",),
    },
    ("Which hair style?", "How is the hair worn?", "What is the person's hair style?"),
    words=_LENGTHS,
)
_HAIR_COLOR = _group(
    "hair_color",
    {value: f"{words[0]} hair" for value, words in _COLORS.items()},
    {value: _hair(words, _ANY_LENGTH) for value, words in _COLORS.items()},
    ("Which hair color?", "What color is the hair?", "What hair color does this person have?"),
    words=_COLORS,
)
_BEARD = _group(
    "beard",
    _BEARD_TEXT,
    {
        "No_Beard": ("clean shaven", "beardless"),
        "5_o_Clock_Shadow": ("5 o ?clock shadow", "stubble"),
        "Mustache": ("(?:a )?mo?ustache",),
        "Goatee": ("(?:a )?goatee(?: beard)?",),
        "Full_Beard": ("(?:a )?full beard",),
    },
    ("Which kind of beard?", "What facial hair is there?", "What beard does the person wear?"),
    absent="No_Beard",
    absence=("beard", "facial hair"),
)
_EYEWEAR = _group(
    "eyewear",
    _EYEWEAR_TEXT,
    {"No_Eyewear": (), "Eyeglasses": ("glasses", "eyeglasses", "spectacles"), "Sunglasses": ("sunglasses",)},
    ("Which eyewear is worn?", "What does the person wear over the eyes?", "Which glasses does the person wear?"),
    absent="No_Eyewear",
    absence=("eyewear", "glasses", "eyeglasses", "spectacles"),
)
_EYE_COLOR = _group(
    "eye_color",
    {value: f"{words[0]} eyes" for value, words in _EYES.items()},
    {
        value: (rf"(?:{'|'.join(words)})(?: colou?red)? eyes", rf"eye(?:s| colou?r) (?:is|are|:) (?:{'|'.join(words)})")
        for value, words in _EYES.items()
    },
    ("Which eye color?", "What color are the eyes?", "What eye color does this person have?"),
    words=_EYES,
)

TASK = Task(
    name="attributes",
    metric="balanced_accuracy",
    higher_is_better=True,
    unit="",
    items=(
        _HAIR_STYLE,
        _HAIR_COLOR,
        _BEARD,
        _EYEWEAR,
        _EYE_COLOR,
        Boolean(
            name="Bangs",
            templates=("Does the person have bangs?", "Are there bangs on the forehead?"),
            text="bangs",
            nouns=("bangs", "fringe"),
        ),
        Boolean(
            name="Wearing_Hat",
            templates=("Is the person wearing a hat?", "Is there a hat on the head?"),
            text="a hat",
            nouns=("(?:a )?hat",),
        ),
        Boolean(
            name="Wearing_Earrings",
            templates=("Is the person wearing earrings?", "Are there earrings on the ears?"),
            text="earrings",
            nouns=("earrings?",),
        ),
        Boolean(
            name="Wearing_Lipstick",
            templates=("Is the person wearing lipstick?", "Is there lipstick on the lips?"),
            text="lipstick",
            nouns=("lipstick",),
        ),
    ),
    use="what is to be seen of hair, beard, eyes and things worn",
)
