"""A conversation about one face, in which everything is asked outright."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from facemllm.qa.questions import native
from facemllm.qa.rows import rows_of
from facemllm.qa.turns import Rows
from facemllm.records import FACES
from facemllm.tasks import Task


def conversation(row: Mapping[str, Any], asked: Sequence[Task]) -> dict[str, Any] | None:
    """All that can be asked outright about a row of `faces`, as a row of `conversations`; None if nothing can."""
    batch = pa.RecordBatch.from_pylist([dict(row)], FACES)
    (face,) = rows_of(batch)
    questions = native(asked, face)
    if not questions:
        return None
    made = Rows()
    made.add(0, face, questions)
    (found,) = made.batch(batch).to_pylist()
    return dict(found)
