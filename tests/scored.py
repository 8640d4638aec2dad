"""Small sheets and tables of questions and answers, for the tests of scoring."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from facemllm import tasks
from facemllm.scoring.sheet import KINDS, Sheet, Variant
from facemllm.tables import CONVERSATIONS, PREDICTIONS, TableWriter, open_table, pairs


def template(item: str, way: str = "native", claim: str | None = None) -> str:
    """The name of a wording."""
    return {"native": f"{item}/0", "statement": f"{item}:statement={claim}/0"}.get(way, f"{item}:{way}/0")


def sheet_of(
    rows: Sequence[tuple[Any, ...]], groups: Mapping[int, Mapping[str, str]] | None = None, split: str = "test"
) -> Sheet:
    """A sheet from (image, person, task, item, answer[, way[, claim]]); `groups` by image."""
    images = list(dict.fromkeys(row[0] for row in rows))
    people = {row[0]: row[1] for row in rows}
    own: dict[tuple[str, str], list[int]] = {}
    variants: dict[Variant, list[int]] = {}
    for place, (_, _, task, item, _, *how) in enumerate(rows):
        if how and how[0] != "native":
            variants.setdefault(Variant(task, item, how[0], how[1] if len(how) > 1 else None), []).append(place)
        else:
            own.setdefault((task, item), []).append(place)
    return Sheet(
        split=split,
        sample_ids=pa.array([str(place) for place in range(len(rows))]),
        images=[str(image) for image in images],
        faces=np.array([images.index(row[0]) for row in rows], dtype=np.int32),
        people=np.array([people[image] for image in images]),
        answers=[row[4] for row in rows],
        rows={key: np.array(own[key]) for key in sorted(own)},
        variants={how: np.array(where) for how, where in variants.items()},
        questions={(row[2], row[3]): tasks.get(row[2]).question(row[3]) for row in rows},
        groups={kind: [((groups or {}).get(image) or {}).get(kind) for image in images] for kind in KINDS},
    )


def write_conversations(
    out: Path,
    rows: Iterable[tuple[Any, ...]],
    groups: Mapping[Any, Mapping[str, str]] | None = None,
    split: str = "test",
) -> Path:
    """A table of conversations from rows as `sheet_of` takes them, with sample ids `0`, `1`, ... in their order."""
    faces: dict[Any, dict[str, Any]] = {}
    for place, (image, person, task, item, answer, *how) in enumerate(rows):
        way, claim = (*how, None, None)[:2]
        names = {"conversation_id": f"c{image}", "image_id": str(image), "subject_id": f"p{person}", "split": split}
        own = {"groups": pairs((groups or {}).get(image) or {}), "images": [{"bytes": b"", "path": None}]}
        face = faces.setdefault(image, {**names, **own, "source": "render", "turns": []})
        turn = {"sample_id": str(place), "task": task, "template": template(item, way or "native", claim)}
        options = [option.value for option in tasks.get(task).question(item).options]
        face["turns"].append({**turn, "options": options, "answer": answer, "follows": False})
    with TableWriter(out, CONVERSATIONS) as writer:
        writer.write(faces.values())
    return out


def write_predictions(
    out: Path,
    parsed: Sequence[str | None] | Mapping[int, str | None],
    raw: Sequence[str | None] | None = None,
    scores: Sequence[Mapping[str, float] | None] | None = None,
    model: str = "m" * 64,
    **about: Any,
) -> Path:
    """A predictions table that answers the questions of these numbers."""
    said = parsed if isinstance(parsed, Mapping) else dict(enumerate(parsed))
    plain = {"image_id": "", "task": "", "model_digest": model}
    with TableWriter(out, PREDICTIONS, about={"split": "test", **about}) as writer:
        for place, text in said.items():
            given = pairs(scores[place]) if scores and scores[place] else None
            row = {"sample_id": str(place), "raw": raw[place] if raw else text, "parsed": text, "scores": given}
            writer.write([plain | row])
    return out


def write_evaluation(folder: Path, table: Path, parsed: Any, model: str, **figures: Any) -> Path:
    """The folder of an evaluation: predictions, and a `metrics.json` that says whose they are, with these figures."""
    about = {"conversations_digest": open_table(table).digest, "split": "test", "model_digest": model}
    about["predictions_digest"] = open_table(write_predictions(folder / "predictions", parsed, model=model)).digest
    (folder / "metrics.json").write_text(json.dumps(about | figures))
    return folder
