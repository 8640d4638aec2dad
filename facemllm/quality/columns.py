"""The light columns that the suites look at, derived from streamed tables.

One pass over each table: image bytes are hashed and decoded in a few threads and dropped; what stays of a row is a few
strings, numbers and truth values, so memory is that of one batch plus about 1 KB a face.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from facemllm import digests, progress
from facemllm.quality.suites import CLOSED_FORMS, CONTRADICTIONS, SEGMENTATION_CLASSES
from facemllm.records import Table, mapping

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MAX_PIXELS = 64_000_000
_THREADS = 2
_KEPT = ("image_id", "source", "subject_id", "split", "expression", "age", "gender", "ethnicity", "skin_tone")
_ANGLES = ("yaw", "pitch", "roll")


@dataclass
class Tallies:
    """Counts for the report, taken while streaming."""

    attributes: Counter[tuple[str, bool]] = field(default_factory=Counter)
    contradictions: Counter[str] = field(default_factory=Counter)
    questions: Counter[tuple[str, str]] = field(default_factory=Counter)
    answers: Counter[tuple[str, str, str]] = field(default_factory=Counter)


def faces_frame(table: Table, min_box_pixels: int, tallies: Tallies) -> pd.DataFrame:
    """One light row a face; see `suites.py` for what each derived column means."""
    import pandas as pd

    columns = [
        *_KEPT,
        *_ANGLES,
        "image",
        "width",
        "height",
        "box",
        "landmarks",
        "segmentation",
        "caption",
        "attributes",
    ]
    columns.append("action_units")
    frames = []
    with progress.bar("checking faces", table.rows) as bar, ThreadPoolExecutor(_THREADS) as pool:
        for batch in table.batches(columns):
            images, maps = _encoded(batch, "image"), _encoded(batch, "segmentation")
            rows = batch.drop_columns(["image", "segmentation"]).to_pylist()
            seen = pool.map(_look, rows, images, maps)
            frames.append(
                pd.DataFrame(
                    [_face(row, looks, min_box_pixels, tallies) for row, looks in zip(rows, seen, strict=True)]
                )
            )
            bar.update(sum(map(len, frames)))
    if not frames:
        return pd.DataFrame(columns=["row", *_KEPT, *_ANGLES])
    frame = pd.concat(frames, ignore_index=True)
    frame.insert(0, "row", range(len(frame)))
    frame["subject_in_one_split"] = _in_one_split(frame, "subject_id")
    frame["alike_in_one_split"] = _in_one_split(frame, "looks")
    return frame.drop(columns="looks")


def conversations_frame(table: Table, faces: pd.DataFrame, tallies: Tallies) -> pd.DataFrame:
    """One light row a conversation, with its agreement with the faces table."""
    import numpy as np
    import pandas as pd

    known = faces.drop_duplicates("image_id").set_index("image_id")[["split", "subject_id"]]
    face_of = dict(zip(known.index, known.itertuples(index=False, name=None), strict=True))
    columns = ["conversation_id", "image_id", "images", "split", "source", "subject_id", "messages", "turns"]
    frames: list[pd.DataFrame] = []
    samples: list[np.ndarray] = []
    with progress.bar("checking conversations", table.rows) as bar:
        for batch in table.batches(columns):
            images = batch.column("images").to_pylist()
            rows = batch.drop_columns(["images"]).to_pylist()
            frames.append(
                pd.DataFrame(
                    [_conversation(row, held, face_of, tallies) for row, held in zip(rows, images, strict=True)]
                )
            )
            samples += [_fingerprints(row["turns"] or ()) for row in rows]
            bar.update(sum(map(len, frames)))
    if not frames:
        return pd.DataFrame(columns=["row", "image_id"])
    frame = pd.concat(frames, ignore_index=True)
    frame.insert(0, "row", range(len(frame)))
    frame["subject_in_one_split"] = _in_one_split(frame, "subject_id")
    owner = np.repeat(np.arange(len(samples)), [len(s) for s in samples])
    _, inverse, count = np.unique(np.concatenate(samples), return_inverse=True, return_counts=True)
    repeated = np.zeros(len(frame), dtype=bool)
    repeated[owner[count[inverse] > 1]] = True
    frame["samples_unique"] = ~repeated
    return frame


def _encoded(batch: pa.RecordBatch, column: str) -> list[bytes | None]:
    return [None if image is None else image["bytes"] or b"" for image in batch.column(column).to_pylist()]


def _look(row: Mapping[str, Any], image: bytes | None, segmentation: bytes | None) -> dict[str, Any]:
    """What only the pixels tell. Runs in a thread: hashing and decoding let the others work."""
    encoded, size = image or b"", (row["width"], row["height"])
    picture = _decode(encoded)
    found: dict[str, Any] = {
        "digest_matches": digests.of_bytes(encoded) == row["image_id"],
        "decodes": picture is not None,
        "size_matches": None if picture is None else picture.size == size,
        "looks": None if picture is None else _gradients(picture),
        "segmentation_decodes": None,
        "segmentation_matches_size": None,
        "segmentation_classes_ok": None,
    }
    if segmentation is not None:
        drawn = _decode(segmentation)
        found["segmentation_decodes"] = drawn is not None
        if drawn is not None:
            found["segmentation_matches_size"] = drawn.size == size
            found["segmentation_classes_ok"] = drawn.mode in ("L", "P") and drawn.getextrema()[1] < SEGMENTATION_CLASSES
    return found


def _decode(encoded: bytes) -> Any:
    """The decoded image, or None: damaged, of a format we do not read, or larger than any face crop has to be."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            return None
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return image


def _gradients(image: Any) -> bytes:
    """256 bits that tell whether grey rises to the right: equal for a face saved twice, not for two faces."""
    import numpy as np

    grey = np.asarray(image.convert("L").resize((17, 16), 3), dtype=np.int16)
    return np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes()


def _face(row: dict[str, Any], looks: Mapping[str, Any], min_box_pixels: int, tallies: Tallies) -> dict[str, Any]:
    width, height = row["width"] or 0, row["height"] or 0
    box, landmarks = row["box"], row["landmarks"]
    corners = [box[0:2], box[2:4]] if box and len(box) == 4 else None
    attributes = mapping(row["attributes"])
    tallies.attributes.update((name, value) for name, value in attributes.items() if value is not None)
    clashes = [f"{a} and {b}" for a, b in CONTRADICTIONS if attributes.get(a) and attributes.get(b)]
    tallies.contradictions.update(clashes)
    numbers = [row["age"], *(row[a] for a in _ANGLES), *(box or ()), *(x for point in landmarks or () for x in point)]
    units = mapping(row["action_units"])
    return {
        **{name: row[name] for name in (*_KEPT, *_ANGLES)},
        **looks,
        "numbers_finite": all(math.isfinite(x) for x in numbers if x is not None),
        "box_inside": None if box is None else corners is not None and _inside(corners, width, height),
        "box_large": None if corners is None else _extent(corners) >= min_box_pixels,
        "landmarks_inside": None if landmarks is None else _inside(landmarks, width, height),
        "has_caption": bool((row["caption"] or "").strip()),
        "attributes_agree": not clashes if attributes else None,
        "action_units_ok": all(re.fullmatch(r"AU\d+", n) and v is not None and 0 <= v <= 5 for n, v in units.items())
        if units
        else None,
    }


def _inside(points: Iterable[Sequence[float]], width: int, height: int) -> bool:
    return all(len(p) >= 2 and 0 <= p[0] <= width and 0 <= p[1] <= height for p in points)


def _extent(corners: Sequence[Sequence[float]]) -> float:
    (left, top), (right, bottom) = corners
    return min(right - left, bottom - top)


def _in_one_split(frame: pd.DataFrame, column: str) -> Any:
    """Whether rows that share a value of `column` share a split; null where the value is null."""
    counts = frame.groupby(column)["split"].transform("nunique")
    return (counts == 1).astype(object).where(frame[column].notna(), None)


def _conversation(
    row: Mapping[str, Any],
    images: Sequence[Mapping[str, Any]] | None,
    face_of: Mapping[str, tuple[str, str | None]],
    tallies: Tallies,
) -> dict[str, Any]:
    messages, turns = row["messages"] or [], row["turns"] or []
    kinds = [[part["type"] for part in message["content"] or ()] for message in messages]
    texts = [[part["text"] or "" for part in m["content"] or () if part["type"] == "text"] for m in messages]
    face = face_of.get(row["image_id"])
    for turn in turns:
        tallies.questions[(turn["task"] or "", row["split"])] += 1
        if turn["form"] in CLOSED_FORMS:
            item = (turn["template"] or "").rpartition("/")[0]
            tallies.answers[(turn["task"] or "", item, turn["answer"] or "")] += 1
    held = images or []
    return {
        **{name: row[name] for name in ("conversation_id", "image_id", "split", "source", "subject_id")},
        "image_known": face is not None,
        "split_matches": None if face is None else face[0] == row["split"],
        "subject_matches": None if face is None else face[1] == row["subject_id"],
        "image_matches": len(held) == 1 and digests.of_bytes(held[0]["bytes"] or b"") == row["image_id"],
        "turns_match": len(turns) > 0 and len(messages) == 2 * len(turns),
        "roles_alternate": [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2),
        "image_first": bool(kinds) and kinds[0].count("image") == 1 and not any("image" in k for k in kinds[1:]),
        "texts_filled": all("".join(text).strip() for text in texts)
        and all((t["answer"] or "").strip() for t in turns),
        "answers_in_options": all(_answer_fits(turn) for turn in turns),
        "turns": len(turns),
    }


def _answer_fits(turn: Mapping[str, Any]) -> bool:
    options = turn["options"] or ()
    return turn["answer"] in options if turn["form"] in CLOSED_FORMS else True


def _fingerprints(turns: Sequence[Mapping[str, Any]]) -> Any:
    """Eight bytes a sample_id: enough to find a repeated one among millions, light enough to hold them all."""
    import numpy as np

    names = (hashlib.blake2b((turn["sample_id"] or "").encode(), digest_size=8).digest() for turn in turns)
    return np.frombuffer(b"".join(names), dtype=np.uint64)
