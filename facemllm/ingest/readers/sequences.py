"""What the readers of recorded people share: frames by number, and folds by person."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from facemllm.ingest.reader import Refuse
from facemllm.ingest.readers.files import PICTURES, files


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
