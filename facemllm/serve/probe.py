"""What a server is proved by: one question about one face, answered as evaluation did."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from facemllm import tasks
from facemllm.core.store import Store
from facemllm.errors import UserError
from facemllm.scoring.metrics import get, number
from facemllm.tables import CONVERSATIONS, open_table

TOLERANCE = 0.02  # of a number: the last of its two decimals may fall differently in another batch


@dataclass(frozen=True)
class Probe:
    """One question about one held-out face, and what evaluation answered: text, and value (None if it found none).

    `segmentation` is the map of its parts that evaluation showed beside it, None if it showed none.
    """

    image: bytes
    question: str
    answer: str
    value: str | None
    segmentation: bytes | None = None


def probe_of(store: Store, evaluation: str) -> Probe:
    """One closed question about one held-out face that evaluation answered, with the face's very bytes."""
    folder = store.path(evaluation)
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    samples = json.loads((folder / "samples" / "samples.json").read_text("utf-8"))
    asked = [(s["image_id"], q, get(q["metric"]).answers) for s in samples for q in s["questions"]]
    asked = [one for one in asked if tasks.get(one[1]["task"]).item(one[1]["item"]).options]
    if not asked:
        silent = "evaluation asked no closed question that staging could be proved by"
        raise UserError(f"{silent}; add a task to reformat.tasks")
    image_id, question, _ = max(asked, key=lambda one: (one[1]["parsed"] is not None, one[2] != "number"))
    conversations = open_table(store.path(metrics["conversations_digest"]), CONVERSATIONS)
    faces = conversations.iterate(["image_id", "images", "segmentation"], metrics["split"])
    face = next(face for face in faces if face["image_id"] == image_id)
    segmentation = (face["segmentation"] or {}).get("bytes") if metrics.get("maps") else None
    return Probe(face["images"][0]["bytes"], question["question"], question["raw"], question["parsed"], segmentation)


def same_answer(probe: Probe, found: Mapping[str, Any]) -> bool:
    """Whether a server answers a probe as evaluation did: the same value and words, a number within `TOLERANCE`.

    Of a question that evaluation found no value for, it keeps what was freely written, or the likeliest option in
    brackets: then that option has to be the server's, too.
    """
    if (probe.value is None) != (found["value"] is None):
        return False
    said = str(found["answer"])
    if probe.value is None:
        return not probe.answer.startswith("(") or said in probe.answer or number(said) is not None
    first, second = number(probe.answer), number(said)
    if first is not None and second is not None:
        return abs(first - second) <= TOLERANCE
    return probe.answer == said and probe.value == found["value"]
