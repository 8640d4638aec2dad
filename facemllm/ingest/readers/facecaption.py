"""FaceCaption-15M: faces in web pictures (of LAION-Face), each with a caption of the face and the picture's own one.

What is published is a table (FaceCaption-v1.parquet: url, face box, laion caption, face caption, ...); the pictures are
downloaded by whoever uses it. Two layouts are read:

    00000.tar ... (or in images/)       img2dataset shards made from the table with
                                        --save_additional_columns '["face_box", "laion_caption", "face_caption"]'
    *.parquet or *.csv, and pictures    a table whose column image (or file, file_name, image_path, path) names a
                                        picture under the root, or holds its bytes (Parquet: struct of bytes)

Shards are read where there are some. Names of columns are compared in small letters with `_` between words; the exact
ones are unverified for want of the files, so `face_box`, `box`, `bbox`, `face_bbox` are all taken as the box, and
`caption` as the picture's caption. A box is four numbers, as a list or as text, in pixels of the picture: two corners
(`box: corners`, unverified default), or left, top, width, height (`box: sizes`).
`caption` is the face caption, `alt_text` the laion caption. Crop: the box, widened by 0.25 of its width and height on
each side; a picture may stand there once a face.
`source_id` is the sample's shard and key, or the picture's name and the row. `subject` is the picture (its url, else
its name), so that its faces stay in one split; people are not known. Splits: drawn.
Refused: rows without picture, box or face caption, ragged rows, boxes that are empty.
Source: https://huggingface.co/datasets/OpenFace-CQUPT/FaceCaption-15M; Dai and others, arXiv 2407.08515.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from facemllm.errors import UserError, one_line
from facemllm.ingest import labels
from facemllm.ingest.reader import Box, Face, Reader, Refuse, Refused, faces, files, snake
from facemllm.ingest.shards import samples, tars, widened

COLUMNS = {
    "image": ("image", "file", "file_name", "image_path", "path"),
    "box": ("face_box", "face_bbox", "box", "bbox"),
    "face": ("face_caption",),
    "laion": ("laion_caption", "caption"),
    "url": ("url",),
}
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_MAX_FIELD = 100_000
_BATCH = 64

Row = Mapping[str, Any]


def read(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """Faces in the order of the shards, or of the table. Raises UserError when there is neither, or a column lacks."""
    sizes = options["box"] == "sizes"
    home = root / "images" if (root / "images").is_dir() and tars(root / "images") else root
    if shards := tars(home):
        for shard in shards:
            yield from _shard(shard, root, sizes)
        return
    tables = [root / name for name in files(root) if name.lower().endswith((".parquet", ".csv"))]
    if not tables:
        raise UserError(f"{root}: neither shards (00000.tar) nor a table (*.parquet, *.csv)")
    for table in tables:
        name = table.name
        rows = _parquet(table) if name.lower().endswith(".parquet") else _csv(table, root)
        yield from faces(rows, name, partial(_named, table=name, root=root, sizes=sizes))


READERS = {"facecaption": Reader(read, {"box": ("corners", "sizes")})}


def _shard(shard: Path, root: Path, sizes: bool) -> Iterator[Face | Refused]:
    stem = shard.relative_to(root).with_suffix("").as_posix()
    for sample in samples(shard, root):
        if isinstance(sample, Refused):
            yield sample
            continue
        if sample.facts is None or sample.picture is None:
            reason = "no label row (the .json beside it)" if sample.facts is None else "the picture is missing"
            yield Refused(sample.file, 0, reason)
            continue
        row = {snake(str(key)): value for key, value in sample.facts.items()}
        if not any(name in row for name in COLUMNS["face"]):
            raise UserError(
                f"{sample.file}: its .json has no face_caption; download with img2dataset --save_additional_columns "
                '\'["face_box", "laion_caption", "face_caption"]\''
            )
        try:
            facts, crop = _facts(row | {"caption": row.get("caption") or sample.text}, sizes)
        except Refuse as error:
            yield Refused(sample.file, 0, str(error))
            continue
        name, person = f"{stem}/{sample.key}", _text(row, "url")
        yield Face(
            file=sample.file, source_id=name, image=sample.picture, subject=person or name, crop=crop, labels=facts
        )


def _named(number: int, row: Row, table: str, root: Path, sizes: bool) -> Face:
    """The face of a table's row. Raises Refuse."""
    facts, crop = _facts(row, sizes)
    value = _value(row, "image")
    image: Path | bytes
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        image, file = value["bytes"], f"{table}/{number}"
        name = file
    else:
        file = str(value.get("path") if isinstance(value, dict) else value or "").strip()
        if not file:
            raise Refuse("the row names no picture")
        image = labels.inside(root, file)
        file = image.relative_to(root).as_posix()
        name = f"{Path(file).with_suffix('').as_posix()}/{number}"
    person = _text(row, "url") or file
    return Face(file=file, source_id=name, image=image, subject=person, crop=crop, labels=facts)


def _facts(row: Row, sizes: bool) -> tuple[dict[str, Any], Box]:
    """Labels and crop. Raises Refuse."""
    caption = _text(row, "face")
    if not caption:
        raise Refuse("no face caption")
    box = _box(_value(row, "box"), sizes)
    facts: dict[str, Any] = {"caption": caption, "box": list(box)}
    if alt := _text(row, "laion"):
        facts["alt_text"] = alt
    return facts, widened(box)


def _box(value: Any, sizes: bool) -> Box:
    if isinstance(value, str):
        value = _NUMBER.findall(value)
    try:
        left, top, right, bottom = (float(number) for number in value)
    except (TypeError, ValueError):
        raise Refuse(f"the face box is {str(value)[:80]!r}, not four numbers") from None
    if sizes:
        right, bottom = left + right, top + bottom
    if not all(map(math.isfinite, (left, top, right, bottom))) or right <= left or bottom <= top:
        raise Refuse(f"the face box {left:g}, {top:g}, {right:g}, {bottom:g} is empty")
    return left, top, right, bottom


def _value(row: Row, what: str) -> Any:
    return next((row[name] for name in COLUMNS[what] if row.get(name) is not None), None)


def _text(row: Row, what: str) -> str:
    value = _value(row, what)
    return value.strip() if isinstance(value, str) else ""


def _check(table: Path, header: list[str]) -> None:
    for what in ("image", "box", "face"):
        if not set(COLUMNS[what]) & set(header):
            raise UserError(f"{table}: no column {' or '.join(COLUMNS[what])}; found {', '.join(header)}")


def _parquet(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = {name: snake(name) for name in file.schema_arrow.names}
            _check(path, list(names.values()))
            wanted = {name for what in COLUMNS.values() for name in what}
            number = 0
            for batch in file.iter_batches(_BATCH, columns=[name for name in names if names[name] in wanted]):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {names[name]: value for name, value in row.items()}
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: no sound Parquet file ({one_line(error)})") from None


def _csv(path: Path, root: Path) -> Iterator[tuple[int, Row] | Refused]:
    """Rows with their line; a caption may hold line ends inside quotes."""
    name = path.relative_to(root).as_posix()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [snake(column) for column in next(reader, [])]
            _check(path, header)
            while True:
                try:
                    values = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield Refused(name, reader.line_num, f"not a row of comma-separated values ({error})")
                    continue
                if not values:
                    continue
                if len(values) != len(header):
                    yield Refused(name, reader.line_num, f"{len(values)} fields where the header has {len(header)}")
                elif max(map(len, values)) > _MAX_FIELD:
                    yield Refused(name, reader.line_num, f"a field of more than {_MAX_FIELD:,} characters")
                else:
                    yield reader.line_num, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}, line 1: not a header of comma-separated values ({error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it to UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
