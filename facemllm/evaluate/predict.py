"""Answers of a model to the questions of a split, as a predictions table: one row a question, as it was asked.

`Likelihood` is how a model of ours is measured: closed questions are scored, by the rule that serving uses
(`tasks.answers`). Strict all the same: where free greedy decoding would not have given any option, the model has not
understood the question, `parsed` stays empty and counts as wrong, and `raw` is what it writes instead. Open questions
and sets are generated. `Written` generates all answers, to compare. Models of others are in `peers`.

`KINDS` are pictures made worse on purpose, to see whether answers hold. Each is a function of the picture and its
image_id alone, and scales with the picture. Strengths are such that a person still answers most questions. Training of
ours shows pictures of the kinds in `TRAINED`, too; what holds of the others was not practised.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageFilter

from facemllm import tasks
from facemllm.core import progress
from facemllm.core.digests import draw
from facemllm.errors import UserError
from facemllm.scoring.sheet import is_asked
from facemllm.tables import Table, TableWriter, pairs
from facemllm.tasks.answers import answer

COLUMNS = ["image_id", "images", "subject_id", "groups", "messages", "turns"]
MAP = "segmentation"
NO_MAP = "no_map"
"""The picture as it is, without the map of face parts that stood beside it."""
BLUR = 0.02  # standard deviation, of the shorter side
DARK = 0.3  # of the brightness
JPEG_QUALITY = 10
NOISE = 0.1  # standard deviation, of the range of values
GRAINS = 128  # of noise, along the shorter side
GREY = (128, 128, 128)

Which = Callable[[tasks.Question], bool]
Change = Callable[[Image.Image, str], Image.Image]
"""Of an image and its image_id."""

REWRITTEN = 0.1
"""Largest share of a batch's closed questions whose failures are generated, to be shown; a broken model fails many."""


@dataclass(frozen=True)
class Put:
    """A question as it is put about a face: its stored turn, the words, and what they ask."""

    turn: Mapping[str, Any]
    text: str
    question: tasks.Question


@dataclass(frozen=True)
class Shown:
    """A face as a model is shown it, and what it is asked; `change` names what was done to the picture; `map`, a PNG of
    its parts, is None unless the model is shown one."""

    face: Mapping[str, Any]
    image: Image.Image
    change: str
    asked: tuple[Put, ...]
    map: bytes | None = None


class Answerer(Protocol):
    """A model that answers."""

    @property
    def takes_maps(self) -> bool:
        """Whether it looks at maps of face parts."""

    def answer(self, shown: Sequence[Shown]) -> Iterator[dict[str, Any]]:
        """To every question of every face, in order: `raw` (text), `parsed` (canonical, None when unreadable), and
        `scores` or `question` where they are other than none and the question's own words."""


@dataclass(frozen=True)
class Written:
    """A predictor of ours that writes every answer freely, in batches."""

    predictor: Any
    max_new_tokens: int

    @property
    def takes_maps(self) -> bool:
        """Whether the model has a segmentation branch."""
        return bool(self.predictor.takes_maps)

    def answer(self, shown: Sequence[Shown]) -> Iterator[dict[str, Any]]:
        """Answers in order, each read strictly from greedy text."""
        yield from _written(self.predictor, _pairs(shown), self.max_new_tokens)


@dataclass(frozen=True)
class Likelihood(Written):
    """A predictor of ours, measured: likelihoods for closed questions, greedy text for open ones. What the same pass
    finds of a face's characteristics is given to `characteristics` by image_id, if there is somebody to take it."""

    characteristics: Callable[[str, Mapping[str, float]], None] | None = None

    def answer(self, shown: Sequence[Shown]) -> Iterator[dict[str, Any]]:
        """Answers in order. The closed questions of all these faces go into one call. Where no option is what the model
        would write, `raw` is what it writes, else the likeliest option in words that nobody reads as an answer."""
        from facemllm.model.inference import Query

        closed = [[put for put in face.asked if put.question.options] for face in shown]
        queries = [[Query(put.text, tuple(o.text for o in put.question.options)) for put in own] for own in closed]
        scores = self.predictor.score_faces([face.image for face in shown], queries, [face.map for face in shown])
        if self.characteristics is not None:
            for face, found in zip(shown, scores, strict=True):
                self.characteristics(face.face["image_id"], found.characteristics)
        chosen = [
            (face, put, _chosen(put.question, said))
            for face, own, found in zip(shown, closed, scores, strict=True)
            for put, said in zip(own, found.answers, strict=True)
        ]
        written = _written(self.predictor, _pairs(shown, lambda put: not put.question.options), self.max_new_tokens)
        failed = [(face, put) for face, put, found in chosen if found["parsed"] is None and found["raw"]]
        few = len(failed) <= REWRITTEN * len(chosen)
        rewritten = _written(self.predictor, failed if few else [], self.max_new_tokens)
        remaining = iter(chosen)
        for _, put in _pairs(shown):
            if not put.question.options:
                yield next(written)
                continue
            _, _, found = next(remaining)
            if found["parsed"] is None:
                text = next(rewritten)["raw"] if few and found["raw"] else ""
                found["raw"] = _unread(put.question, text, found["raw"])
            yield found


def predict(
    answerer: Answerer,
    conversations: Table,
    split: str,
    writer: TableWriter,
    about: str,
    *,
    batch_images: int,
    faces: Collection[str] | None = None,
    which: Which = lambda question: True,
    change: tuple[str, Change] | None = None,
    maps: bool = False,
    timed: Callable[[float, int], None] | None = None,
) -> None:
    """Put every question of the split that stands alone, and write the answers in table order, named by digest `about`.

    `faces` are the image_ids to ask about, all if None; `which` chooses questions; `change` names and makes a change of
    the picture; with `maps` a face's map of its parts is shown beside it. `timed` is given the seconds that answering
    took, and how many questions were answered. Memory is that of one batch of `batch_images` faces.
    """
    total = len(faces) if faces is not None else sum(b.num_rows for b in conversations.batches(["image_id"], split))
    rows = _faces_of(conversations, split, faces, maps)
    name = "evaluating" if change is None else f"evaluating: {change[0]}"
    done, seconds, count = 0, 0.0, 0
    with progress.bar(name, total) as bar:
        while batch := list(islice(rows, batch_images)):
            shown = [_shown(face, which, change) for face in batch]
            began = time.perf_counter()
            found = list(answerer.answer(shown))
            seconds, count, answers = seconds + time.perf_counter() - began, count + len(found), iter(found)
            for one in shown:
                writer.write([_row(one.face, put, next(answers), about) for put in one.asked])
            done += len(batch)
            bar.update(done, f"{done} of {total} faces answered")
    if timed is not None:
        timed(seconds, count)


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


def puts(face: Mapping[str, Any]) -> Iterator[Put]:
    """The questions of a conversation that stand alone."""
    turns = zip(face["turns"], question_texts(face), strict=True)
    return (Put(turn, text, tasks.question_of(turn)) for turn, text in turns if is_asked(turn))


def _faces_of(conversations: Table, split: str, faces: Collection[str] | None, maps: bool) -> Iterator[dict[str, Any]]:
    """Rows of a split in table order, of these image_ids if given; `segmentation` is the map's PNG, None without `maps`
    or where there is none."""
    kept = None if faces is None else pa.array(sorted(faces), pa.string())
    for batch in conversations.batches([*COLUMNS, MAP] if maps else COLUMNS, split):
        chosen = batch if kept is None else batch.filter(pc.is_in(batch.column("image_id"), kept))
        for row in chosen.to_pylist():
            yield {**row, MAP: (row.get(MAP) or {}).get("bytes")}


def _shown(face: Mapping[str, Any], which: Which, change: tuple[str, Change] | None) -> Shown:
    name, made = change or ("", lambda image, _: image)
    asked = tuple(one for one in puts(face) if which(one.question))
    return Shown(face, made(open_image(face), face["image_id"]), name, asked, face[MAP])


def _row(face: Mapping[str, Any], put: Put, found: Mapping[str, Any], about: str) -> dict[str, Any]:
    return {
        "sample_id": put.turn["sample_id"],
        "image_id": face["image_id"],
        "subject_id": face["subject_id"],
        "task": put.turn["task"],
        "question": put.text,
        "answer": put.turn["answer"],
        "groups": face["groups"],
        "model_digest": about,
        **found,
    }


def _written(predictor: Any, asked: Sequence[tuple[Shown, Put]], max_new_tokens: int) -> Iterator[dict[str, Any]]:
    """Greedy answers, read strictly in the way each question was asked."""
    if not asked:
        return
    texts = predictor.generate_batch(
        [face.image for face, _ in asked],
        [put.text for _, put in asked],
        max_new_tokens,
        [face.map for face, _ in asked],
    )
    for (_, put), text in zip(asked, texts, strict=True):
        yield {"raw": text, "parsed": tasks.read(put.question, text)}


def _pairs(shown: Sequence[Shown], which: Callable[[Put], bool] = lambda put: True) -> list[tuple[Shown, Put]]:
    """The questions of all faces, in order, each with its face."""
    return [(face, put) for face in shown for put in face.asked if which(put)]


def _unread(question: tasks.Question, text: str, likeliest: str) -> str:
    """What to keep of an answer that is none: the text, else words about the likeliest option; never a readable one."""
    words = f"(none of the options; likeliest perhaps {likeliest})" if likeliest else "(no probabilities)"
    return next((said for said in (text, words) if said and tasks.read(question, said) is None), "")


def _chosen(question: tasks.Question, scored: Any) -> dict[str, Any]:
    # a broken model answers nothing, whatever it is sure of
    sound = all(math.isfinite(p) for p in scored.probabilities)
    found = answer(question, scored.probabilities, scored.greedy if sound else None)
    return {"raw": found.text, "parsed": found.value, "scores": pairs(found.scores) if sound else None}


def blur(image: Image.Image, image_id: str) -> Image.Image:
    """Out of focus: a Gaussian whose standard deviation is 2 % of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(BLUR * min(image.size)))


def dark(image: Image.Image, image_id: str) -> Image.Image:
    """Every value at 30 %."""
    return image.point([round(DARK * value) for value in range(256)] * len(image.getbands()))


def jpeg(image: Image.Image, image_id: str) -> Image.Image:
    """Compressed at quality 10 and opened again."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return Image.open(buffer).convert("RGB")


def occlusion(image: Image.Image, image_id: str) -> Image.Image:
    """One third in grey: the upper, middle or lower, the left, central or right, drawn by a hash of the image_id."""
    drawn = draw(6, "occlusion", image_id)
    width, height = image.size
    start, end = drawn % 3, drawn % 3 + 1
    box = (
        (0, start * height // 3, width, end * height // 3)
        if drawn < 3
        else (start * width // 3, 0, end * width // 3, height)
    )
    covered = image.copy()
    covered.paste(GREY, box)
    return covered


def noise(image: Image.Image, image_id: str) -> Image.Image:
    """Grains of Gaussian noise, a channel each, drawn by a hash of the image_id: standard deviation 10 % of the range,
    128 grains along the shorter side (one a pixel where there are fewer)."""
    import numpy as np

    scale = min(1.0, GRAINS / min(image.size))
    width, height = (max(1, round(scale * side)) for side in image.size)
    grains = np.random.default_rng(draw(2**63, "noise", image_id)).normal(0, 255 * NOISE, (height, width, 3))
    columns, rows = (np.arange(side) * count // side for side, count in zip(image.size, (width, height), strict=True))
    noisy = np.asarray(image, dtype=np.float64) + grains[rows][:, columns]
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


KINDS: Mapping[str, Change] = {
    "blur": blur,
    "dark": dark,
    "jpeg": jpeg,
    "noise": noise,
    "occlusion": occlusion,
}
TRAINED = ("blur", "dark", "occlusion")
