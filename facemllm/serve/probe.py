"""What a server is proved by: one question about one face, answered as evaluation did."""

from __future__ import annotations

import base64
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

    @property
    def instance(self) -> dict[str, Any]:
        """As an instance of a `:predict` request."""
        maps = {} if self.segmentation is None else {"segmentation": _encoded(self.segmentation)}
        return {"image": _encoded(self.image), "question": self.question, **maps}


def probe_of(store: Store, evaluation: str) -> Probe:
    """One closed question about one held-out face that evaluation answered, with the face's very bytes: the first of
    `probes_of`."""
    return probes_of(store, evaluation, 1)[0]


def probes_of(store: Store, evaluation: str, count: int) -> list[Probe]:
    """Up to so many closed questions about held-out faces, those first whose answers are words that could be read."""
    folder = store.path(evaluation)
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    samples = json.loads((folder / "samples" / "samples.json").read_text("utf-8"))
    asked = [(s["image_id"], q, get(q["metric"]).answers) for s in samples for q in s["questions"]]
    asked = [one for one in asked if tasks.get(one[1]["task"]).item(one[1]["item"]).options]
    if not asked:
        silent = "evaluation asked no closed question that staging could be proved by"
        raise UserError(f"{silent}; add a task to reformat.tasks")
    asked.sort(key=lambda one: (one[1]["parsed"] is not None, one[2] != "number"), reverse=True)  # stable
    wanted = {image_id for image_id, *_ in asked[:count]}
    conversations = open_table(store.path(metrics["conversations_digest"]), CONVERSATIONS)
    faces: dict[str, tuple[bytes, bytes | None]] = {}
    for face in conversations.iterate(["image_id", "images", "segmentation"], metrics["split"]):
        if face["image_id"] in wanted:
            map_ = (face["segmentation"] or {}).get("bytes") if metrics.get("maps") else None
            faces[face["image_id"]] = face["images"][0]["bytes"], map_
            if len(faces) == len(wanted):
                break
    return [
        Probe(faces[image_id][0], q["question"], q["raw"], q["parsed"], faces[image_id][1])
        for image_id, q, _ in asked[:count]
    ]


def _encoded(data: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(data).decode()}


def same_answer(probe: Probe, found: Mapping[str, Any]) -> bool:
    """Whether a server answers a probe as evaluation did: the same value and words, a number within `TOLERANCE`.

    Of a question that evaluation found no value for, it keeps what was freely written, or the likeliest option in
    brackets: then that option has to be the server's, too. What the server's policy refuses it need not answer.
    """
    if found.get("kind") == "refused":
        return True
    if (probe.value is None) != (found["value"] is None):
        return False
    said = str(found["answer"])
    if probe.value is None:
        return not probe.answer.startswith("(") or said in probe.answer or number(said) is not None
    first, second = number(probe.answer), number(said)
    if first is not None and second is not None:
        return abs(first - second) <= TOLERANCE
    return probe.answer == said and probe.value == found["value"]
