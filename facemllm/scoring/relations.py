"""Logical relations between attributes of one face: data alone.

After FaceInsight (arXiv 2504.15624), whose own list is not published; exclusion and dependency are the two kinds of
LogicalConsistency (github HaiyuWu/LogicalConsistency). Names are those of CelebA and MAAD. Only what follows from the
words is here: that a bald person wears a hat, or that a child has no beard, contradicts nothing. Labels break some of
them in practice, so the rate in the ground truth is measured beside the model's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["exclusive", "excludes", "at_least_one"]


@dataclass(frozen=True, kw_only=True)
class Relation:
    """`exclusive`: at most one of `names` is true; `at_least_one`: one of them; `excludes`: where `given` is, none."""

    kind: Kind
    names: tuple[str, ...]
    given: str | None = None

    @property
    def attributes(self) -> tuple[str, ...]:
        """Every attribute that it speaks of."""
        return self.names if self.given is None else (self.given, *self.names)

    def __str__(self) -> str:
        words = {"exclusive": "at most one of", "at_least_one": "at least one of"}
        listed = ", ".join(self.names)
        return f"{words[self.kind]} {listed}" if self.given is None else f"{self.given} {self.kind} {listed}"


HAIR_COLORS = (
    *("Black_Hair", "Dark_Brown_Hair", "Brown_Hair", "Blond_Hair"),
    *("Red_Hair", "Gray_Hair", "White_Hair"),
)
BEARDS = ("5_o_Clock_Shadow", "Goatee", "Mustache", "Full_Beard")


def _excludes(given: str, *names: str) -> tuple[Relation, ...]:
    return tuple(Relation(kind="excludes", given=given, names=(name,)) for name in names)


RELATIONS: tuple[Relation, ...] = (
    *_excludes("No_Beard", *BEARDS),
    Relation(kind="excludes", given="Bald", names=HAIR_COLORS),
    *_excludes("Bald", "Bangs", "Wavy_Hair", "Straight_Hair", "Curly_Hair"),
    *_excludes("Bald", "Buzz_Cut", "Short_Hair", "Medium_Hair", "Long_Hair", "Hair_Bun"),
    *_excludes("No_Eyewear", "Eyeglasses", "Sunglasses"),
    *_excludes("Straight_Hair", "Wavy_Hair", "Curly_Hair"),
    *_excludes("Mouth_Closed", "Mouth_Slightly_Open", "Mouth_Wide_Open"),
    *_excludes("Obstructed_Forehead", "Fully_Visible_Forehead"),
    *_excludes("Bangs", "Fully_Visible_Forehead"),
    Relation(kind="exclusive", names=HAIR_COLORS),
    Relation(kind="exclusive", names=("Short_Hair", "Medium_Hair", "Long_Hair")),
    Relation(kind="exclusive", names=("Oval_Face", "Square_Face", "Round_Face")),
    Relation(kind="exclusive", names=("Young", "Middle_Aged", "Senior")),
    Relation(kind="exclusive", names=("Brown_Eyes", "Dark_Eyes", "Hazel_Eyes", "Green_Eyes", "Blue_Eyes", "Gray_Eyes")),
    Relation(kind="at_least_one", names=("No_Eyewear", "Eyeglasses", "Sunglasses")),
)
