"""Answers of a model to the questions of a split, as a predictions table.

Closed questions are never generated: all questions of a batch of faces go into one scoring call, answered by the rule
serving uses (`tasks.answers`). Strict all the same: where free greedy decoding would not have given any option, the
model has not understood the question, and `parsed` stays empty and counts as wrong. Open questions are generated.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from PIL import Image

from facemllm import progress, tasks
from facemllm.errors import UserError
from facemllm.records import Table, TableWriter, pairs
from facemllm.scoring.metrics import is_asked
from facemllm.settings import Settings
from facemllm.tasks.answers import answer

COLUMNS = ["image_id", "images", "subject_id", "groups", "messages", "turns"]


def predict(
    predictor: Any, conversations: Table, split: str, settings: Settings, writer: TableWriter, model_digest: str
) -> None:
    """Ask `predictor` every question of the split that stands alone, and write its answers in table order.

    Memory is that of one batch of `evaluation.batch_images` faces.
    """
    total = sum(batch.num_rows for batch in conversations.batches(["image_id"], split))
    rows = conversations.iterate(COLUMNS, split)
    done = 0
    with progress.bar("evaluating", total) as bar:
        while batch := list(islice(rows, settings.evaluation.batch_images)):
            for row in _answer(predictor, batch, settings.evaluation.max_new_tokens):
                writer.write([{**row, "model_digest": model_digest}])
            done += len(batch)
            bar.update(done, f"{done} of {total} faces answered")


def open_image(face: Mapping[str, Any]) -> Image.Image:
    """The image of a conversation, decoded to RGB."""
    return Image.open(io.BytesIO(face["images"][0]["bytes"])).convert("RGB")


def question_texts(face: Mapping[str, Any]) -> list[str]:
    """The text of each turn's question, in the order of `turns`. Raises UserError when messages and turns disagree."""
    asked = [
        " ".join(part["text"] for part in message["content"] if part["type"] == "text")
        for message in face["messages"]
        if message["role"] == "user"
    ]
    if len(asked) != len(face["turns"]):
        raise UserError(
            f"image {face['image_id'][:12]}: {len(asked)} questions in messages, {len(face['turns'])} turns; "
            "make the conversations again"
        )
    return asked


def _answer(predictor: Any, faces: Sequence[Mapping[str, Any]], max_new_tokens: int) -> Iterator[dict[str, Any]]:
    from facemllm.model.inference import Query

    images = [open_image(face) for face in faces]
    asked = [
        [
            (turn, text, tasks.question_of(turn))
            for turn, text in zip(face["turns"], question_texts(face), strict=True)
            if is_asked(turn)
        ]
        for face in faces
    ]
    closed = [
        [
            Query(text, tuple(option.text for option in question.options))
            for _, text, question in turns
            if question.options
        ]
        for turns in asked
    ]
    opened = [
        (image, text) for image, turns in zip(images, asked, strict=True) for _, text, q in turns if not q.options
    ]
    scored = predictor.score(images, closed)
    written = iter(
        predictor.generate_batch([image for image, _ in opened], [text for _, text in opened], max_new_tokens)
        if opened
        else []
    )
    for face, turns, answers in zip(faces, asked, scored, strict=True):
        remaining = iter(answers)
        for turn, text, question in turns:
            found = _chosen(question, next(remaining)) if question.options else _written(question, next(written))
            yield {
                "sample_id": turn["sample_id"],
                "image_id": face["image_id"],
                "subject_id": face["subject_id"],
                "task": turn["task"],
                "question": text,
                "answer": turn["answer"],
                "groups": face["groups"],
                **found,
            }


def _written(question: Any, text: str) -> dict[str, Any]:
    return {"raw": text, "parsed": tasks.get(question.task).parse(question.item, text)}


def _chosen(question: Any, scored: Any) -> dict[str, Any]:
    sound = all(
        math.isfinite(p) for p in scored.probabilities
    )  # a broken model answers nothing, whatever it is sure of
    found = answer(question, scored.probabilities, scored.greedy if sound else None)
    return {"raw": found.text, "parsed": found.value, "scores": pairs(found.scores)}
