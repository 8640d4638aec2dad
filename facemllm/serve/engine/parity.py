"""Whether a server answers as evaluation did, asked over HTTP about held-out faces: what is served was evaluated.

Every closed question that evaluation put to these faces in its item's own form is put to the running server, several
faces at a time, so that they share batches. Compared are the probabilities of the options, the best option and the
number. On float32 nothing but rounding may differ; bfloat16 has its own, larger limits. A best option may differ only
where evaluation's two best were nearer to each other than rounding goes.
"""

from __future__ import annotations

import base64
import heapq
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from facemllm import tasks
from facemllm.core import cost, servers
from facemllm.errors import UserError
from facemllm.scoring.metrics import number
from facemllm.settings import Settings
from facemllm.tables import CONVERSATIONS, PREDICTIONS, Table, mapping, open_table
from facemllm.tasks.asking import NATIVE

LISTED = 100
"""Most differences that a record lists; all are counted."""
_AT_ONCE = 4
_SECONDS = 120.0
_TRIES = 30  # where the server says that it is busy
_BUSY = 429


@dataclass(frozen=True)
class Allowed:
    """How far a server may be from evaluation: a probability, and a number (years, degrees)."""

    probability: float
    number: float


class NotEqual(UserError):
    """A server that differs from evaluation by more than is allowed, with the record of the comparison."""

    def __init__(self, line: str, record: Mapping[str, Any]) -> None:
        super().__init__(line)
        self.record = record


ALLOWED: Mapping[str, Allowed] = {
    "float32": Allowed(probability=0.001, number=0.02),
    "bfloat16": Allowed(probability=0.05, number=1.0),
}


@dataclass(frozen=True)
class Asked:
    """A closed question about a face, and evaluation's answer: `scores` by the option's value, `value` None where the
    model would have written no option of its own accord."""

    image_id: str
    task: str
    item: str
    form: str
    question: str
    value: str | None
    scores: Mapping[str, float]

    @property
    def margin(self) -> float:
        """How much likelier the likeliest option is than the next."""
        first, *rest = heapq.nlargest(2, self.scores.values())
        return first - (rest[0] if rest else 0.0)


@dataclass(frozen=True)
class Difference:
    """An answer of the server that is not evaluation's. `margin` is evaluation's, `probability` the largest difference
    of an option's probability, `number` that of the answer where it is one."""

    image_id: str
    task: str
    item: str
    question: str
    evaluated: str | None
    served: str | None
    margin: float
    probability: float
    number: float | None


@dataclass(frozen=True)
class Face:
    """A held-out face: its picture and, where evaluation showed one, the map of its parts; and what it is asked."""

    image: bytes
    map: bytes | None
    asked: Sequence[Asked]


def parity(
    settings: Settings, endpoint_url: str, model: str, predictions: Path, conversations: Path, count: int
) -> dict[str, Any]:
    """Compare the server at `endpoint_url` with evaluation on `count` faces; `predictions` is evaluation's table,
    `conversations` the one it answers. The record holds agreement, differences with their margins, the largest
    difference of a probability, engine and dtype.

    Raises NotEqual when the server serves another model, answers no question that can be compared, or differs by more
    than is allowed, and UserError when there is nothing to ask or the server refuses.
    """
    headers = servers.authorization()
    info = _json(httpx.get(f"{endpoint_url}/info", headers=headers, timeout=_SECONDS, trust_env=False))
    table = open_table(predictions, PREDICTIONS)
    faces = list(held_out(table, open_table(conversations, CONVERSATIONS), info["tasks"], count))
    if not any(face.asked for face in faces):
        raise UserError(
            f"{predictions}: evaluation asked no closed question that the server knows; add its task to reformat.tasks"
        )
    served = str(info.get("dtype", "float32"))
    evaluated = "bfloat16" if cost.inference_device(settings).startswith("cuda") else "float32"
    allowed = ALLOWED["bfloat16" if "bfloat16" in (served, evaluated) else "float32"]
    with (
        httpx.Client(headers=headers, timeout=_SECONDS, trust_env=False) as client,
        ThreadPoolExecutor(_AT_ONCE) as pool,
    ):
        url = f"{endpoint_url}/v1/models/{model}:predict"
        size = settings.serve.max_instances
        replies = pool.map(lambda face: list(_answers(client, url, face, size)), faces)
        pairs = [
            pair for face, found in zip(faces, replies, strict=True) for pair in zip(face.asked, found, strict=True)
        ]
    record = {"model_digest": info["digest"], "predictions_digest": table.digest, "engine": info.get("engine", "own")}
    record |= {"dtype": served, "evaluated_dtype": evaluated, "allowed": asdict(allowed), "faces": len(faces)}
    return _judged(record | compared(pairs), allowed, info["digest"] == table.manifest["about"].get("model_digest"))


def held_out(predictions: Table, conversations: Table, served: Sequence[str], count: int) -> Iterator[Face]:
    """The `count` faces of the evaluated split with the smallest digests, and the closed questions of the tasks
    `served` that evaluation put to them in the item's own form."""
    about = predictions.manifest["about"]
    ids = {name for batch in predictions.batches(["image_id"]) for name in batch.column(0).to_pylist()}
    chosen = set(heapq.nsmallest(count, ids))
    rows = {
        row["sample_id"]: row
        for row in predictions.iterate(["sample_id", "image_id", "task", "question", "parsed", "scores"])
        if row["image_id"] in chosen and row["scores"] and row["task"] in served
    }
    columns = ["image_id", "images", "turns", *(["segmentation"] if about.get("maps") else [])]
    for face in conversations.iterate(columns, about["split"]):
        if face["image_id"] in chosen:
            turns = [turn for turn in face["turns"] if turn["sample_id"] in rows]
            asked = [one for turn in turns if (one := _asked(turn, rows[turn["sample_id"]])) is not None]
            parts = (face.get("segmentation") or {}).get("bytes")
            yield Face(face["images"][0]["bytes"], parts, asked)


def _asked(turn: Mapping[str, Any], row: Mapping[str, Any]) -> Asked | None:
    question = tasks.question_of(turn)
    if question.variant != NATIVE or not question.options:
        return None
    scores = mapping(row["scores"])
    name = question.task, question.item
    return Asked(row["image_id"], *name, question.form, row["question"], row["parsed"], scores)


def compared(pairs: Sequence[tuple[Asked, Mapping[str, Any]]]) -> dict[str, Any]:
    """What questions and the server's answers to them (`value`, `scores`, `kind`) have in common."""
    found: list[Difference] = []
    withheld: Counter[str] = Counter()
    kinds = {"options": [0, 0], "numbers": [0, 0]}
    probability = furthest = 0.0
    for asked, reply in pairs:
        if not reply.get("scores"):
            withheld[str(reply.get("kind") or "free")] += 1
            continue
        one = _difference(asked, reply)
        numeric = asked.form == "number"
        probability, furthest = max(probability, one.probability), max(furthest, one.number or 0.0)
        same = one.evaluated == one.served
        counts = kinds["numbers" if numeric else "options"]
        counts[0] += 1
        counts[1] += same
        if not same:
            found.append(one)
    found.sort(key=lambda one: (one.number is not None, -one.margin))
    return {
        "questions": len(pairs) - withheld.total(),
        "withheld": dict(sorted(withheld.items())),
        "agreement": {name: same / asked if asked else None for name, (asked, same) in kinds.items()},
        "different": len(found),
        "differences": [asdict(one) for one in found[:LISTED]],
        "largest_probability_difference": probability,
        "largest_number_difference": furthest,
    }


def _difference(asked: Asked, reply: Mapping[str, Any]) -> Difference:
    scores = reply["scores"]
    if set(scores) != set(asked.scores):
        probability = 1.0
    else:
        probability = max(abs(float(scores[value]) - p) for value, p in asked.scores.items())
    evaluated, served, far = asked.value, reply["value"], None
    first, second = number(evaluated), number(served)
    if asked.form == "number" and first is not None and second is not None:
        far = abs(first - second)
    about = asked.image_id, asked.task, asked.item, asked.question
    return Difference(*about, evaluated, served, asked.margin, probability, far)


def _judged(record: dict[str, Any], allowed: Allowed, same_model: bool) -> dict[str, Any]:
    what = ""
    if not same_model:
        what = f"it serves {record['model_digest'][:12]}, which is not the model that was evaluated"
    elif not record["questions"] and set(record["withheld"]) != {"refused"}:  # all refused: the policy's own
        what = f"it answers none of the questions: {record['withheld']}"
    elif (far := record["largest_probability_difference"]) > allowed.probability:
        what = f"a probability differs by {far:.4f}, allowed is {allowed.probability}"
    elif (far := record["largest_number_difference"]) > allowed.number:
        what = f"a number differs by {far:.2f}, allowed is {allowed.number}"
    elif wide := [one for one in record["differences"] if one["number"] is None]:
        one = wide[0]
        if one["margin"] <= 2 * allowed.probability:
            return record
        said = f"'{one['served']}' instead of '{one['evaluated']}' (margin {one['margin']:.3f})"
        what = f"to '{one['question']}' about {one['image_id'][:12]} it says {said}"
    if what:
        raise NotEqual(f"the server answers otherwise than evaluation ({record['dtype']}): {what}", record)
    return record


def _answers(client: httpx.Client, url: str, face: Face, size: int) -> list[Mapping[str, Any]]:
    """The server's answers to a face's questions, in order, at most `size` a request."""
    shown = {"image": {"b64": base64.b64encode(face.image).decode()}}
    if face.map is not None:
        shown["segmentation"] = {"b64": base64.b64encode(face.map).decode()}
    found: list[Mapping[str, Any]] = []
    for start in range(0, len(face.asked), size):
        instances = [{**shown, "question": one.question} for one in face.asked[start : start + size]]
        for _ in range(_TRIES):
            reply = client.post(url, json={"instances": instances})
            if reply.status_code != _BUSY:
                break
            time.sleep(float(reply.headers.get("retry-after", 1)))
        found += _json(reply)["predictions"]
    return found


def _json(reply: httpx.Response) -> Any:
    if reply.is_error:
        raise UserError(f"{reply.request.url} refused: {reply.text[:1000]}")
    return reply.json()
