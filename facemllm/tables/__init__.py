"""The two tables, and the predictions: Arrow schemas, sharded atomic writing, streaming reading, digests.

A table is a folder of Parquet shards `part-*.parquet`, `quarantine.parquet` when rows were refused, `manifest.json`.
It is written under a temporary name and renamed when whole, so a reader never sees half a table. Its digest is the
SHA-256 of the manifest (schema, row counts, SHA-256 of every shard, parents): not of paths, times or worker counts.
Maps (`attributes`, `action_units`, `groups`) are stored as lists of (name, value) pairs: `datasets` has no map type.
`image_id` names the picture as it is stored, `original_id` the file that it was made from (both SHA-256).
"""

# ruff: noqa: F401 - the names by which other rooms know the tables
from __future__ import annotations

from facemllm.tables.schemas import (
    CONVERSATIONS,
    FACES,
    IMAGE,
    LABELS,
    MANIFEST,
    PAIRED,
    PREDICTIONS,
    QUARANTINE,
    QUARANTINED,
    SPLITS,
    huggingface_metadata,
    mapping,
    pairs,
    provenance,
    subject_id,
)
from facemllm.tables.storage import ROW_GROUP, Table, TableWriter, open_table
