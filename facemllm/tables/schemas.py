"""The shapes of the tables as Arrow schemas, the columns that label a face, and the small values that stand in them."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

MANIFEST = "manifest.json"
QUARANTINE = "quarantine.parquet"

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _structs(**fields: pa.DataType) -> pa.DataType:
    return pa.list_(pa.struct(list(fields.items())))


def _pairs(value: pa.DataType) -> pa.DataType:
    return _structs(name=pa.string(), value=value)


@dataclass(frozen=True)
class Label:
    """A column of `faces` that says something of the face: a source may give it, an annotator fill it in.

    In `labels.csv` beside pictures of one's own a cell of it is a number within `limits`, or a `cell` of free text or
    of one word; a column with neither is read there in a form of its own, or not at all.
    """

    name: str
    type: pa.DataType
    limits: tuple[float, float] | None = None
    cell: Literal["text", "word", ""] = ""

    @property
    def paired(self) -> bool:
        """Whether readers and annotators give it as a mapping, which is stored as (name, value) pairs."""
        return pa.types.is_list(self.type) and pa.types.is_struct(self.type.value_type)

    @property
    def numeric(self) -> bool:
        """Whether it holds numbers: one, points, or one by name."""
        kind = self.type
        while pa.types.is_list(kind):
            kind = kind.value_type
        kind = kind.field("value").type if self.paired else kind
        return pa.types.is_floating(kind) or pa.types.is_integer(kind)


LABELS = (
    Label("box", pa.list_(pa.float32())),
    Label("landmarks", pa.list_(pa.list_(pa.float32()))),
    Label("segmentation", IMAGE),
    Label("alt_text", pa.string(), cell="text"),
    Label("caption", pa.string(), cell="text"),
    Label("attributes", _pairs(pa.bool_())),
    Label("expression", pa.string(), cell="word"),
    Label("age", pa.float32(), (0, 120)),
    Label("age_range", pa.string()),
    Label("gender", pa.string()),
    Label("ethnicity", pa.string(), cell="word"),
    Label("skin_tone", pa.int8(), (1, 10)),
    Label("yaw", pa.float32(), (-180, 180)),
    Label("pitch", pa.float32(), (-180, 180)),
    Label("roll", pa.float32(), (-180, 180)),
    Label("action_units", _pairs(pa.float32())),
)
"""The columns that label a face, in the table's order. A new one is an entry here: schema, importing, `labels.csv`,
annotation, question making and validation take theirs from this list."""

PAIRED = tuple(label.name for label in LABELS if label.paired)

_ORIGIN = ("field", "origin", "model_digest", "prompt_hash", "time")

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
        *((label.name, label.type) for label in LABELS),
        ("provenance", _structs(**dict.fromkeys(_ORIGIN, pa.string()), cost=pa.float64())),
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
        ("messages", _structs(role=pa.string(), content=_structs(type=pa.string(), text=pa.string()))),
        (
            "turns",
            _structs(
                **dict.fromkeys(("sample_id", "task", "form", "template"), pa.string()),
                options=pa.list_(pa.string()),
                answer=pa.string(),
                follows=pa.bool_(),
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

CELEBA = (
    *("5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips", "Big_Nose"),
    *("Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses"),
    *("Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache"),
    *("Narrow_Eyes", "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks"),
    *("Sideburns", "Smiling", "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick"),
    *("Wearing_Necklace", "Wearing_Necktie", "Young"),
)
"""Names of facial attributes as the datasets that introduced them have them: here CelebA's forty."""

MAAD_ONLY = (
    *("Middle_Aged", "Senior", "Asian", "White", "Black", "Shiny_Skin", "Square_Face", "Round_Face"),
    *("Obstructed_Forehead", "Fully_Visible_Forehead", "Brown_Eyes", "Mouth_Closed", "No_Eyewear"),
)
"""Those of MAAD-Face that CelebA has not."""

LFWA_ONLY = (
    *("Baby", "Child", "Youth", "Sunglasses", "Frowning", "Harsh_Lighting", "Flash", "Soft_Lighting", "Outdoor"),
    *("Curly_Hair", "Partially_Visible_Forehead", "Eyes_Open", "Mouth_Wide_Open", "Teeth_Not_Visible", "Round_Jaw"),
    *("Color_Photo", "Posed_Photo", "Attractive_Man", "Attractive_Woman", "Indian", "Strong_Nose_Mouth_Lines"),
    "Flushed_Face",
)
"""Those of LFWA's seventy-three that neither has (Kumar and others, ICCV 2009), spelled in CelebA's manner."""

SEGMENTATION = (
    *("background", "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth", "u_lip"),
    *("l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth"),
)
"""Classes of a segmentation by their number in it (github switchablenorms/CelebAMask-HQ)."""

AGE_BANDS = ((18, "child"), (36, "young"), (60, "middle"))
SKIN_TONES = ((4, "light"), (7, "medium"), (11, "dark"))


def fairness_groups(row: Mapping[str, Any]) -> dict[str, str]:
    """Fairness groups of a row of `faces`: `gender`, `age_band` (child 0-17, young 18-35, middle 36-59, old 60+) and
    `skin_tone` (Monk scale: light 1-3, medium 4-6, dark 7-10). What is unknown is left out."""
    found = {}
    if row.get("gender") is not None:
        found["gender"] = str(row["gender"])
    age = row.get("age")
    if age is not None and age >= 0:
        found["age_band"] = next((band for below, band in AGE_BANDS if age < below), "old")
    tone = row.get("skin_tone")
    if tone is not None and 1 <= tone <= 10:
        found["skin_tone"] = next(name for below, name in SKIN_TONES if tone < below)
    return found


def subject_id(source: str, subject: str, key: bytes = b"facemllm") -> str:
    """Keyed hash of a source's subject: tells rows of one person apart from others', and gives no name away."""
    named = unicodedata.normalize("NFC", f"{source}\0{subject}")  # one name in two Unicode forms is one person
    return hashlib.blake2b(named.encode(), key=key, digest_size=16).hexdigest()


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
    return dict(zip(_ORIGIN, (field, origin, model_digest, prompt_hash, None), strict=True)) | {"cost": cost}


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
