"""Names and values of the yes-or-no attributes of CelebA, LFWA and MAAD-Face, however a file spells and codes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from facemllm.errors import UserError
from facemllm.ingest.reader import Refuse
from facemllm.tables.schemas import CELEBA, LFWA_ONLY, MAAD_ONLY

_CELEBA_ONLY = ("Blurry", "Mouth_Slightly_Open", "Narrow_Eyes", "Pale_Skin", "Straight_Hair", "Wearing_Necklace")
MAAD = (*(name for name in CELEBA if name not in _CELEBA_ONLY), *MAAD_ONLY)
"""The 47 attributes of MAAD-Face."""

_ASKED = (
    *("Dark_Brown_Hair", "Red_Hair", "White_Hair", "Short_Hair", "Medium_Hair", "Long_Hair", "Buzz_Cut", "Hair_Bun"),
    *("Dark_Eyes", "Hazel_Eyes", "Green_Eyes", "Blue_Eyes", "Gray_Eyes", "Full_Beard", "Sunglasses"),
)

ATTRIBUTES = tuple(dict.fromkeys((*CELEBA, *MAAD_ONLY, *LFWA_ONLY, *_ASKED)))
"""Those that users may give labels for: of the three datasets, and those that questions are about."""


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


_KNOWN = {_plain(name): name for name in CELEBA + MAAD}


def spelled(name: str) -> str:
    """An attribute's name as CelebA or MAAD-Face spells it; one that neither has, with `_` between its words."""
    known = _KNOWN.get(_plain(name))
    return known or "_".join(name.replace("'", "").replace("-", " ").replace("_", " ").split())


def named(path: Path, line: int, found: Sequence[str], expected: Sequence[str]) -> list[str]:
    """The attributes that a header names, in its order, as CelebA or MAAD-Face spells them.

    Raises UserError when one stands there twice, is not among `expected`, or is missing.
    """
    names = [spelled(name) for name in found]
    twice = {name for name in names if names.count(name) > 1}
    unknown = [name for name in names if name not in expected]
    missing = [name for name in expected if name not in names]
    for what, which in (("there twice", sorted(twice)), ("unknown", unknown), ("missing", missing)):
        if which:
            where = f"{path}, line {line}" if line else str(path)
            raise UserError(f"{where}: column {', '.join(which)} is {what}; these were expected: {' '.join(expected)}")
    return names


class Coding:
    """How a label file codes what is absent: -1 or 0, whichever it uses first, and from then on nothing else.

    Present is 1 in either.
    """

    def __init__(self) -> None:
        self._negative: str | None = None

    def truths(self, names: Sequence[str], values: Sequence[str]) -> dict[str, bool]:
        """Truth of each attribute. Raises Refuse when a value is foreign to the file's coding."""
        for name, value in zip(names, values, strict=True):
            if value not in ("1", "-1", "0"):
                raise Refuse(f"{name} is {value!r}; 1 and -1, or 1 and 0, were expected")
        if "-1" in values and "0" in values:
            raise Refuse("-1 and 0 in one row; 1 and -1, or 1 and 0, were expected")
        negative = next((value for value in ("-1", "0") if value in values), None)
        self._negative = self._negative or negative
        if negative not in (None, self._negative):
            raise Refuse(f"{names[values.index(str(negative))]} is {negative} in a file of 1 and {self._negative}")
        return {name: value == "1" for name, value in zip(names, values, strict=True)}


def known(names: Sequence[str], values: Sequence[str]) -> dict[str, bool]:
    """Truth of each attribute coded 1 (present) or -1 (absent); one coded 0, undefined, is left out.

    Raises Refuse for any other value.
    """
    for name, value in zip(names, values, strict=True):
        if value not in ("1", "-1", "0"):
            raise Refuse(f"{name} is {value!r}; 1, -1 or 0 was expected")
    return {name: value == "1" for name, value in zip(names, values, strict=True) if value != "0"}


def labels(attributes: Mapping[str, bool]) -> dict[str, Any]:
    """Columns of `faces` that attributes give: themselves, and the gender that `Male` says, as annotated."""
    found: dict[str, Any] = {"attributes": attributes}
    if "Male" in attributes:
        found["gender"] = "male" if attributes["Male"] else "female"
    return found
