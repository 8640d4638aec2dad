"""The shapes of the tables as Arrow schemas, and the small values that stand in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

MANIFEST = "manifest.json"
QUARANTINE = "quarantine.parquet"

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _pairs(value: pa.DataType) -> pa.DataType:
    return pa.list_(pa.struct([("name", pa.string()), ("value", value)]))


FACES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        ("original_id", pa.string()),
        pa.field("image", IMAGE, nullable=False),
        ("width", pa.int32()),
        ("height", pa.int32()),
        pa.field("source", pa.string(), nullable=False),
        ("source_id", pa.string()),
        ("subject_id", pa.string()),
        pa.field("split", pa.string(), nullable=False),
        ("box", pa.list_(pa.float32())),
        ("landmarks", pa.list_(pa.list_(pa.float32()))),
        ("segmentation", IMAGE),
        ("alt_text", pa.string()),
        ("caption", pa.string()),
        ("attributes", _pairs(pa.bool_())),
        ("expression", pa.string()),
        ("age", pa.float32()),
        ("age_range", pa.string()),
        ("gender", pa.string()),
        ("ethnicity", pa.string()),
        ("skin_tone", pa.int8()),
        ("yaw", pa.float32()),
        ("pitch", pa.float32()),
        ("roll", pa.float32()),
        ("action_units", _pairs(pa.float32())),
        (
            "provenance",
            pa.list_(
                pa.struct(
                    [
                        ("field", pa.string()),
                        ("origin", pa.string()),
                        ("model_digest", pa.string()),
                        ("prompt_hash", pa.string()),
                        ("time", pa.string()),
                        ("cost", pa.float64()),
                    ]
                )
            ),
        ),
    ],
    metadata={"schema": "faces/1"},
)

CONVERSATIONS = pa.schema(
    [
        pa.field("conversation_id", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("images", pa.list_(IMAGE), nullable=False),
        ("segmentation", IMAGE),
        pa.field("split", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        ("subject_id", pa.string()),
        ("groups", _pairs(pa.string())),
        (
            "messages",
            pa.list_(
                pa.struct(
                    [
                        ("role", pa.string()),
                        ("content", pa.list_(pa.struct([("type", pa.string()), ("text", pa.string())]))),
                    ]
                )
            ),
        ),
        (
            "turns",
            pa.list_(
                pa.struct(
                    [
                        ("sample_id", pa.string()),
                        ("task", pa.string()),
                        ("form", pa.string()),
                        ("template", pa.string()),
                        ("options", pa.list_(pa.string())),
                        ("answer", pa.string()),
                        ("follows", pa.bool_()),
                    ]
                )
            ),
        ),
    ],
    metadata={"schema": "conversations/1"},
)

PREDICTIONS = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        ("subject_id", pa.string()),
        pa.field("task", pa.string(), nullable=False),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("raw", pa.string()),
        ("parsed", pa.string()),
        ("scores", _pairs(pa.float64())),
        ("groups", _pairs(pa.string())),
        ("model_digest", pa.string()),
    ],
    metadata={"schema": "predictions/1"},
)

QUARANTINED = pa.schema([("file", pa.string()), ("row", pa.int64()), ("reason", pa.string())])

SPLITS = ("train", "validation", "test")


def subject_id(source: str, subject: str, key: bytes = b"facemllm") -> str:
    """Keyed hash of a source's subject: tells rows of one person apart from others', and gives no name away."""
    return hashlib.blake2b(f"{source}\0{subject}".encode(), key=key, digest_size=16).hexdigest()


def pairs(mapping: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A mapping as the stored list of (name, value) pairs, in name order."""
    return [{"name": name, "value": mapping[name]} for name in sorted(mapping)]


def mapping(stored: Iterable[Mapping[str, Any]] | None) -> dict[str, Any]:
    """The stored list of (name, value) pairs as a mapping; null is empty."""
    return {pair["name"]: pair["value"] for pair in stored or ()}


def provenance(
    field: str, origin: str, model_digest: str | None = None, prompt_hash: str | None = None, cost: float = 0.0
) -> dict[str, Any]:
    """An entry of `provenance`: where a field comes from (`source|annotator|expert|renderer`), at what cost.

    `time` stays empty: the same work at another hour has to give the same bytes.
    """
    return {
        "field": field,
        "origin": origin,
        "model_digest": model_digest,
        "prompt_hash": prompt_hash,
        "time": None,
        "cost": cost,
    }


def huggingface_metadata(schema: pa.Schema) -> dict[str, str]:
    """The `datasets` feature description of a schema, so that `load_dataset("parquet")` decodes images."""
    features = {field.name: _feature(field.type) for field in schema}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def _feature(kind: pa.DataType) -> Any:
    if kind == IMAGE:
        return {"_type": "Image"}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    names = {"float": "float32", "double": "float64"}
    return {"dtype": names.get(str(kind), str(kind)), "_type": "Value"}
