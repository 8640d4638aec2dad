"""Formats to train on: LLaVA's list, LLaMA-Factory's ShareGPT, TRL's messages. A row stays one chat about one face.

LLaVA (docs/Finetune_Custom_Data.md): id, image, conversations of {from: human|gpt, value}, `<image>` in the first.
LLaMA-Factory (data/README.md): messages of {role, content}, images, and an entry in dataset_info.json with columns and
tags. TRL (dataset formats, vision): messages with typed parts, images beside them in the order of their places.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from facemllm.reformat.exports.writing import JsonList, Pictures, marked, texts
from facemllm.tables import CONVERSATIONS, ROW_GROUP, huggingface_metadata


class Llava:
    """OUT/<split>.json; a row with several pictures is left out, since LLaVA's list knows one."""

    def __init__(self, folder: Path, split: str) -> None:
        self._pictures = Pictures(folder / "images")
        self._list = JsonList(folder / f"{split}.json")

    def add(self, row: Mapping[str, Any]) -> int:
        """One entry a conversation."""
        words = marked(texts(row), 1) if len(row["images"]) == 1 else None
        if words is None:
            return 0
        (image,) = self._pictures.names(row)
        said = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(words)]
        self._list.add({"id": row["conversation_id"], "image": image, "conversations": said})
        return 1

    def close(self) -> None:
        """End the list."""
        self._list.close()


class ShareGpt:
    """OUT/<split>.json and OUT/dataset_info.json, where the data set is called `face_mllm_<split>`."""

    def __init__(self, folder: Path, split: str) -> None:
        self._pictures = Pictures(folder / "images")
        self._list = JsonList(folder / f"{split}.json")
        entry = {
            "file_name": f"{split}.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "images": "images"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
                "system_tag": "system",
            },
        }
        text = json.dumps({f"face_mllm_{split}": entry}, indent=2) + "\n"
        (folder / "dataset_info.json").write_text(text, "utf-8")

    def add(self, row: Mapping[str, Any]) -> int:
        """One entry a conversation."""
        words = marked(texts(row), len(row["images"]))
        if words is None:
            return 0
        images = [f"images/{name}" for name in self._pictures.names(row)]
        said = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(words)]
        self._list.add({"messages": said, "images": images})
        return 1

    def close(self) -> None:
        """End the list."""
        self._list.close()


class Trl:
    """OUT/<split>.parquet: `messages` and `images`, pictures embedded, as `datasets` and TRL's SFTTrainer take them."""

    def __init__(self, folder: Path, split: str) -> None:
        schema = pa.schema([CONVERSATIONS.field(name).with_nullable(True) for name in ("messages", "images")])
        self._schema = schema.with_metadata(huggingface_metadata(schema))
        self._writer = pq.ParquetWriter(folder / f"{split}.parquet", self._schema, compression="zstd")
        self._rows: list[Mapping[str, Any]] = []

    def add(self, row: Mapping[str, Any]) -> int:
        """One row a conversation."""
        self._rows.append({name: row[name] for name in self._schema.names})
        if len(self._rows) == ROW_GROUP:
            self._flush()
        return 1

    def close(self) -> None:
        """Write what is left."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
            self._rows = []
