"""Attributes held out of training by name (Face-MLLM's zero-shot attribute analysis): unknown, unsaid, unasked.

The tasks see a row without the attribute, its caption without the words for it. Evaluation asks for it, as the task
`zero_shot`. A caption loses the thing from a list that can be cut, else the sentence that mentions it, else it is lost.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from facemllm import tasks
from facemllm.errors import UserError
from facemllm.settings import Settings
from facemllm.tables.schemas import SEGMENTATION
from facemllm.tasks import ZERO_SHOT
from facemllm.tasks.answers import normalise
from facemllm.tasks.base import Item, Option, Row, Task

SHOWN_BY: Mapping[str, tuple[str, ...]] = {
    "Eyeglasses": ("eye_g",),
    "Sunglasses": ("eye_g",),
    "No_Eyewear": ("eye_g",),
    "Wearing_Hat": ("hat",),
    "Wearing_Earrings": ("ear_r",),
    "Wearing_Necklace": ("neck_l",),
    "Wearing_Necktie": ("neck_l",),
    **dict.fromkeys(("Mouth_Closed", "Mouth_Slightly_Open", "Mouth_Wide_Open"), ("mouth",)),
}
"""Attributes that the very presence of a class in the map gives away, and the classes."""

SHOWN_WITHOUT: Mapping[str, str] = {"Bald": "hair"}
"""Attributes that the absence of a class gives away which cannot be withheld: too much of the map would go with it."""

_SENTENCE = re.compile(r"(?<=[.!?;])\s+")
_SEPARATOR = re.compile(r"(,? and |, | with | who has | wearing )")
_OPENERS = (" with ", " who has ", " wearing ")
_ALSO: Mapping[str, tuple[str, ...]] = {
    "Wearing_Earrings": ("ear ?rings?", "ear ?studs?", "ear ?hoops?", "ear jewel(?:le)?ry"),
    "Wearing_Hat": ("caps?", "beanies?", "head ?wear", "headgear", "bonnets?", "helmets?"),
    "Wearing_Necklace": ("pendants?", "neck ?chains?", "chokers?"),
    "Wearing_Necktie": ("(?:bow ?|neck ?)?ties?",),
    "Wearing_Lipstick": ("(?:red|pink|painted|coloured|colored|full red) lips", "lip ?(?:gloss|colou?r)"),
    "Heavy_Makeup": ("make ?up", "mascara", "eye ?shadow", "eye ?liner"),
    "Smiling": (r"smil\w*", r"grin\w*", r"laugh\w*"),
    "Bangs": ("fringes?",),
    "Mouth_Slightly_Open": (
        "(?:open|parted) (?:mouth|lips)",
        "(?:mouth|lips) (?:is|are) (?:slightly )?(?:open|parted)",
    ),
    "Bushy_Eyebrows": ("bushy (?:eye)?brows?",),
    "Rosy_Cheeks": ("rosy cheeked", "blush(?:ing|ed)?"),
}
"""What things are called beside their items' nouns: a guard for captions in free words, which lists can only widen."""
_BEFORE = r"(?:(?:an?|the|some|his|her|their|wearing|has|visible)\s+)*"
_LEADS = r"(?:.*\b(?:has|have|is|are|shows?|wears?|wearing|with|of))"


class HeldOut:
    """The held-out attributes of a configuration, `names` in order, and how to keep them out."""

    def __init__(self, names: Sequence[str], patterns: Iterable[str]) -> None:
        self.names = tuple(names)
        self._words = re.compile("|".join(rf"\b(?:{pattern})\b" for pattern in patterns) or r"(?!)", re.IGNORECASE)
        self._spelt = re.compile("|".join(map(re.escape, names)) or r"(?!)", re.IGNORECASE)
        self.named_in = lru_cache(maxsize=20_000)(self._named_in)

    @classmethod
    def of(cls, names: Sequence[str], asked: Iterable[Task]) -> HeldOut:
        """The attributes of these names, beside the tasks that are `asked`. Raises UserError when the task `zero_shot`
        does not know a name, or when a task offers it, or its words, among the options of a choice: they would be in
        every such question."""
        if not names:
            return cls((), ())
        distinct, asked, every = tuple(dict.fromkeys(names)), list(asked), tasks.get(ZERO_SHOT)
        for name in distinct:
            _refuse_options(asked, f"'{name}'", partial(_is, name))
            if every.find(name) is None:
                known = [item.name for item in every.items]
                close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
                hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
                raise UserError(f"reformat.held_out: no attribute '{name}'; {hint}")
        made = cls(distinct, [pattern for name in distinct for pattern in _patterns(every.item(name))])
        _refuse_options(asked, " or ".join(distinct), lambda option: made.named_in(option.text))
        return made

    def __bool__(self) -> bool:
        return bool(self.names)

    def _named_in(self, text: str) -> bool:
        words = normalise(text.replace("?", " . "))  # a question mark would hide a question from it
        return words is None or self._words.search(words) is not None or self._spelt.search(text) is not None

    def caption(self, text: str | None) -> str | None:
        """A caption that does not name them, and states nothing new; None when there is none."""
        if text is None or not self or not self.named_in(text):
            return text
        stated, sentences = self._facts(text), _SENTENCE.split(text)
        cut = [self._cut(one) if self.named_in(one) else one for one in sentences]
        shorter = _ended(" ".join(one for one in cut if one))
        if shorter and not self.named_in(shorter) and self._facts(shorter) == stated:
            return shorter
        bare = _ended(" ".join(one for one in sentences if not self.named_in(one)))
        left = self._facts(bare) if bare and not self.named_in(bare) else set()
        return bare if left and left <= stated else None

    def changes(self, row: Row) -> dict[str, Any]:
        """The columns of a row of `faces` (`attributes` a mapping) that are others in the eyes of the tasks."""
        left = {name: value for name, value in (row["attributes"] or {}).items() if name not in self.names}
        return {"attributes": left, "caption": self.caption(row["caption"])}

    def _facts(self, text: str) -> set[str]:
        stated = tasks.get("caption").item("caption").parse(text)
        facts = set() if stated is None else set(stated.split(";"))
        return {fact for fact in facts if fact.partition("=")[0] not in self.names}

    def _cut(self, sentence: str) -> str | None:
        """The sentence without the held-out things in its list; None when it is no list, or nothing is left."""
        body, end = (sentence[:-1], sentence[-1]) if sentence[-1:] in ".!;" else (sentence, "")
        parts = _SEPARATOR.split(body)
        place = 0
        while place < len(parts):
            said = parts[place]
            if not self.named_in(said):
                place += 2
                continue
            lead = ""
            if not self._alone(said):
                found = re.fullmatch(rf"({_LEADS} )(.+)", said) if place == 0 else None
                if found is None or not self._alone(found[2]):
                    return None
                lead = found[1]
            if place == 0 and not lead:
                if len(parts) == 1 or parts[1] in _OPENERS:
                    return None
                parts[:2] = []
                parts[0] = parts[0][:1].upper() + parts[0][1:]
                continue
            opened = bool(lead) or (place > 0 and parts[place - 1] in _OPENERS)
            last = place + 1 >= len(parts) or parts[place + 1] in _OPENERS
            if lead and last:
                return None
            if opened and not last:
                parts[place : place + 2] = []
                parts[place] = lead + parts[place]
            else:
                gone = parts[place - 1]
                parts[place - 1 : place + 1] = []
                if last and "and" in gone and place >= 3 and parts[place - 3] == ", ":
                    parts[place - 3] = gone
        return "".join(parts) + end

    def _alone(self, said: str) -> bool:
        words = normalise(said) or ""
        return re.fullmatch(rf"{_BEFORE}(?:{self._words.pattern})", words, re.IGNORECASE) is not None


def _ended(text: str) -> str:
    return re.sub(r"[;,]$", ".", text)


def _patterns(item: Item) -> list[str]:
    """What names a thing: its nouns, the words in which a caption mentions it, plurals, and what else it is called."""
    words = normalise(item.mention("yes") or "")
    named = [*getattr(item, "nouns", ()), *([re.escape(words)] if words else [])]
    return [*(rf"(?:{noun})(?:e?s)?" for noun in named), *_ALSO.get(item.name, ())]


def _is(name: str, option: Option) -> bool:
    return option.value == name


def _refuse_options(asked: Iterable[Task], what: str, names: Callable[[Option], bool]) -> None:
    for task in asked:
        for item in task.items:
            if any(names(option) for option in item.options):
                raise UserError(
                    f"reformat.held_out: {what} is an option of '{item.name}' in the task '{task.name}', so its words "
                    "are in every such question; take it out of reformat.held_out, or the task out of reformat.tasks"
                )


def withheld_classes(held_out: Iterable[str]) -> list[int]:
    """Numbers of the classes that a model may not see in maps, if it is not to learn these attributes from them. Raises
    UserError for an attribute that no map can keep to itself."""
    held_out = list(held_out)
    for name in held_out:
        if name in SHOWN_WITHOUT:
            raise UserError(
                f"reformat.held_out: {name} shows in a map of face parts, which has no {SHOWN_WITHOUT[name]} then; "
                "hold out another attribute or set model.segmentation.mode: none"
            )
    return sorted({SEGMENTATION.index(part) for name in held_out for part in SHOWN_BY.get(name, ())})


def withheld_of(settings: Settings) -> list[int]:
    """Classes that the model of these settings never sees in a map, see `withheld_classes`."""
    return withheld_classes(settings.reformat.held_out) if settings.model.segmentation.mode != "none" else []
