"""CelebA: 202,599 pictures of some 10,000 celebrities with 40 attributes.

    Img/img_align_celeba/000001.jpg        or img_align_celeba/, also doubly nested as a CSV re-pack leaves it
    Img/img_celeba/000001.jpg              or img_celeba/, for `pictures: wild`
    Anno/list_attr_celeba.txt              count, 40 names, then `000001.jpg -1  1 ...` with runs of blanks
    Anno/identity_CelebA.txt               optional, `000001.jpg 2880`: subjects
    Anno/list_landmarks_align_celeba.txt   optional, five points; list_landmarks_celeba.txt for `wild`
    Anno/list_bbox_celeba.txt              for `wild`: x_1 y_1 width height
    Eval/list_eval_partition.txt           `000001.jpg 0`: 0 train, 1 validation, 2 test

Label files may lie in Anno/, in Eval/ or right in the root, as .txt or, but for identities, as .csv with `image_id`.
Attributes are -1/1 or 0/1, never both in a file.

Crop: `pictures: aligned` takes the aligned pictures as they are (178 x 218 in the release); `wild` crops the pictures
to list_bbox_celeba, which refers to the wild ones only. Landmarks are eyes, nose and mouth corners, "left" being the
image's left. `Male` also gives gender, as annotated.

Refused: ragged and duplicate rows, a value that is neither of the file's two, a picture without a split or (wild)
without a box of positive size, a partition row of a picture without attributes, a picture without a label row, a wrong
count in line 1. A damaged row of an optional file is refused alone: the face stays, without what it would have said.

Source: Liu et al., Deep Learning Face Attributes in the Wild, ICCV 2015, and torchvision's `CelebA`; that left is the
image's left is our reading of the published points, the size of aligned pictures is prior knowledge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from facemllm.ingest import labels
from facemllm.ingest.reader import Box, Face, Refuse, Refused
from facemllm.ingest.readers import attributes, pictures
from facemllm.ingest.readers.celeba_files import PARTITION, Beside, find, needed, pairs, sheet, split, subjects

KEY = "celeba"
OPTIONS: Mapping[str, tuple[str, ...]] = {"pictures": ("aligned", "wild")}
OFFICIAL = ("train", "validation", "test")

POINTS = tuple(f"{part}_{axis}" for part in ("lefteye", "righteye", "nose", "leftmouth", "rightmouth") for axis in "xy")
BOX = ("x_1", "y_1", "width", "height")
_FAR = 100_000  # pixels; no picture that is read is as wide


def read(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """One face a row of list_attr_celeba, in its order, then what is left over.

    Raises UserError when a label file or the folder of pictures is missing or has not the stated form.
    """
    wild = options["pictures"] == "wild"
    base = "img_celeba" if wild else "img_align_celeba"
    place = pictures.folder(root, f"Img/{base}", base)
    inside = place.relative_to(root).as_posix()
    main = sheet(needed(root, "list_attr_celeba"), root)
    names = attributes.named(main.path, main.line, main.columns, attributes.CELEBA)
    others = _others(root, wild)
    required = ("split", "box") if wild else ("split",)
    coding, labelled = attributes.Coding(), pictures.Names()
    for row in main.rows:
        if isinstance(row, Refused):
            yield row
            continue
        line, name, values = row
        labelled.add(f"{inside}/{name}")
        found = {key: other.find(name) for key, other in others.items()}
        for other in others.values():
            yield from other.refused()
        damaged = {key: value for key, value in found.items() if isinstance(value, Refused)}
        yield from damaged.values()
        if any(key in damaged for key in required):
            continue
        given: dict[str, Any] = {key: value for key, value in found.items() if value is not None and key not in damaged}
        try:
            path = labels.inside(place, name)
            columns = attributes.labels(coding.truths(names, values))
            if missing := [others[key].name for key in required if key not in given]:
                raise Refuse(f"{name} has no row in {' and '.join(missing)}")
        except Refuse as error:
            yield Refused(main.name, line, str(error))
            continue
        yield Face(
            file=path.relative_to(root).as_posix(),
            row=line,
            source_id=path.stem,
            image=path,
            subject=given.get("subject"),
            split=given["split"],
            crop=given.get("box"),
            labels=columns | {key: given[key] for key in ("landmarks", "box") if key in given},
        )
    for key, other in others.items():
        for left in other.rest():
            if isinstance(left, Refused):
                yield left
            elif key == "split":
                yield Refused(other.name, left[0], f"{left[1]} has no usable row in {main.name}")
    yield from pictures.unlabelled(root, place, labelled)


def _others(root: Path, wild: bool) -> dict[str, Beside[Any]]:
    """The files beside the attributes, by what they give. Raises UserError when one that is needed is missing."""
    found: dict[str, Beside[Any]] = {"split": Beside(pairs(needed(root, PARTITION), root, "partition"), split)}
    if persons := subjects(root, root):
        found["subject"] = persons
    if path := find(root, "list_landmarks_celeba" if wild else "list_landmarks_align_celeba"):
        found["landmarks"] = Beside(sheet(path, root, POINTS), _points)
    if wild:
        found["box"] = Beside(sheet(needed(root, "list_bbox_celeba"), root, BOX), _box)
    return found


def _points(row: Mapping[str, str]) -> list[list[float]]:
    """The five points (x, y), in the order of `POINTS`. Raises Refuse when one is no number of pixels."""
    flat = [labels.number(row[name], name, -_FAR, _FAR) for name in POINTS]
    return [[x, y] for x, y in zip(flat[::2], flat[1::2], strict=True)]


def _box(row: Mapping[str, str]) -> Box:
    """left, top, right, bottom. Raises Refuse when the box has no area."""
    left, top = (labels.number(row[name], name, -_FAR, _FAR) for name in BOX[:2])
    width, height = (labels.number(row[name], name, 1, _FAR) for name in BOX[2:])
    return left, top, left + width, top + height
