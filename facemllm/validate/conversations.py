"""The light columns of a conversations table that the suite looks at, derived in one pass over it."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from facemllm import tasks
from facemllm.core import digests, progress
from facemllm.errors import UserError
from facemllm.tables import CONVERSATIONS, Table, mapping
from facemllm.tasks.asking import DIALOGUE, NOT_VISIBLE, implied
from facemllm.tasks.base import CLOSED, Item, Question
from facemllm.validate.faces import framed, in_one_split
from facemllm.validate.memory import Face, Labels, Tallies, mark
from facemllm.validate.suites import CLOSED_FORMS

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd

Row = Mapping[str, Any]

_LIKENESS = (
    *("split_matches", "subject_matches", "source_matches", "segmentation_matches", "groups_match"),
    "answers_match_labels",
)


def conversations_frame(table: Table, labels: Labels, tallies: Tallies) -> pd.DataFrame:
    """One light row a conversation, with its agreement with the annotated faces in `labels`."""
    import numpy as np
    import pandas as pd

    samples, turns = bytearray(), array("I")

    def rows() -> Iterator[dict[str, Any]]:
        with progress.bar("checking conversations", table.rows) as bar:
            for batch in table.batches(CONVERSATIONS.names):
                held = batch.column("images").to_pylist()
                for row, images in zip(batch.drop_columns(["images"]).to_pylist(), held, strict=True):
                    samples.extend(_fingerprints(row["turns"] or ()))
                    turns.append(len(row["turns"] or ()))
                    yield _conversation(row, images or [], labels.of(row["image_id"]), tallies)
                bar.update(len(turns))

    frame = framed(rows())
    if frame.empty:
        return pd.DataFrame(columns=["row", "image_id"])
    frame["subject_in_one_split"] = in_one_split(frame, "subject_id")
    frame["samples_unique"] = _unique(np.frombuffer(samples, np.uint64), np.frombuffer(turns, np.uint32))
    return frame


def _unique(samples: npt.NDArray[np.uint64], turns: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
    """Whether a row's fingerprints, `turns` of them, occur nowhere else."""
    import numpy as np

    order = np.argsort(samples)
    equal = np.flatnonzero(samples[order[1:]] == samples[order[:-1]])
    owner = np.repeat(np.arange(len(turns)), turns)
    unique = np.ones(len(turns), dtype=bool)
    unique[owner[order[np.concatenate([equal, equal + 1])]]] = False
    return unique


def _conversation(row: Row, images: Sequence[Mapping[str, Any]], face: Face | None, tallies: Tallies) -> dict[str, Any]:
    messages, turns = row["messages"] or [], row["turns"] or []
    kinds = [[part["type"] for part in message["content"] or ()] for message in messages]
    texts = [" ".join(p["text"] or "" for p in m["content"] or () if p["type"] == "text").strip() for m in messages]
    for turn in turns:
        tallies.questions[(turn["task"] or "", row["split"])] += 1
        if turn["form"] in CLOSED_FORMS and ":" not in (turn["template"] or ""):
            tallies.answers[(turn["task"] or "", _item(turn), turn["answer"] or "")] += 1
    return {
        **{name: row[name] for name in ("conversation_id", "image_id", "split", "source", "subject_id")},
        **_like_the_face(row, turns, face),
        "image_matches": len(images) == 1 and digests.of_bytes(images[0]["bytes"] or b"") == row["image_id"],
        "turns_match": len(turns) > 0 and len(messages) == 2 * len(turns),
        "roles_alternate": [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2),
        "image_first": bool(kinds) and kinds[0].count("image") == 1 and not any("image" in k for k in kinds[1:]),
        "texts_filled": all(texts) and all((t["answer"] or "").strip() for t in turns),
        "answers_in_options": all(_answer_fits(turn) for turn in turns),
        **_asked(turns, texts[1::2], face),
    }


def _like_the_face(row: Row, turns: Sequence[Row], face: Face | None) -> dict[str, Any]:
    """Whether a conversation says of its face what the annotated table says."""
    if face is None:
        return {"image_known": False, **dict.fromkeys(_LIKENESS), "wrong_answers": ""}
    mask = row["segmentation"]
    wrong = [turn for turn in turns if not _true(turn, face)]
    return {
        "image_known": True,
        "split_matches": face.split == mark(row["split"]),
        "subject_matches": face.subject_id == mark(row["subject_id"]),
        "source_matches": face.source == mark(row["source"]),
        "segmentation_matches": face.segmentation == mark(mask and (mask["bytes"] or b"")),
        "groups_match": face.groups == mark(sorted(mapping(row["groups"]).items())),
        "answers_match_labels": not wrong,
        "wrong_answers": ", ".join(f"{_item(turn)}: {turn['answer']}" for turn in wrong),
    }


def _true(turn: Row, face: Face) -> bool:
    """Whether a turn answers what the label of the face says, or what follows from that in the way it was asked."""
    question, labelled = _question(turn), face.answers.get((turn["task"], _item(turn)))
    if labelled is None:
        return True  # what other checks say
    if question is None or question.variant in ("native", "unseen") or question.form in ("number", "open", "several"):
        return labelled == mark(turn["answer"])
    label = _values(question.task, question.item).get(labelled)
    if label == NOT_VISIBLE and question.variant == DIALOGUE:
        return turn["answer"] == "no"  # what cannot be seen is said not to be there, and nothing is asked of it
    return label is not None and implied(tasks.get(question.task), question, label) == turn["answer"]


def _asked(turns: Sequence[Row], replies: Sequence[str], face: Face | None) -> dict[str, Any]:
    """Whether the tasks ask every question, and every reply puts its canonical answer into words."""
    unknown = [f"{turn['task']} {turn['template']}" for turn in turns if _question(turn) is None]
    odd = [
        f"{_item(turn)}: {turn['answer']} as '{reply}'"
        for turn, reply in zip(turns, replies, strict=False)
        if not _says(turn, reply, face)
    ]
    return {
        "questions_known": not unknown,
        "unknown_questions": ", ".join(unknown),
        "replies_say_answers": not odd,
        "odd_replies": ", ".join(odd),
    }


def _says(turn: Row, reply: str, face: Face | None) -> bool:
    question, answer = _question(turn), turn["answer"]
    if question is None or not reply or not (answer or "").strip():
        return True  # what other checks say
    if question.form == "open" and face is not None and face.caption == mark(reply):
        return True
    if question.form == "number":
        return _says_number(tasks.get(question.task).item(question.item), answer, reply)
    said = next((option.text for option in question.options if option.value == answer), None)
    return reply == said or tasks.read(question, reply) == answer


def _says_number(item: Item, answer: str, reply: str) -> bool:
    try:
        option = item.option_for(answer)
        return reply == option.text or ((read := item.parse(reply)) is not None and item.option_for(read) == option)
    except ValueError:
        return False


def _question(turn: Row) -> Question | None:
    template = turn["template"] or ""
    return _known(turn["task"] or "", template, tuple(turn["options"] or ()) if ":lettered/" in template else ())


@lru_cache(maxsize=50_000)
def _known(task: str, template: str, options: tuple[str, ...]) -> Question | None:
    try:
        return tasks.question_of({"task": task, "template": template, "options": options})
    except UserError:
        return None


@cache
def _values(task: str, item: str) -> Mapping[bytes, str]:
    """What an item can be answered, by its mark."""
    return {mark(value): value for value in (*(o.value for o in tasks.get(task).item(item).options), NOT_VISIBLE)}


def _item(turn: Row) -> str:
    return str(turn["template"] or "").rpartition("/")[0].partition(":")[0]


def _answer_fits(turn: Row) -> bool:
    """A number's options are a grid, and its answer is exact."""
    return turn["form"] not in CLOSED or turn["form"] == "number" or turn["answer"] in (turn["options"] or ())


def _fingerprints(turns: Sequence[Row]) -> bytes:
    """Eight bytes a sample_id: enough to find a repeated one among millions, light enough to hold them all."""
    return b"".join(hashlib.blake2b((turn["sample_id"] or "").encode(), digest_size=8).digest() for turn in turns)
