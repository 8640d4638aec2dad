"""BP4D-Spontaneous and DISFA: people recorded on video, action units coded frame by frame.

BP4D: 41 people in 8 tasks each, units present or absent
    AUCoding/AU_OCC/F001_T1.csv        first column the frame, then one column an action unit, named by its number
    2D+3D/F001/T1/2440.jpg             pictures by subject, task and frame; or under BP4D-training/, images/, img/, or
                                       at the root; zeros before the number do not matter (7.jpg, 0007.jpg)
Values: 1 present, 0 absent, 9 not coded (prior knowledge): such a unit is left out. `units: benchmark` keeps the twelve
that figures are published for (1, 2, 4, 6, 7, 10, 12, 14, 15, 17, 23, 24), `units: all` every numbered column.
`gender` is the letter of the subject's name. Refused: ragged and duplicate rows, values other than 0, 1 and 9, rows
with no unit coded, frames with two pictures, and pictures without a label row (most frames were not coded).
Source: http://www.cs.binghamton.edu/~lijun/Research/3DFE/3DFE_Analysis.html; Zhang and others, IVC 2014.

DISFA: 27 people watching a film, the intensity of twelve units coded in every frame
    ActionUnit_Labels/SN001/SN001_au1.txt ... SN001_au26.txt     rows `frame,intensity`, intensity 0 to 5
    Videos_LeftCamera/SN001/0.png ...                            pictures taken out of the videos, numbered from 0
Pictures are looked for in a folder of the camera (Videos_LeftCamera, LeftCamera, left; the same with Right), else in
images/, img/ or at the root; a person's folder may be named SN001 or as the video (LeftVideoSN001_comp).
`camera: left|right` chooses; a tree without folders of cameras is taken as it is.
Off by one: labels count frames from 1 (prior knowledge), pictures from 0 (so in ME-GraphAU's tools, which pair the n-th
row with picture n-1). Hence `frame_offset: -1` by default: picture = frame - 1. Set 0 where both count alike. When the
pictures of a person are all there but shifted against the labels, the import stops and says so.
Intensities are kept as 0 to 5; published figures count 2 and more as present. `units: benchmark` keeps the eight units
of published figures (1, 2, 4, 6, 9, 12, 25, 26), `units: all` the twelve.
Refused: ragged and duplicate rows, intensities other than 0 to 5, pictures without a label row.
Source: http://mohammadmahoor.com/disfa/; Mavadati and others, IEEE TAC 2013.

Both: `fold: 1|2|3` holds out a third of the people as test, after the lists that published work shares (printed in
ME-GraphAU's tools); validation is carved out of training by person. `fold: none` draws all splits by person; people in
no fold are refused. `every: n` takes each n-th labelled frame. Crop: pictures are used as they are; published work
aligns faces first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from facemllm.errors import UserError
from facemllm.ingest import labels
from facemllm.ingest.reader import PICTURES, Face, Reader, Refuse, Refused, faces, files, folders, whole

BP4D_UNITS = ("1", "2", "4", "6", "7", "10", "12", "14", "15", "17", "23", "24")
DISFA_UNITS = {"benchmark": (1, 2, 4, 6, 9, 12, 25, 26), "all": (1, 2, 4, 5, 6, 9, 12, 15, 17, 20, 25, 26)}
BP4D_HELD_OUT = {
    "1": "F004 F006 F007 F012 F014 F015 F017 F019 F021 M003 M006 M009 M015",
    "2": "F003 F005 F011 F013 F020 F022 M002 M005 M010 M011 M013 M016 M017 M018",
    "3": "F001 F002 F008 F009 F010 F016 F018 F023 M001 M004 M007 M008 M012 M014",
}
"""The people of the test split of each fold."""
DISFA_HELD_OUT = {
    "1": "SN003 SN004 SN005 SN007 SN008 SN017 SN023 SN025 SN029",
    "2": "SN006 SN011 SN012 SN013 SN018 SN021 SN024 SN028 SN031",
    "3": "SN001 SN002 SN009 SN010 SN016 SN026 SN027 SN030 SN032",
}
_CAMERAS = {side.lower(): (f"Videos_{side}Camera", f"{side}Camera", side.lower()) for side in ("Left", "Right")}
_PERSON = re.compile(r"SN\d{3}")
_ROW = re.compile(r"\s*(\d{1,9})\s*,\s*([0-5])(?:\.0*)?\s*", re.ASCII)

GENDERS = {"F": "female", "M": "male"}
_PICTURES = ("2D+3D", "BP4D-training", "images", "img", ".")
_SUBJECT = re.compile(r"[FM]\d{3}")
_CODED = re.compile(r"([FM]\d{3})_(T\d{1,2})\.csv")
Frames = dict[int, tuple[int, dict[str, float]]]
"""Frame -> line of its first row, and its action units."""


def read_bp4d(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """Faces by subject, task and frame. Raises UserError when labels, a column or the pictures' folder are missing."""
    home = labels.existing(root, "AUCoding/AU_OCC", "AU_OCC", "AUCoding")
    pictures = _subjects(root)
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
                file = (pictures / subject / task).relative_to(root).as_posix()
                yield Refused(file, 0, "no label file for this task")


def _subjects(root: Path) -> Path:
    for name in _PICTURES:
        if (root / name).is_dir() and any(map(_SUBJECT.fullmatch, folders(root / name))):
            return root / name
    raise UserError(f"{root}: no folders of subjects (F001, M001, ...) here, nor in {', '.join(_PICTURES[:-1])}")


def _task(path: Path, folder: Path, root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    subject, task = folder.parent.name, folder.name
    pictures = numbered(folder)
    wanted = BP4D_UNITS if options["units"] == "benchmark" else ()
    seen: set[int] = set()
    step = whole(options, "every", 1)

    def face(line: int, values: Mapping[str, str]) -> Face | None:
        frame = _frame(next(iter(values.values())))
        if frame in seen:
            raise Refuse(f"frame {frame} has a row already")
        seen.add(frame)
        split = fold_split(subject, options["fold"], BP4D_HELD_OUT)
        units = _units({unit: values[unit] for unit in wanted or values if unit.isdecimal() and unit != "0"})
        picture = folder / only(pictures.get(frame, [f"{frame}.jpg"]), frame)
        if (len(seen) - 1) % step:
            return None
        own, facts = f"{subject}/{task}/{picture.stem}", {"action_units": units, "gender": GENDERS[subject[0]]}
        return Face(source_id=own, image=picture, subject=subject, split=split, labels=facts)

    yield from faces(labels.table(path, root, None, wanted), path.relative_to(root).as_posix(), face)
    for frame, found in pictures.items():
        if frame not in seen:
            for each in found:
                yield Refused((folder / each).relative_to(root).as_posix(), 0, f"no label row in {path.name}")


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


def read_disfa(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """Faces person by person. Raises UserError when labels, a label file or the chosen camera are missing, or pictures
    and labels are shifted against each other."""
    home = labels.existing(root, "ActionUnit_Labels")
    people = [name for name in folders(home) if _PERSON.fullmatch(name)]
    if not people:
        raise UserError(f"{home}: no folders of people (SN001, ...)")
    pictures, camera = _camera(root, options["camera"])
    for person in people:
        yield from _person(home / person, pictures, camera, root, options)


def _camera(root: Path, camera: str) -> tuple[Path, str]:
    """The folder that holds people's pictures, and the camera; empty where the tree has no folders of cameras."""
    for name in _CAMERAS[camera]:
        if (root / name).is_dir():
            return root / name, camera
    others = [name for names in _CAMERAS.values() for name in names if (root / name).is_dir()]
    if others:
        raise UserError(f"{root}: {others[0]} is there but none of {', '.join(_CAMERAS[camera])}; see option camera")
    return labels.existing(root, "images", "img", "."), ""


def _person(
    home: Path, pictures: Path, camera: str, root: Path, options: Mapping[str, str]
) -> Iterator[Face | Refused]:
    person = home.name
    folder = pictures / person
    if not folder.is_dir():
        folder = next((pictures / name for name in folders(pictures) if person in name), folder)
    frames: Frames = {}
    numbers = DISFA_UNITS[options["units"]]
    for unit in numbers:
        yield from _unit(home / f"{person}_au{unit}.txt", f"AU{unit}", root, frames)
    first = (home / f"{person}_au{numbers[0]}.txt").relative_to(root).as_posix()
    found = numbered(folder)
    offset = int(options["frame_offset"])
    _check_shift(person, frames, found, offset)
    for frame in sorted(frames)[:: whole(options, "every", 1)]:
        line, units = frames[frame]
        try:
            if frame + offset < 0:
                raise Refuse(f"frame {frame} with frame_offset {offset} has no picture")
            picture = folder / only(found.get(frame + offset, [f"{frame + offset}.png"]), frame + offset)
            split = fold_split(person, options["fold"], DISFA_HELD_OUT)
        except Refuse as error:
            yield Refused(first, line, str(error))
            continue
        own, facts = "/".join(filter(None, (camera, person, picture.stem))), {"action_units": units}
        yield Face(row=line, source_id=own, image=picture, subject=person, split=split, labels=facts)
    for number, names in found.items():
        for name in names if number - offset not in frames else ():
            file = (folder / name).relative_to(root).as_posix()
            yield Refused(file, 0, f"no label row for frame {number - offset}")


def _unit(path: Path, unit: str, root: Path, frames: Frames) -> Iterator[Refused]:
    """Add a unit's intensities to `frames`; yields the rows that cannot be used."""
    if not path.is_file():
        raise UserError(f"{path} is missing; every person has one file an action unit")
    name = path.relative_to(root).as_posix()
    for line, text in labels.lines(path):
        row = _ROW.fullmatch(text)
        if row is None:
            yield Refused(name, line, f"{text.strip()[:80]!r} is not a frame, a comma and an intensity of 0 to 5")
            continue
        _, units = frames.setdefault(int(row[1]), (line, {}))
        if unit in units:
            yield Refused(name, line, f"frame {row[1]} has a row already")
        else:
            units[unit] = float(row[2])


def _check_shift(person: str, frames: Frames, found: Mapping[int, list[str]], offset: int) -> None:
    """Raises UserError when labels and pictures are equally long runs that only another offset brings together."""
    if not frames or not found:
        return
    low, high = min(found) - min(frames), max(found) - max(frames)
    if low == high != offset and max(found) > min(found):
        raise UserError(
            f"{person}: labels count frames from {min(frames)} to {max(frames)}, pictures from {min(found)} to "
            f"{max(found)}; frame_offset: {offset} does not fit, {low} would (see the options of disfa)"
        )


def numbered(folder: Path) -> dict[int, list[str]]:
    """Names of the pictures in a folder by frame number, in its order; `7.jpg` and `0007.jpg` are both frame 7.

    A folder that is not there holds none. Raises UserError when it cannot be listed.
    """
    found: dict[int, list[str]] = {}
    for name in files(folder) if folder.is_dir() else ():
        stem, suffix = Path(name).stem, Path(name).suffix.lower()
        if suffix in PICTURES and stem.isascii() and stem.isdecimal() and len(stem) < 10:
            found.setdefault(int(stem), []).append(name)
    return dict(sorted(found.items()))


def fold_split(person: str, fold: str, held_out: Mapping[str, str]) -> str | None:
    """`test` for the people held out in a fold, `train` for those of the others; None (to be drawn) for fold `none`.

    `held_out` names the people of each fold, between blanks. Raises Refuse for somebody whom no fold holds out.
    """
    if fold == "none":
        return None
    if person in held_out[fold].split():
        return "test"
    if not any(person in people.split() for people in held_out.values()):
        raise Refuse(f"{person} is in no fold; set the option fold: none")
    return "train"


def only(names: list[str], frame: int) -> str:
    """The name of a frame's one picture. Raises Refuse when it has several."""
    if len(names) > 1:
        raise Refuse(f"frame {frame} has {len(names)} pictures: {', '.join(names)}")
    return names[0]


_OPTIONS: dict[str, tuple[str, ...]] = {"fold": ("1", "2", "3", "none"), "units": ("benchmark", "all")}
_DISFA = {"camera": ("left", "right"), "frame_offset": ("-1", "0")}
READERS = {
    "bp4d": Reader(read_bp4d, {**_OPTIONS, "every": ()}, ("train", "test")),
    "disfa": Reader(read_disfa, {**_OPTIONS, **_DISFA, "every": ()}, ("train", "test")),
}
