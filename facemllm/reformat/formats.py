"""Formats of others for conversations, to train on and to evaluate with; a row stays one chat about one face.

LLaVA (docs/Finetune_Custom_Data.md): id, image, conversations of {from: human|gpt, value}, `<image>` in the first.
LLaMA-Factory (data/README.md): messages of {role, content}, images, and an entry in dataset_info.json with columns and
tags. TRL (dataset formats, vision): messages with typed parts, images beside them in the order of their places.
FaceBench (datasets/example/test.jsonl, evaluation/inference.py): question_id, question_type (TFQ, SCQ, OEQ), image_id,
text, instruction, options, conditions (follow-up questions of a yes: ours have none), gt_answer, metadata. Its views
are its own; we sort our tasks into them by what they ask. FaceXBench (benchmark/*.json): one object a file with
category, sub-category and questions of exactly four options. Benchmarks' questions stand alone, in their own form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from facemllm import tasks
from facemllm.core import digests
from facemllm.core.digests import draw
from facemllm.errors import UserError
from facemllm.tables import CONVERSATIONS, ROW_GROUP, huggingface_metadata
from facemllm.tasks.asking import NATIVE
from facemllm.tasks.base import Question

_NAME = re.compile(r"[0-9a-f]{64}")
_KINDS = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"), (b"BM", "bmp"), (b"RIFF", "webp"))
_VIEWS = {"expression": "Psychology", "age": "Identity", "gender": "Identity", "ethnicity": "Identity"}
_TYPES = {"boolean": "TFQ", "choice": "SCQ"}
_CHOOSE, _TELL = "Answer with one of the options.", "Answer in a few words, or as many sentences as it takes."
_LETTERS = "ABCD"

Turn = tuple[Mapping[str, Any], Question, str, str]
"""A stored turn, its question, the words that ask and the words that answer."""


class Pictures:
    """A folder of pictures, each written once."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder

    def names(self, row: Mapping[str, Any]) -> list[str]:
        """Write the pictures of a row of `conversations`; their file names, the first being its image_id."""
        found = []
        for number, image in enumerate(row["images"]):
            data = image["bytes"] or b""
            name = row["image_id"] if number == 0 else digests.of_bytes(data)
            if not _NAME.fullmatch(name):
                raise UserError(f"image_id '{name}' is no SHA-256 in hex; make the conversations again")
            kind = next((kind for start, kind in _KINDS if data.startswith(start)), "jpg")
            path = self._folder / f"{name}.{kind}"
            if not path.exists():
                path.write_bytes(data)
            found.append(path.name)
        return found


class JsonList:
    """A JSON list in a file, one entry a line; between `head` and `tail` when it stands inside of something."""

    def __init__(self, path: Path, head: str = "[", tail: str = "]\n") -> None:
        self._file = path.open("w", encoding="utf-8")
        self._file.write(head)
        self._tail, self.count = tail, 0

    def add(self, entry: Any, key: str | None = None) -> None:
        """Append an entry, under a key if it stands in an object."""
        named = "" if key is None else f"{json.dumps(key)}: "
        self._file.write((",\n" if self.count else "\n") + named + json.dumps(entry, ensure_ascii=False))
        self.count += 1

    def close(self) -> None:
        """End the list."""
        if not self._file.closed:
            self._file.write("\n" + self._tail)
            self._file.close()


def texts(row: Mapping[str, Any]) -> list[str]:
    """The words of every message of a row of `conversations`."""
    return [" ".join(p["text"] for p in message["content"] if p["type"] == "text") for message in row["messages"]]


def marked(words: Sequence[str], pictures: int) -> list[str] | None:
    """Texts with one `<image>` for every picture before the first; None when a text holds that mark already."""
    if any("<image>" in text for text in words):
        return None
    return ["<image>\n" * pictures + words[0], *words[1:]] if words else None


class Format:
    """Writes rows of `conversations` of one split in one format: the files of `_files`, closed at the end."""

    def __init__(self, folder: Path, split: str) -> None:
        self._folder, self._split = folder, split
        self._files: dict[str, Any] = {}

    def add(self, row: Mapping[str, Any]) -> int:
        """Write a row; how many entries it became, 0 when the format has no way to say it."""
        raise NotImplementedError

    def close(self) -> None:
        """Finish the files."""
        for file in self._files.values():
            file.close()


class Llava(Format):
    """OUT/<split>.json; a row with several pictures is left out, since LLaVA's list knows one."""

    def __init__(self, folder: Path, split: str) -> None:
        super().__init__(folder, split)
        self._pictures = Pictures(folder / "images")
        self._files["chats"] = JsonList(folder / f"{split}.json")

    def add(self, row: Mapping[str, Any]) -> int:
        """One entry a conversation."""
        words = marked(texts(row), 1) if len(row["images"]) == 1 else None
        if words is None:
            return 0
        (image,) = self._pictures.names(row)
        said = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(words)]
        self._files["chats"].add({"id": row["conversation_id"], "image": image, "conversations": said})
        return 1


class ShareGpt(Llava):
    """OUT/<split>.json and OUT/dataset_info.json, where the data set is called `face_mllm_<split>`."""

    def __init__(self, folder: Path, split: str) -> None:
        super().__init__(folder, split)
        roles = {f"{role}_tag": role for role in ("user", "assistant", "system")}
        entry = {
            "file_name": f"{split}.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "images": "images"},
            "tags": {"role_tag": "role", "content_tag": "content", **roles},
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
        self._files["chats"].add({"messages": said, "images": images})
        return 1


class Trl(Format):
    """OUT/<split>.parquet: `messages` and `images`, pictures embedded, as `datasets` and TRL's SFTTrainer take them."""

    def __init__(self, folder: Path, split: str) -> None:
        super().__init__(folder, split)
        schema = pa.schema([CONVERSATIONS.field(name).with_nullable(True) for name in ("messages", "images")])
        self._schema = schema.with_metadata(huggingface_metadata(schema))
        self._files["table"] = pq.ParquetWriter(folder / f"{split}.parquet", self._schema, compression="zstd")
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
        super().close()

    def _flush(self) -> None:
        if self._rows:
            self._files["table"].write_table(pa.Table.from_pylist(self._rows, self._schema))
            self._rows = []


class FaceBench(Format):
    """OUT/<split>.jsonl."""

    def __init__(self, folder: Path, split: str) -> None:
        super().__init__(folder, split)
        self._pictures = Pictures(folder / "images")
        self._files["lines"] = (folder / f"{split}.jsonl").open("w", encoding="utf-8")

    def add(self, row: Mapping[str, Any]) -> int:
        """One line a question."""
        turns = list(_turns(row))
        if not turns or len(row["images"]) != 1:
            return 0
        (image,) = self._pictures.names(row)
        for turn, question, asked, reply in turns:
            kind = _TYPES.get(question.form, "OEQ")
            words = _words(question) if kind != "OEQ" else {}
            entry = {
                "question_id": turn["template"],
                "question_type": kind,
                "image_id": image,
                "text": asked,
                "instruction": _TELL if kind == "OEQ" else _CHOOSE,
                "options": list(words.values()),
                "conditions": {"option Y": [], "option N": []},
                "gt_answer": words.get(turn["answer"], reply),
                "metadata": {"image_source": row["source"], "view": _view(question), "attribute_level": "level 1"},
            }
            self._files["lines"].write(json.dumps(entry, ensure_ascii=False) + "\n")
        return len(turns)


class FaceXBench(Format):
    """OUT/benchmark/<item>_single_mcq_<split>.json: the choices that have four options or more, one question each."""

    def __init__(self, folder: Path, split: str) -> None:
        super().__init__(folder / "benchmark", split)
        self._pictures = Pictures(self._folder / "images")

    def add(self, row: Mapping[str, Any]) -> int:
        """One entry a choice."""
        if len(row["images"]) != 1:
            return 0
        written = 0
        for turn, question, asked, right in _turns(row):
            words = {option.value: option.text for option in question.options if option.value != turn["answer"]}
            if question.form != "choice" or len(words) < len(_LETTERS) - 1:
                continue
            others = sorted(words, key=lambda value: draw(2**32, turn["sample_id"], value))[: len(_LETTERS) - 1]
            options = [words[value] for value in others]
            options.insert(draw(len(_LETTERS), turn["sample_id"]), right)
            (image,) = self._pictures.names(row)
            entry = {"image_paths": [f"images/{image}"], "question_text": asked, "options": options}
            self._write(question, entry | {"correct_answer_option": _LETTERS[options.index(right)], "answer": right})
            written += 1
        return written

    def _write(self, question: Question, entry: Mapping[str, Any]) -> None:
        if question.item not in self._files:
            head = {
                "category": question.task,
                "sub-category": question.item,
                "dataset": "face-mllm",
                "question_type": "MCQ",
                "num_images": "single",
                "prepend_text": f"The task is {tasks.get(question.task).use}.",
                "postpend_text": "Answer with the letter of the correct option only: A, B, C or D.",
            }
            path = self._folder / f"{question.item}_single_mcq_{self._split}.json"
            start = json.dumps(head, indent=2, ensure_ascii=False)[:-2] + ',\n  "questions": {'
            self._files[question.item] = JsonList(path, start, "  }\n}\n")
        file = self._files[question.item]
        file.add(entry, key=str(file.count + 1))


def _turns(row: Mapping[str, Any]) -> Iterator[Turn]:
    """The turns that a task of this project asks outright; those of imported benchmarks have none."""
    words = texts(row)
    for turn, asked, reply in zip(row["turns"], words[::2], words[1::2], strict=True):
        try:
            question = tasks.question_of(turn)
        except UserError:
            continue
        if question.variant == NATIVE and not turn["follows"]:
            yield turn, question, asked, reply


def _words(question: Question) -> dict[str, str]:
    """The options of a question in words; FaceBench spells yes and no with capitals."""
    known = {option.value: option.text for option in question.options}
    return {value: text.capitalize() for value, text in known.items()} if question.form == "boolean" else known


def _view(question: Question) -> str:
    if question.item.startswith("Wearing_") or question.item == "eyewear":
        return "Accessories"
    return next((view for task, view in _VIEWS.items() if question.task.startswith(task)), "Appearance")
