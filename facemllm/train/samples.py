"""What is shown of a stage: answers to the same few questions every time, and the audited logical relations.

Each question is answered twice: freely, as the model writes, and by the likelihood of its options. On the laptop
profile that takes one to two seconds, half of which goes into finding the faces in the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facemllm import tasks
from facemllm.core import cost
from facemllm.settings import Settings
from facemllm.tables import Table
from facemllm.tasks.asking import NATIVE
from facemllm.tasks.characteristics import characteristics, relations_of
from facemllm.train.data import read_turns
from facemllm.train.penalties import audit, enforced

FACES = 4
QUESTIONS = 2
"""Of each task: its first that the conversations ask about one of the faces."""
_TOKENS = 48

_COLUMNS = ["image_id", "images", "segmentation", "turns"]


@dataclass(frozen=True)
class Fixed:
    """A face, with its map if it has one, and the true answers known of it, by task and item."""

    image_id: str
    image: bytes
    map: bytes | None
    answers: Mapping[tuple[str, str], str]


def fixed_faces(conversations: Table) -> list[Fixed]:
    """The validation faces with the smallest digests: a draw that no eye has made, the same for every stage and model.
    Of the training faces where a table has no validation split."""
    for split in ("validation", "train"):
        names = (name for batch in conversations.batches(["image_id"], split) for name in batch.column(0).to_pylist())
        if chosen := sorted(set(names))[:FACES]:
            rows = (row for row in conversations.iterate(_COLUMNS, split) if row["image_id"] in chosen)
            found = {row["image_id"]: _face(row) for row in rows}
            return [found[name] for name in chosen]
    return []


def sample_answers(settings: Settings, model_dir: Path, conversations: Table) -> list[dict[str, Any]]:
    """A row an answer: `image_id`, `task`, `item`, `question`, `truth` (None where unknown), what was `written`, and,
    of closed questions, the `likeliest` option with its `probability`. Raises UserError if the model cannot be loaded.
    """
    from facemllm.model.inference import Predictor, Query

    faces = fixed_faces(conversations)
    # so few answers: threads would wait for one another longer than they help
    predictor = Predictor.load(model_dir, device=cost.inference_device(settings), threads=settings.train.threads or 1)
    asked = _questions(settings, faces)
    pixels = [predictor.pixels(face.image) for face in faces]
    maps = [face.map for face in faces]
    queries = [Query(one.templates[0], tuple(option.text for option in one.options)) for one in asked if one.options]
    scored = predictor.score(pixels, [queries] * len(faces), maps)
    # all questions of the first face, then of the next, in as few batches as may be
    images, beside = [image for image in pixels for _ in asked], [one for one in maps for _ in asked]
    words = [question.templates[0] for question in asked] * len(faces)
    texts = iter(predictor.generate_batch(images, words, _TOKENS, beside))
    rows = []
    for place, face in enumerate(faces):
        likely = iter(scored[place])
        for question in asked:
            row: dict[str, Any] = {
                "image_id": face.image_id,
                "task": question.task,
                "item": question.item,
                "question": question.templates[0],
                "truth": face.answers.get((question.task, question.item)),
                "written": next(texts),
                "likeliest": None,
                "probability": None,
            }
            if question.options:
                best = next(likely)
                chance = round(best.probabilities[best.best], 4)
                row |= {"likeliest": question.options[best.best].value, "probability": chance}
            rows.append(row)
    return rows


def _face(row: Mapping[str, Any]) -> Fixed:
    answers = {}
    for turn in row["turns"]:
        question = tasks.question_of(turn)
        if question.variant == NATIVE:
            answers[question.task, question.item] = turn["answer"]
    return Fixed(row["image_id"], row["images"][0]["bytes"], (row["segmentation"] or {}).get("bytes"), answers)


def _questions(settings: Settings, faces: list[Fixed]) -> list[tasks.Question]:
    known = {key for face in faces for key in face.answers}
    found = []
    for name in settings.reformat.tasks:
        task = tasks.get(name)
        asked = [question for question in task.questions() if (name, question.item) in known]
        found += [question for question in asked if task.item(question.item).wordings_agree][:QUESTIONS]
    return found


def audited_relations(settings: Settings, conversations: Table) -> list[dict[str, Any]]:
    """A row a relation: `relation`, on how many training faces it can be `checked`, how many `broken`, the share
    as `rate` (None where none can be checked), and whether it is `enforced`. Raises UserError as training does."""
    knows = settings.model.knowledge
    known = characteristics(knows.tasks, read_turns(conversations, "train"))
    found = audit(relations_of(knows.tasks, known.nodes), known)
    kept = {str(relation) for relation in enforced(found, knows.audit)}
    return [
        {
            "relation": str(one.relation),
            "checked": one.spoken,
            "broken": one.broken,
            "rate": None if one.rate is None else round(one.rate, 6),
            "enforced": str(one.relation) in kept,
        }
        for one in found
    ]
