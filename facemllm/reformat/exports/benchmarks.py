"""Formats to evaluate with: rows of FaceBench, files of FaceXBench. Every question stands alone, in its own form.

FaceBench (datasets/example/test.jsonl, evaluation/inference.py): question_id, question_type (TFQ, SCQ, OEQ), image_id,
text, instruction, options, conditions (follow-up questions of a yes: ours have none), gt_answer, metadata. Its views
are its own; we sort our tasks into them by what they ask.
FaceXBench (benchmark/*.json): one object a file with category, sub-category and questions of exactly four options.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from facemllm import tasks
from facemllm.core.draws import draw
from facemllm.errors import UserError
from facemllm.reformat.exports.writing import JsonList, Pictures, texts
from facemllm.tasks.asking import NATIVE
from facemllm.tasks.base import Question

_VIEWS = {"expression": "Psychology", "age": "Identity", "gender": "Identity", "ethnicity": "Identity"}
_TYPES = {"boolean": "TFQ", "choice": "SCQ"}
_CHOOSE, _TELL = "Answer with one of the options.", "Answer in a few words, or as many sentences as it takes."
_LETTERS = "ABCD"

Turn = tuple[Mapping[str, Any], Question, str, str]
"""A stored turn, its question, the words that ask and the words that answer."""


class FaceBench:
    """OUT/<split>.jsonl."""

    def __init__(self, folder: Path, split: str) -> None:
        self._pictures = Pictures(folder / "images")
        self._file = (folder / f"{split}.jsonl").open("w", encoding="utf-8")

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
                "metadata": {
                    "image_source": row["source"],
                    "view": _view(question),
                    "attribute_level": "level 1",
                },
            }
            self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        return len(turns)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class FaceXBench:
    """OUT/benchmark/<item>_single_mcq_<split>.json: the choices that have four options or more, one question each."""

    def __init__(self, folder: Path, split: str) -> None:
        self._folder, self._split = folder / "benchmark", split
        self._pictures = Pictures(self._folder / "images")
        self._files: dict[str, tuple[JsonList, int]] = {}

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
            self._write(
                question,
                {
                    "image_paths": [f"images/{image}"],
                    "question_text": asked,
                    "options": options,
                    "correct_answer_option": _LETTERS[options.index(right)],
                    "answer": right,
                },
            )
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
            self._files[question.item] = JsonList(path, start, "  }\n}\n"), 0
        file, count = self._files[question.item]
        file.add(entry, key=str(count + 1))
        self._files[question.item] = file, count + 1

    def close(self) -> None:
        """End every file."""
        for file, _ in self._files.values():
            file.close()


def _turns(row: Mapping[str, Any]) -> Iterator[Turn]:
    """The turns that a task of this project asks outright; those of imported benchmarks have none."""
    words = texts(row)
    for turn, asked, reply in zip(row["turns"], words[::2], words[1::2], strict=True):
        try:
            question = tasks.question_of(turn)
        except UserError:
            continue
        if question.way == NATIVE and not turn["follows"]:
            yield turn, question, asked, reply


def _words(question: Question) -> dict[str, str]:
    """The options of a question in words; FaceBench spells yes and no with capitals."""
    known = {option.value: option.text for option in question.options}
    return {value: text.capitalize() for value, text in known.items()} if question.form == "boolean" else known


def _view(question: Question) -> str:
    if question.item.startswith("Wearing_") or question.item == "eyewear":
        return "Accessories"
    return next((view for task, view in _VIEWS.items() if question.task.startswith(task)), "Appearance")
