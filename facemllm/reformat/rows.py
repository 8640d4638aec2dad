"""Rows of `faces` as the tasks read them, decoded by column; pictures, and what no task asks for, are left alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from facemllm import tables
from facemllm.tables import Table

PICTURES = ("image", "segmentation")
LABELS = (
    *("image_id", "original_id", "source", "source_id", "subject_id", "split", "caption", "attributes"),
    *("expression", "age", "gender", "skin_tone", "yaw", "pitch", "roll"),
)
RARE = (*(label.name for label in tables.LABELS if label.name not in (*LABELS, *PICTURES)), "width", "height")
"""Columns that few tasks look at: decoded when one does."""


class FaceRow(dict[str, Any]):
    """A row of `faces` whose rare columns, and segmentation, are decoded once they are asked for."""

    def __init__(self, values: Mapping[str, Any], number: int, columns: dict[str, list[Any]], batch: pa.RecordBatch):
        super().__init__(values)
        self._number, self._columns, self._batch = number, columns, batch

    def __missing__(self, name: str) -> Any:
        if name not in self._columns:
            if name not in self._batch.schema.names:
                raise KeyError(name)
            self._columns[name] = self._batch.column(name).to_pylist()
        value = self[name] = self._columns[name][self._number]
        return value

    def get(self, name: str, default: Any = None) -> Any:
        """As of any mapping; a rare column is decoded."""
        try:
            return self[name]
        except KeyError:
            return default

    def but(self, **changed: Any) -> FaceRow:
        """The same row with other values in some columns."""
        return FaceRow({**self, **changed}, self._number, self._columns, self._batch)


def batches(table: Table, *, pictures: bool) -> Iterator[tuple[pa.RecordBatch, list[FaceRow]]]:
    """Stream batches of a faces table with their rows, `attributes` as mappings. It is light without `pictures`."""
    columns = [*LABELS, *RARE, *(PICTURES if pictures else ("segmentation",))]
    for batch in table.batches(columns):
        yield batch, rows_of(batch)


def rows_of(batch: pa.RecordBatch) -> list[FaceRow]:
    """The rows of a batch."""
    plain = [name for name in LABELS if name != "attributes"]
    values = [batch.column(name).to_pylist() for name in plain]
    decoded: dict[str, list[Any]] = {}
    return [
        FaceRow({**dict(zip(plain, row, strict=True)), "attributes": known}, number, decoded, batch)
        for number, (known, *row) in enumerate(zip(_mappings(batch.column("attributes")), *values, strict=True))
    ]


def _mappings(column: pa.ListArray) -> Sequence[Mapping[str, Any]]:
    """Stored lists of (name, value) pairs as mappings; null is empty."""
    pairs = column.flatten()
    names, values = pairs.field("name").to_pylist(), pairs.field("value").to_pylist()
    found, start = [], 0
    for length in column.value_lengths().to_pylist():
        end = start + (length or 0)
        found.append(dict(zip(names[start:end], values[start:end], strict=True)))
        start = end
    return found
