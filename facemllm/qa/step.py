"""The step `reformat`: every known label of a face becomes a turn of a conversation about it.

The caption comes first, then the tasks in the order of the settings. A question's wording is drawn by a hash of image
and item, so that adding a source, a row or a task leaves all other turns as they are. Rows stream; memory is flat.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from facemllm import digests, ledger, progress, tasks
from facemllm.records import CONVERSATIONS, FACES, TableWriter, open_table, pairs
from facemllm.settings import Settings
from facemllm.tasks import Question, Task
from facemllm.tombstones import FORGOTTEN, Tombstones

_COLUMNS = (
    *("image_id", "original_id", "image", "source", "source_id", "subject_id", "split", "segmentation", "caption"),
    *("attributes", "expression", "age", "gender", "skin_tone", "yaw", "pitch", "roll"),
)


def reformat(settings: Settings, faces: Path, out: Path) -> Mapping[str, Any]:
    """Write the conversations about `faces` to `out`. Returns the manifest.

    A row whose labels answer no question, or that was forgotten, goes to quarantine. Raises UserError if a task is
    unknown, `faces` is no sound table, or `out` exists.
    """
    asked = [tasks.get(name) for name in dict.fromkeys(settings.qa.tasks)]
    asked.sort(key=lambda task: task.name != "caption")
    table = open_table(faces, FACES)
    ledger.require(settings, table.sources)
    about = {"tasks": [task.name for task in asked], **table.terms}
    forgotten = Tombstones.of(settings)
    writer = TableWriter(out, CONVERSATIONS, parents=[table.digest], about=about, shard_mb=settings.data.shard_mb)
    with writer, progress.bar("making questions", table.rows) as bar:
        for number, row in enumerate(table.iterate(_COLUMNS)):
            if forgotten.covers(row):
                writer.quarantine(table.digest, number, FORGOTTEN)
            elif found := conversation(row, asked):
                writer.write([found])
            else:
                writer.quarantine(table.digest, number, "no known label answers a question")
            bar.update(number + 1)
    return writer.manifest


def conversation(row: Mapping[str, Any], asked: Sequence[Task]) -> dict[str, Any] | None:
    """All that can be asked about a row of `faces`, as a row of `conversations`; None if nothing can."""
    messages: list[dict[str, Any]] = []
    turns = []
    for task in asked:
        for question in task.questions():
            label = task.label(row, question.item)
            if label is None:
                continue
            text = row["caption"] if question.form == "open" else task.option_for(question.item, label).text
            index = tasks.draw(len(question.templates), row["image_id"], question.item)
            messages += _exchange(question.templates[index], text, with_image=not messages)
            turns.append(_turn(question, row["image_id"], index, label))
    if not turns:
        return None
    made = {
        "image_id": row["image_id"],
        "split": row["split"],
        "source": row["source"],
        "subject_id": row["subject_id"],
        "groups": pairs(tasks.groups(row)),
        "messages": messages,
        "turns": turns,
    }
    mask = row["segmentation"]
    content = {**made, "segmentation": mask and digests.of_bytes(mask["bytes"] or b"")}
    return {
        **made,
        "conversation_id": digests.of_json(content),
        "images": [row["image"]],
        "segmentation": mask,
    }


def _exchange(question: str, answer: str, *, with_image: bool) -> Iterator[dict[str, Any]]:
    picture = [{"type": "image", "text": None}] if with_image else []
    yield {"role": "user", "content": [*picture, {"type": "text", "text": question}]}
    yield {"role": "assistant", "content": [{"type": "text", "text": answer}]}


def _turn(question: Question, image_id: str, index: int, label: str) -> dict[str, Any]:
    template = f"{question.item}/{index}"
    return {
        "sample_id": digests.of_json([image_id, question.task, question.item, template]),
        "task": question.task,
        "form": question.form,
        "template": template,
        "options": [option.value for option in question.options],
        "answer": label,
        "follows": False,
    }
