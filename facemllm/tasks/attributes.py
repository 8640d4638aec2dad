"""Attributes of hair, beard, eyes and things worn: five exclusive groups, four things that are there or not.

Names are those of CelebA and MAAD. A group gives a question only where exactly one member is true and none is unknown.
"""

from collections.abc import Callable, Mapping

from facemllm.tasks.base import FollowUp, Option, Row, Task
from facemllm.tasks.items import Boolean, Choice
from facemllm.tasks.labels import attribute, exactly_one, hidden_from

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
_IS = "(?:is|are|:|(?:seems?|appears?|looks?)(?: to be)?)"

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
    unseen: tuple[str, ...],
    words: Mapping[str, tuple[str, ...]] | None = None,
    absent: str | None = None,
    absence: tuple[str, ...] = (),
    others: tuple[str, ...] = (),
    hidden: Callable[[Row], bool] | None = None,
) -> Choice:
    return Choice(
        name=name,
        templates=templates,
        unseen=unseen,
        options=tuple(Option(value=value, text=text) for value, text in texts.items()),
        source=exactly_one(tuple(texts)),
        patterns=patterns,
        words=words or {},
        absent=absent,
        absence=absence,
        others=others,
        hidden=hidden,
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
    _HAIR_STYLE_TEXT,
    {
        "Bald": ("(?:a )?bald(?: head)?",),
        "Buzz_Cut": ("(?:a )?buzz ?cut",),
        **{value: _hair(words, _ANY_COLOR) for value, words in _LENGTHS.items()},
        "Hair_Bun": ("(?:a )?(?:hair )?bun",),
    },
    ("Which hair style?", "How is the hair worn?", "What is the person's hair style?"),
    ("What style is the hair?", "Which hair style does this person have?"),
    words=_LENGTHS,
    hidden=_hair_under_hat,
)
_HAIR_COLOR = _group(
    "hair_color",
    {value: f"{words[0]} hair" for value, words in _COLORS.items()},
    {
        value: (*_hair(words, _ANY_LENGTH), rf"(?:{'|'.join(words)}) (?:highlights|streaks|strands|roots|tips)")
        for value, words in _COLORS.items()
    },
    ("Which hair color?", "What color is the hair?", "What hair color does this person have?"),
    ("What is the color of the hair?", "Which color is the person's hair?"),
    words=_COLORS,
    others=(rf"\w+ish (?:{_ANY_COLOR})(?: (?:{_ANY_LENGTH}))? hair",),
    hidden=_no_hair,
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
    ("What kind of beard is there?", "Which facial hair does the person have?"),
    absent="No_Beard",
    absence=("beard", "facial hair"),
)
_EYEWEAR = _group(
    "eyewear",
    _EYEWEAR_TEXT,
    {"No_Eyewear": (), "Eyeglasses": ("glasses", "eyeglasses", "spectacles"), "Sunglasses": ("sunglasses",)},
    ("Which eyewear is worn?", "What does the person wear over the eyes?", "Which glasses does the person wear?"),
    ("What eyewear does the person wear?", "Which eyewear is there over the eyes?"),
    absent="No_Eyewear",
    absence=("eyewear", "glasses", "eyeglasses", "spectacles"),
    others=(r"(?:sun|eye)?glasses(?: \w+){0,3} on \w+ (?:head|hat)",),
)
_EYE_COLOR = _group(
    "eye_color",
    {value: f"{words[0]} eyes" for value, words in _EYES.items()},
    {
        value: (rf"(?:{'|'.join(words)})(?: colou?red)? eyes", rf"eye(?:s| colou?r) {_IS} (?:{'|'.join(words)})")
        for value, words in _EYES.items()
    },
    ("Which eye color?", "What color are the eyes?", "What eye color does this person have?"),
    ("What is the color of the eyes?", "Which color are the person's eyes?"),
    words=_EYES,
    others=(rf"\w+ish (?:{_ANY_EYES}) eyes",),
    hidden=_no_eyes,
)


def _opener(name: str, templates: tuple[str, ...], text: str, nouns: tuple[str, ...]) -> Boolean:
    return Boolean(name=name, templates=templates, text=text, nouns=nouns)


_FOLLOW_UPS = (
    FollowUp(
        opener=_opener(
            "beard",
            ("Is there facial hair?", "Does the person have facial hair?"),
            "facial hair",
            ("(?:a )?(?:full )?beard", "facial hair", "(?:a )?goatee(?: beard)?", "(?:a )?mo?ustache", "stubble"),
        ),
        item="beard",
        templates=("And which kind of beard is it?", "What kind is it?"),
        absent="No_Beard",
    ),
    FollowUp(
        opener=_opener(
            "eyewear",
            ("Does the person wear eyewear?", "Is there eyewear over the eyes?"),
            "eyewear",
            ("eyewear", "(?:eye)?glasses", "spectacles", "sunglasses"),
        ),
        item="eyewear",
        templates=("And which eyewear is it?", "Which glasses are they?"),
        absent="No_Eyewear",
    ),
    FollowUp(
        opener=_opener("hair", ("Can the hair be seen?", "Is there hair to be seen?"), "hair", ("hair",)),
        item="hair_color",
        templates=("And what color is it?", "Which color is it?"),
    ),
)

TASK = Task(
    name="attributes",
    metric="balanced_accuracy",
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
            unseen=("Are there bangs?", "Does this person have bangs on the forehead?"),
            text="bangs",
            nouns=("bangs", "fringe"),
        ),
        Boolean(
            name="Wearing_Hat",
            templates=("Is the person wearing a hat?", "Is there a hat on the head?"),
            unseen=("Is there a hat?", "Does the person wear a hat on the head?"),
            text="a hat",
            nouns=("(?:a )?hat",),
        ),
        Boolean(
            name="Wearing_Earrings",
            templates=("Is the person wearing earrings?", "Are there earrings on the ears?"),
            unseen=("Are there earrings?", "Does the person wear earrings on the ears?"),
            text="earrings",
            nouns=("earrings?",),
        ),
        Boolean(
            name="Wearing_Lipstick",
            templates=("Is the person wearing lipstick?", "Is there lipstick on the lips?"),
            unseen=("Is there lipstick?", "Does the person wear lipstick on the lips?"),
            text="lipstick",
            nouns=("lipstick",),
        ),
    ),
    use="what is to be seen of hair, beard, eyes and things worn",
    follow_ups=_FOLLOW_UPS,
)
