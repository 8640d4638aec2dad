"""Emo135: pictures of 135 emotions.

How its files lie on disk is not public; this reads the generic form, one folder an emotion, with or without folders of
splits above:

    grief/0001.jpg
    train/grief/0001.jpg    val/grief/0002.jpg    test/grief/0003.jpg

A folder's name becomes the expression in snake_case, a leading number left out ("012. Self-pity" is self_pity). Splits:
the folders train, val (or valid, validation) and test where all top folders are such; else none, and drawn by picture,
since people are unknown. Validation is carved out of train. Crop: pictures are used as they are.
Refused: files outside the folder of an emotion; folders inside one. `source_id` is the path without its ending.
Source: "135-class emotional facial expression dataset", IEEE DataPort; Chen and others, IEEE TAFFC 2022,
doi 10.1109/TAFFC.2022.3201290. Unverified: the layout as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from facemllm.errors import UserError
from facemllm.ingest.reader import PICTURES, Face, Reader, Refused, folders, listing, snake

SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}


def read(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """Faces, emotion by emotion. Raises UserError when no folder is there."""
    tops = folders(root)
    if not tops:
        raise UserError(f"{root}: no folder in it; Emo135 is read as one folder an emotion, as in grief/0001.jpg")
    split = all(name.lower() in SPLITS for name in tops)
    yield from _strays(root, root)
    for top in tops:
        if not split:
            yield from _emotion(root, root / top, None)
            continue
        yield from _strays(root, root / top)
        for name in folders(root / top):
            yield from _emotion(root, root / top / name, SPLITS[top.lower()])


READERS = {"emo135": Reader(read, official=("train", "test"))}


def _strays(root: Path, folder: Path) -> Iterator[Refused]:
    for name in listing(folder):
        if not (folder / name).is_dir():
            yield Refused((folder / name).relative_to(root).as_posix(), 0, "not in the folder of an emotion")


def _emotion(root: Path, folder: Path, split: str | None) -> Iterator[Face | Refused]:
    expression = snake(re.sub(r"^\d+(?=\D)", "", folder.name))
    for name in listing(folder):
        picture = folder / name
        file = picture.relative_to(root).as_posix()
        if picture.is_dir():
            yield Refused(file, 0, "a folder inside the folder of an emotion")
        elif not expression or expression.isdigit():
            yield Refused(file, 0, f"the folder {folder.name!r} names no emotion")
        elif picture.suffix.lower() not in PICTURES:
            yield Refused(file, 0, f"not a picture by its name ({', '.join(PICTURES)})")
        else:
            stem = picture.relative_to(root).with_suffix("").as_posix()
            yield Face(file=file, source_id=stem, image=picture, split=split, labels={"expression": expression})
