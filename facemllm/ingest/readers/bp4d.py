"""BP4D-Spontaneous: 41 people in 8 tasks each, with action units coded frame by frame.

    AUCoding/AU_OCC/F001_T1.csv        first column the frame, then one column an action unit, named by its number
    2D+3D/F001/T1/2440.jpg             pictures by subject, task and frame; or under BP4D-training/, images/, img/, or
                                       at the root; zeros before the number do not matter (7.jpg, 0007.jpg)

Values: 1 present, 0 absent, 9 not coded (prior knowledge): such a unit is left out. `units: benchmark` keeps the twelve
that figures are published for (1, 2, 4, 6, 7, 10, 12, 14, 15, 17, 23, 24), `units: all` every numbered column.
Splits: `fold: 1|2|3` holds out one third of the people as test, after the lists that published work shares (printed in
ME-GraphAU's tools); validation is carved out of training by person. `fold: none` draws all splits by person.
`gender` is the letter of the subject's name. Crop: pictures are used as they are; published work aligns faces first.
`every: n` takes each n-th labelled frame of a task.
Refused: ragged and duplicate rows, values other than 0, 1 and 9, rows with no unit coded, frames with two pictures,
people in no fold, and pictures without a label row (most frames of the recordings were not coded).
Source: http://www.cs.binghamton.edu/~lijun/Research/3DFE/3DFE_Analysis.html; Zhang and others, IVC 2014.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from facemllm.errors import UserError
from facemllm.ingest import labels
from facemllm.ingest.reader import Face, Refuse, Refused
from facemllm.ingest.readers.choices import whole
from facemllm.ingest.readers.files import files, folders
from facemllm.ingest.readers.sequences import fold_split, numbered, only

KEY = "bp4d"
OPTIONS: dict[str, tuple[str, ...]] = {
    "fold": ("1", "2", "3", "none"),
    "units": ("benchmark", "all"),
    "every": (),
}
OFFICIAL = ("train", "test")

UNITS = ("1", "2", "4", "6", "7", "10", "12", "14", "15", "17", "23", "24")
HELD_OUT = {
    "1": "F004 F006 F007 F012 F014 F015 F017 F019 F021 M003 M006 M009 M015",
    "2": "F003 F005 F011 F013 F020 F022 M002 M005 M010 M011 M013 M016 M017 M018",
    "3": "F001 F002 F008 F009 F010 F016 F018 F023 M001 M004 M007 M008 M012 M014",
}
"""The people of the test split of each fold."""

GENDERS = {"F": "female", "M": "male"}
_PICTURES = ("2D+3D", "BP4D-training", "images", "img", ".")
_SUBJECT = re.compile(r"[FM]\d{3}")
_CODED = re.compile(r"([FM]\d{3})_(T\d{1,2})\.csv")


def read(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """Faces by subject, task and frame. Raises UserError when labels, a column or the pictures' folder are missing."""
    home = labels.existing(root, "AUCoding/AU_OCC", "AU_OCC", "AUCoding")
    pictures = _pictures(root)
    coded: dict[str, set[str]] = {}
    for name in files(home):
        found = _CODED.fullmatch(name)
        if found is None:
            yield Refused((home / name).relative_to(root).as_posix(), 0, "the name is not [subject]_[task].csv")
            continue
        coded.setdefault(found[1], set()).add(found[2])
        yield from _task(home / name, pictures / found[1] / found[2], root, options)
    if not coded:
        raise UserError(f"{home}: no label file named as F001_T1.csv")
    for subject in (name for name in folders(pictures) if _SUBJECT.fullmatch(name)):
        for task in folders(pictures / subject):
            if task not in coded.get(subject, ()):
                yield Refused(
                    (pictures / subject / task).relative_to(root).as_posix(), 0, "no label file for this task"
                )


def _pictures(root: Path) -> Path:
    for name in _PICTURES:
        if (root / name).is_dir() and any(map(_SUBJECT.fullmatch, folders(root / name))):
            return root / name
    raise UserError(f"{root}: no folders of subjects (F001, M001, ...) here, nor in {', '.join(_PICTURES[:-1])}")


def _task(path: Path, folder: Path, root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    subject, task = folder.parent.name, folder.name
    name = path.relative_to(root).as_posix()
    pictures = numbered(folder)
    wanted = UNITS if options["units"] == "benchmark" else ()
    seen: set[int] = set()
    step = whole(options, "every", 1)
    for row in labels.table(path, root, _frame_column(path), wanted):
        if isinstance(row, Refused):
            yield row
            continue
        line, values = row
        try:
            frame = _frame(next(iter(values.values())))
            if frame in seen:
                raise Refuse(f"frame {frame} has a row already")
            seen.add(frame)
            split = fold_split(subject, options["fold"], HELD_OUT)
            units = _units({unit: values[unit] for unit in wanted or values if unit.isdecimal() and unit != "0"})
            picture = folder / only(pictures.get(frame, [f"{frame}.jpg"]), frame)
        except Refuse as error:
            yield Refused(name, line, str(error))
            continue
        if (len(seen) - 1) % step:
            continue
        yield Face(
            file=picture.relative_to(root).as_posix(),
            row=line,
            source_id=f"{subject}/{task}/{picture.stem}",
            image=picture,
            subject=subject,
            split=split,
            labels={"action_units": units, "gender": GENDERS[subject[0]]},
        )
    for frame, found in pictures.items():
        if frame not in seen:
            for each in found:
                yield Refused((folder / each).relative_to(root).as_posix(), 0, f"no label row in {path.name}")


def _frame_column(path: Path) -> str:
    """Name of the first column: "0" in the files that were seen."""
    for _, first in labels.lines(path):
        return next(csv.reader([first]))[0].strip()
    raise UserError(f"{path}: empty; a header line was expected")


def _frame(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise Refuse(f"the frame is {text!r}, not a whole number")
    return int(text)


def _units(values: Mapping[str, str]) -> dict[str, float]:
    if wrong := {unit: text for unit, text in values.items() if text not in ("0", "1", "9")}:
        raise Refuse("; ".join(f"AU{unit} is {text!r}, not 0, 1 or 9" for unit, text in wrong.items()))
    units = {f"AU{unit}": float(text) for unit, text in values.items() if text != "9"}
    if not units:
        raise Refuse("no action unit is coded")
    return units
