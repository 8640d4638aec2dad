"""The columns of `labels.csv` in a folder of pictures (see `imagefolder`): which there are, what their cells mean."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from facemllm.errors import UserError
from facemllm.ingest import labels
from facemllm.ingest.reader import Refuse
from facemllm.ingest.readers.files import snake
from facemllm.ingest.readers.vocabulary import ATTRIBUTES
from facemllm.tables import SPLITS

NUMBERS = {"age": (0, 120), "skin_tone": (1, 10), "yaw": (-180, 180), "pitch": (-180, 180), "roll": (-180, 180)}
TEXTS = ("alt_text", "caption")
WORDS = ("expression", "ethnicity")
OTHERS = ("file", "subject", "split", "gender", "age_range", "box", "landmarks")
COLUMNS = (*OTHERS, *TEXTS, *WORDS, *NUMBERS, *ATTRIBUTES)
"""Every column but the action units."""

GENDERS = ("female", "male")
TRUTH = {**dict.fromkeys(("1", "1.0", "true", "yes"), True), **dict.fromkeys(("0", "0.0", "false", "no"), False)}
_EXPRESSIONS = {"happy": "happiness", "sad": "sadness", "surprised": "surprise", "angry": "anger", "fearful": "fear"}
_EXPRESSIONS |= {"disgusted": "disgust", "scared": "fear", "afraid": "fear", "contemptuous": "contempt"}
_MEANT = {
    "file": ("filename", "file_name", "filepath", "path", "image", "image_path", "img", "name"),
    "subject": ("person", "identity", "id", "subject_id", "person_id"),
    "expression": ("emotion",),
    "gender": ("sex",),
    "ethnicity": ("race",),
    "box": ("bbox",),
    "split": ("set", "partition"),
    "caption": ("description", "text"),
}
_UNIT = re.compile(r"AU([1-9]|[1-5]\d|6[0-4])")
_NOTHING = ("nan", "na", "n/a", "null", "none", "unknown", "?", "-")


@dataclass(frozen=True)
class Row:
    """What one row says of its picture."""

    subject: str | None = None
    split: str | None = None
    labels: Mapping[str, Any] = field(default_factory=dict)


def check_header(path: Path) -> None:
    """Raises UserError when the first line is not the header of a table with known columns."""
    number, first = next(labels.lines(path), (1, ""))
    where = f"{path}, line {number}"
    if not first:
        raise UserError(f"{path}: empty; write a header (file,age,...) and a row for every picture, or remove it")
    if "," not in first and (sign := next((sign for sign in ";\t|" if sign in first), None)):
        raise UserError(f"{where}: columns are parted by {sign!r}; save the table with commas")
    header = labels.split_header(path, number, first)
    for place, name in enumerate(header, start=1):
        if not name or name.startswith("Unnamed:"):
            raise UserError(f"{where}: column {place} has no name; name it or save the table without its index")
        if name not in COLUMNS and not _UNIT.fullmatch(name):
            raise UserError(f"{where}: no column is called '{name}'{_suggestion(name, header)}")
    if "file" not in header:
        raise UserError(f"{where}: column file is missing; it holds the path of each picture, as in anna/one.jpg")


def parsed(values: Mapping[str, str]) -> Row:
    """The cells of a row. Raises Refuse naming the column that is wrong."""
    found: dict[str, Any] = {}
    attributes: dict[str, bool] = {}
    units: dict[str, float] = {}
    for name, cell in values.items():
        if not cell or name in ("file", "subject", "split"):
            continue
        if cell.lower() in _NOTHING and name not in TEXTS:
            raise Refuse(f"column {name} is {cell!r}; leave the cell empty where it is unknown")
        if name in ATTRIBUTES:
            attributes[name] = _truth(name, cell)
        elif _UNIT.fullmatch(name):
            units[name] = labels.number(cell, f"column {name}", 0, 5)
        else:
            found[name] = _value(name, cell)
    if attributes:
        found["attributes"] = attributes
    if units:
        found["action_units"] = units
    split = _one_of("split", values["split"], SPLITS) if values.get("split") else None
    return Row(values.get("subject") or None, split, found)


def _value(name: str, cell: str) -> Any:
    if name in NUMBERS:
        number = labels.number(cell, f"column {name}", *NUMBERS[name])
        if name != "skin_tone":
            return number
        if number != int(number):
            raise Refuse(f"column skin_tone is {cell}, not a whole number")
        return int(number)
    if name in TEXTS:
        return cell
    if name == "gender":
        return _one_of(name, cell, GENDERS)
    if name == "age_range":
        return _age_range(cell)
    if name in ("box", "landmarks"):
        return _pixels(name, cell)
    return _word(name, cell)


def _suggestion(name: str, header: list[str]) -> str:
    plain = re.sub(r"[\s-]+", "_", name).lower()
    if unit := re.fullmatch(r"au_?0*(\d+)(_r|_c)?", plain):
        return f"; action units are AU1 to AU64: did you mean 'AU{unit[1]}'?"
    known = {column.lower(): column for column in COLUMNS}
    meant = known.get(plain) or next((column for column, names in _MEANT.items() if plain in names), None)
    close = [meant] if meant else [known[match] for match in get_close_matches(plain, known, n=1, cutoff=0.75)]
    if close and close[0] not in header:
        return f"; did you mean '{close[0]}'?"
    return f"; there are {', '.join((*OTHERS, *TEXTS, *WORDS, *NUMBERS))}, AU1 to AU64, and attributes as Smiling"


def _truth(name: str, cell: str) -> bool:
    if cell.lower() not in TRUTH:
        raise Refuse(f"column {name} is {cell!r}, not 0 or 1 (true, false, yes, no; empty: unknown)")
    return TRUTH[cell.lower()]


def _one_of(name: str, cell: str, known: tuple[str, ...]) -> str:
    if cell.lower() not in known:
        raise Refuse(f"column {name} is {cell!r}, not one of {', '.join(known)}")
    return cell.lower()


def _word(name: str, cell: str) -> str:
    word = snake(cell)
    if not re.fullmatch(r"[^\W\d_]\w{0,63}", word):
        raise Refuse(f"column {name} is {cell[:40]!r}, not a word")
    if name == "expression" and word in _EXPRESSIONS:
        raise Refuse(f"column expression is {cell!r}; write {_EXPRESSIONS[word]}")
    return word


def _age_range(cell: str) -> str:
    ends = re.fullmatch(r"(\d{1,3})\s*(?:-\s*(\d{1,3})|\+)", cell, re.ASCII)
    if ends is None or (ends[2] and int(ends[1]) > int(ends[2])):
        raise Refuse(f"column age_range is {cell!r}, not a range as 20-29 or 70+")
    return f"{int(ends[1])}-{int(ends[2])}" if ends[2] else f"{int(ends[1])}+"


def _pixels(name: str, cell: str) -> list[float] | list[list[float]]:
    """Numbers of a cell, with or without brackets and commas: a box of four, or points."""
    parts = re.sub(r"[\[\](),;]", " ", cell).split()
    numbers = [labels.number(part, f"column {name}") for part in parts]
    if name == "landmarks":
        if not numbers or len(numbers) % 2:
            raise Refuse(f"column landmarks has {len(numbers)} numbers; points are pairs, as in '30 40 70 40'")
        return [list(pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]
    if len(numbers) != 4:
        raise Refuse(f"column box has {len(numbers)} numbers, not four: left top right bottom")
    if numbers[0] >= numbers[2] or numbers[1] >= numbers[3]:
        raise Refuse(f"column box is {cell!r}: left top right bottom, so right exceeds left and bottom exceeds top")
    return numbers
