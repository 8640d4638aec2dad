"""The light columns of a faces table that the suites look at, derived in one pass over it.

Image bytes are hashed and decoded in a few threads and dropped; what stays of a row is a few strings, numbers and truth
values, about 0.8 KB of frame.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from sys import intern
from typing import TYPE_CHECKING, Any

from facemllm.core import digests, images, progress
from facemllm.settings import Validate
from facemllm.tables import FACES, Table, mapping
from facemllm.tables.schemas import SEGMENTATION
from facemllm.validate.memory import Labels, Originals, Tallies
from facemllm.validate.suites import CONTRADICTIONS
from facemllm.version.ledger import Entry

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from PIL.Image import Image

Size = tuple[int | None, int | None]
"""Stated width and height."""

_THREADS = 2
_KEPT = ("image_id", "source", "subject_id", "split", "expression", "age", "gender", "ethnicity", "skin_tone")
_ANGLES = ("yaw", "pitch", "roll")
_REPEATED = frozenset({"source", "subject_id", "split", "expression", "gender", "ethnicity"})
_USE = {"train": "train", "validation": "evaluate", "test": "evaluate"}


def raw_frame(table: Table, quality: Validate, ledger: Mapping[str, Entry], originals: Originals) -> pd.DataFrame:
    """One light row a raw face; what each says is remembered in `originals`."""

    def rows() -> Iterator[dict[str, Any]]:
        for row, pixels, mask in _with_pixels(table, "checking raw faces", None):
            originals.add(row, mask)
            yield _face(row, quality) | pixels

    return _framed(rows(), ledger)


def annotated_frame(
    table: Table,
    quality: Validate,
    ledger: Mapping[str, Entry],
    originals: Originals | None,
    labels: Labels,
    tallies: Tallies,
) -> pd.DataFrame:
    """One light row an annotated face, held against the raw faces if there are any; what each says is remembered in
    `labels`."""

    def rows() -> Iterator[dict[str, Any]]:
        for number, (row, pixels, mask) in enumerate(_with_pixels(table, "checking annotated faces", originals)):
            labels.add(row, mask)
            yield _face(row, quality) | pixels | _attributes(row, tallies) | _caption(number, row, tallies)

    return _framed(rows(), ledger)


def _with_pixels(
    table: Table, what: str, originals: Originals | None
) -> Iterator[tuple[dict[str, Any], dict[str, Any], bytes | None]]:
    """Rows without their images, what the pixels tell and how they agree with the raw row, and the segmentation."""
    columns = [name for name in FACES.names if name != "provenance"]
    done = 0
    with progress.bar(what, table.rows) as bar, ThreadPoolExecutor(_THREADS) as pool:
        for batch in table.batches(columns):
            encoded, masks = _encoded(batch, "image"), _encoded(batch, "segmentation")
            rows = batch.drop_columns(["image", "segmentation"]).to_pylist()
            agree = [_agreement(originals, row, mask) for row, mask in zip(rows, masks, strict=True)]
            pixels = pool.map(_derived, rows, encoded, masks, agree)
            yield from zip(rows, pixels, masks, strict=True)
            done += len(rows)
            bar.update(done)


def _encoded(batch: pa.RecordBatch, column: str) -> list[bytes | None]:
    return [None if image is None else image["bytes"] or b"" for image in batch.column(column).to_pylist()]


def _agreement(originals: Originals | None, row: Mapping[str, Any], mask: bytes | None) -> dict[str, Any]:
    if originals is None:
        return {}
    changed = originals.changed(row, mask)
    if changed is None:
        return {"in_raw": False, "identity_kept": None, "labels_kept": None, "changed": ""}
    identity, labels = changed
    what = ", ".join([*identity, *labels])
    return {"in_raw": True, "identity_kept": not identity, "labels_kept": not labels, "changed": what}


def _derived(
    row: Mapping[str, Any], encoded: bytes | None, mask: bytes | None, agree: Mapping[str, Any]
) -> dict[str, Any]:
    size, known = (row["width"], row["height"]), bool(agree.get("in_raw"))
    picture = _of_picture(row["image_id"], encoded or b"", size, known=known)
    same_mask = known and "segmentation" not in agree["changed"]
    return picture | _of_segmentation(mask, size, known=same_mask) | dict(agree)


def _of_picture(image_id: str | None, encoded: bytes, size: Size, *, known: bool) -> dict[str, Any]:
    """Derived columns of a face's picture. `known` pictures were decoded when an earlier table was checked: of these
    only the bytes are compared with their name. Runs in a thread: hashing and decoding let the others work."""
    picture = None if known else _decoded(encoded)
    return {
        "digest_matches": digests.of_bytes(encoded) == image_id,
        "decodes": None if known else picture is not None,
        "size_matches": None if picture is None else picture.size == size,
        "looks": None if picture is None else images.perceptual_hash(picture),
    }


def _of_segmentation(encoded: bytes | None, size: Size, *, known: bool) -> dict[str, Any]:
    """Derived columns of a segmentation; nulls where there is none, or where an earlier table had the very same."""
    drawn = None if encoded is None or known else _decoded(encoded)
    highest: Any = None if drawn is None else drawn.getextrema()[1]
    fits = drawn is not None and drawn.mode in ("L", "P") and isinstance(highest, int | float)
    return {
        "segmentation_decodes": None if encoded is None or known else drawn is not None,
        "segmentation_matches_size": None if drawn is None else drawn.size == size,
        "segmentation_classes_ok": None if drawn is None else fits and highest < len(SEGMENTATION),
    }


def _decoded(encoded: bytes) -> Image | None:
    """The picture as it is stored, neither turned nor converted; None if it may not or cannot be opened."""
    try:
        picture = images.checked(encoded)
        picture.load()
    except Exception:  # broken data can raise almost anything from a decoder
        return None
    return picture


def _face(row: Mapping[str, Any], quality: Validate) -> dict[str, Any]:
    width, height = row["width"] or 0, row["height"] or 0
    box, landmarks = row["box"], row["landmarks"]
    corners = [box[0:2], box[2:4]] if box and len(box) == 4 else None
    numbers = [row["age"], *(row[a] for a in _ANGLES), *(box or ()), *(x for point in landmarks or () for x in point)]
    units, least = mapping(row["action_units"]), quality.min_box_pixels
    return {
        **{name: row[name] for name in (*_KEPT, *_ANGLES)},
        "numbers_finite": all(math.isfinite(x) for x in numbers if x is not None),
        "box_inside": None if box is None else corners is not None and _inside(corners, width, height),
        "box_large": None if corners is None else min(high - low for low, high in zip(*corners, strict=True)) >= least,
        "landmarks_inside": None if landmarks is None else _inside(landmarks, width, height),
        "action_units_ok": all(re.fullmatch(r"AU\d+", n) and v is not None and 0 <= v <= 5 for n, v in units.items())
        if units
        else None,
    }


def _attributes(row: Mapping[str, Any], tallies: Tallies) -> dict[str, Any]:
    attributes = mapping(row["attributes"])
    tallies.attributes.update((name, value) for name, value in attributes.items() if value is not None)
    clashes = [f"{a} and {b}" for a, b in CONTRADICTIONS if attributes.get(a) and attributes.get(b)]
    tallies.exclusive.update(clashes)
    return {"attributes_agree": not clashes if attributes else None, "clashes": ", ".join(clashes)}


def _caption(number: int, row: Mapping[str, Any], tallies: Tallies) -> dict[str, Any]:
    from facemllm.tasks.caption import disagreements

    if not (row["caption"] or "").strip():
        return {"has_caption": False, "caption_agrees": None, "disagreements": ""}
    said = []
    for item, (stated, labelled) in disagreements(row).items():
        said.append(f"{item}: the caption says {stated}, the label {labelled}")
        tallies.disagreements[item] += 1
        tallies.first.setdefault(
            item, f"says {stated}, labelled {labelled} (row {number}, image {str(row['image_id'])[:12]})"
        )
    return {"has_caption": True, "caption_agrees": not said, "disagreements": "; ".join(said)}


def _inside(points: Iterable[Sequence[float]], width: int, height: int) -> bool:
    return all(len(p) >= 2 and 0 <= p[0] <= width and 0 <= p[1] <= height for p in points)


def _framed(rows: Iterable[Mapping[str, Any]], ledger: Mapping[str, Entry]) -> pd.DataFrame:
    import pandas as pd

    frame = framed(rows)
    if frame.empty:
        return pd.DataFrame(columns=["row", *_KEPT, *_ANGLES])
    frame["subject_in_one_split"] = in_one_split(frame, "subject_id")
    frame["alike_in_one_split"] = in_one_split(frame, "looks")
    allowed = {
        (key, split): None if entry.status == "withdrawn" else use in entry.uses
        for key, entry in ledger.items()
        for split, use in _USE.items()
    }
    pairs = zip(frame["source"], frame["split"], strict=True)
    frame["terms_allow_use"] = pd.Series([allowed.get(pair) for pair in pairs], dtype=object)
    return frame.drop(columns="looks")


def framed(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows, all with the same keys, as a data frame with their numbers; gathered by column, since dictionaries are
    heavy."""
    import pandas as pd

    columns: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in row.items():
            # a few words make up most columns: held once, not once a row
            columns.setdefault(name, []).append(intern(value) if name in _REPEATED and value is not None else value)
    frame = pd.DataFrame(columns)
    frame.insert(0, "row", range(len(frame)))
    return frame


def in_one_split(frame: pd.DataFrame, column: str) -> Any:
    """Whether rows that share a value of `column` share a split; null where the value is null."""
    counts = frame.groupby(column)["split"].transform("nunique")
    return (counts == 1).astype(object).where(frame[column].notna(), None)
