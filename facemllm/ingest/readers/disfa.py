"""DISFA: 27 people watching a film, the intensity of twelve action units coded in every frame.

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
Splits: `fold: 1|2|3` holds out nine people as test, after the lists that published work shares (printed in ME-GraphAU's
tools); validation is carved out of training by person. `fold: none` draws all splits by person.
`every: n` takes each n-th frame. Crop: pictures are used as they are; published work aligns faces first.
Refused: ragged and duplicate rows, intensities other than 0 to 5, pictures without a label row, people in no fold.
Source: http://mohammadmahoor.com/disfa/; Mavadati and others, IEEE TAC 2013.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from facemllm.errors import UserError
from facemllm.ingest import labels
from facemllm.ingest.reader import Face, Refuse, Refused
from facemllm.ingest.readers.choices import whole
from facemllm.ingest.readers.files import folders
from facemllm.ingest.readers.sequences import fold_split, numbered, only

KEY = "disfa"
OPTIONS: dict[str, tuple[str, ...]] = {
    "fold": ("1", "2", "3", "none"),
    "units": ("benchmark", "all"),
    "camera": ("left", "right"),
    "frame_offset": ("-1", "0"),
    "every": (),
}
OFFICIAL = ("train", "test")

UNITS = {"benchmark": (1, 2, 4, 6, 9, 12, 25, 26), "all": (1, 2, 4, 5, 6, 9, 12, 15, 17, 20, 25, 26)}
HELD_OUT = {
    "1": "SN003 SN004 SN005 SN007 SN008 SN017 SN023 SN025 SN029",
    "2": "SN006 SN011 SN012 SN013 SN018 SN021 SN024 SN028 SN031",
    "3": "SN001 SN002 SN009 SN010 SN016 SN026 SN027 SN030 SN032",
}
"""The people of the test split of each fold."""

_CAMERAS = {
    "left": ("Videos_LeftCamera", "LeftCamera", "left"),
    "right": ("Videos_RightCamera", "RightCamera", "right"),
}
_PERSON = re.compile(r"SN\d{3}")
_ROW = re.compile(r"\s*(\d{1,9})\s*,\s*([0-5])(?:\.0*)?\s*", re.ASCII)

Frames = dict[int, tuple[int, dict[str, float]]]
"""Frame -> line of its first row, and its action units."""


def read(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """Faces person by person. Raises UserError when labels, a label file or the chosen camera are missing, or pictures
    and labels are shifted against each other."""
    home = labels.existing(root, "ActionUnit_Labels")
    people = [name for name in folders(home) if _PERSON.fullmatch(name)]
    if not people:
        raise UserError(f"{home}: no folders of people (SN001, ...)")
    pictures, camera = _pictures(root, options["camera"])
    for person in people:
        yield from _person(home / person, pictures, camera, root, options)


def _pictures(root: Path, camera: str) -> tuple[Path, str]:
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
    numbers = UNITS[options["units"]]
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
            split = fold_split(person, options["fold"], HELD_OUT)
        except Refuse as error:
            yield Refused(first, line, str(error))
            continue
        yield Face(
            file=picture.relative_to(root).as_posix(),
            row=line,
            source_id="/".join(filter(None, (camera, person, picture.stem))),
            image=picture,
            subject=person,
            split=split,
            labels={"action_units": units},
        )
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
