"""A benchmark's questions answered: by a model of ours, or by a peer, and scored by both rules (`scoring.benchmarks`).

Every model is asked in the benchmark's own words, letters and all, and writes its answer. A model of ours also has the
options of questions with one picture scored by likelihood, as words. A question with several pictures goes through the
model's own processor and chat template. A model that takes one picture only is not asked those, nor any model what is
more tokens than it reads: `raw` stays empty, they count as wrong, one line says so, and `not_asked` in `metrics.json`
counts the latter by reason.

The folder holds `predictions/` (`parsed` is the option's text by our reading), `metrics.json` and, of a peer,
`bill.json`.
"""

from __future__ import annotations

import io
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from facemllm.asking import local
from facemllm.asking.requests import TooLong, reduced, too_long
from facemllm.asking.store import Replies
from facemllm.core import digests, progress
from facemllm.core.files import building
from facemllm.evaluate import run
from facemllm.evaluate.peers import Asked, Peer
from facemllm.scoring import benchmarks as scoring
from facemllm.settings import Settings
from facemllm.tables import CONVERSATIONS, PREDICTIONS, Table, TableWriter, open_table, pairs
from facemllm.tasks.multiple_choice import Problem, of_row, read

_COLUMNS = ["conversation_id", "image_id", "source", "subject_id", "groups", "images", "messages", "turns"]
_TOKENS = 16 * 16 * 3.5  # characters that cost about as much as one more picture of 448 pixels


@dataclass(frozen=True)
class Posed:
    """A problem with its row and its pictures, as they are stored."""

    row: Mapping[str, Any]
    problem: Problem
    pictures: tuple[bytes, ...]

    @property
    def change(self) -> str:
        """What a reply hangs on beside the first picture and the words."""
        return "" if len(self.pictures) == 1 else digests.of_json([digests.of_bytes(one) for one in self.pictures])


class Solver(Protocol):
    """A model that answers problems: `raw` (None: it was not asked, and `why` may say why) and `parsed`, in order, and
    `scores` of options."""

    @property
    def one_picture(self) -> str:
        """Why it takes one picture only; empty where it takes several."""

    def solve(self, posed: Sequence[Posed]) -> Iterator[dict[str, Any]]:
        """The answers."""


@dataclass(frozen=True)
class Own:
    """A model of ours; its `predictor` scores and writes."""

    predictor: Any
    max_new_tokens: int

    @cached_property
    def one_picture(self) -> str:
        """Why it takes one picture only; empty where it takes several."""
        return local.refusal_of_several(self.predictor.model, self.predictor.processor)

    def solve(self, posed: Sequence[Posed]) -> Iterator[dict[str, Any]]:
        """Answers in order."""
        from facemllm.model.inference import Query

        reasons = [self._too_long(one) if len(one.pictures) == 1 else "" for one in posed]
        single = [one for one, why in zip(posed, reasons, strict=True) if len(one.pictures) == 1 and not why]
        images = [_opened(one.pictures[0]) for one in single]
        asked = [one.problem for one in single]
        texts = (
            self.predictor.generate_batch(images, [one.prompt for one in asked], self.max_new_tokens) if single else []
        )
        scored = self.predictor.score(images, [[Query(one.listed, one.options)] for one in asked])
        answers = iter(zip(texts, scored, strict=True))
        for one, why in zip(posed, reasons, strict=True):
            options = one.problem.options
            if why:
                yield {"raw": None, "parsed": None, "why": why}
            elif len(one.pictures) == 1:
                text, (found,) = next(answers)
                sound = all(map(math.isfinite, found.probabilities))
                scores = pairs(dict(zip(options, found.probabilities, strict=True))) if sound else None
                yield {**_read(options, text), "scores": scores}
            elif self.one_picture:
                yield {"raw": None, "parsed": None}
            else:
                images = [_opened(picture) for picture in one.pictures]
                try:
                    yield _read(options, self._several(images, one.problem.prompt))
                except TooLong as error:
                    yield {"raw": None, "parsed": None, "why": str(error)}

    def _too_long(self, one: Posed) -> str:
        """Why a question with one picture is not asked; empty where the model reads it, and its options."""
        from facemllm.model.inference import Query

        longest, problem = self.predictor.family.longest, one.problem
        if longest is None:
            return ""
        scored = self.predictor.tokens_of(Query(problem.listed, problem.options))
        written = len(self.predictor.chat([("user", problem.prompt)]))
        return str(too_long(longest)) if max(scored, written) > longest else ""

    def _several(self, images: Sequence[Image.Image], text: str) -> str:
        chat, options = local.chat_about(len(images), text), {"do_sample": False, "max_new_tokens": self.max_new_tokens}
        ((said, _, _),) = local.written(self.predictor.model, self.predictor.processor, [chat], [images], **options)
        return said.strip()


@dataclass(frozen=True)
class Other:
    """A peer."""

    peer: Peer

    @property
    def one_picture(self) -> str:
        """Why it takes one picture only; empty where it takes several, and of an endpoint, which says so itself."""
        sender = self.peer.sender
        return sender.one_picture if isinstance(sender, local.Generated) else ""

    def solve(self, posed: Sequence[Posed]) -> Iterator[dict[str, Any]]:
        """Answers in order. Raises UserError as `Peer.ask`."""
        several = [len(one.pictures) > 1 for one in posed]
        left_out = any(several) and bool(self.one_picture)
        asked = [_asked(self.peer, one) for one, many in zip(posed, several, strict=True) if not (many and left_out)]
        answers = self.peer.ask(asked)
        for many in several:
            yield {"raw": None, "parsed": None} if many and left_out else next(answers)


def answered(
    settings: Settings,
    solver: Callable[[], Solver],
    about: Mapping[str, Any],
    conversations: Path,
    out: Path,
    finish: run.Finish | None = None,
    timed: run.Timed | None = None,
) -> Mapping[str, Any]:
    """`run.answered` for a benchmark: evaluate into the folder `out`; returns what `metrics.json` holds."""
    table, split, digest = open_table(conversations, CONVERSATIONS), settings.evaluate.split, about["model_digest"]
    with building(out) as partial:
        made, seconds = solver(), 0.0
        not_asked: Counter[str] = Counter()
        if (several := _several_in(table, split)) and made.one_picture:
            progress.event(
                note=f"{several:,} of {_rows(table, split):,} questions show several pictures and are not asked, since "
                f"this model takes one ({made.one_picture}); they count as not answered, and wrong"
            )
        metadata = {"split": split, **about}
        with (
            TableWriter(partial / run.PREDICTED, PREDICTIONS, parents=[table.digest, digest], about=metadata) as writer,
            progress.bar("evaluating", total := _rows(table, split)) as bar,
        ):
            rows, done = posed(table, split), 0
            while batch := list(islice(rows, settings.evaluate.batch_images)):
                began = time.perf_counter()
                answers = list(made.solve(batch))
                seconds += time.perf_counter() - began
                not_asked.update(found.pop("why") for found in answers if "why" in found)
                writer.write(_row(one, found, digest) for one, found in zip(batch, answers, strict=True))
                done += len(batch)
                bar.update(done, f"{done} of {total} questions answered")
            writer.manifest["about"]["not_asked"] = dict(not_asked)
        for why, count in not_asked.items():
            progress.event(note=f"{count:,} of {total:,} questions are not asked, and wrong: {why}")
        metrics = scoring.evaluation(settings, table, open_table(partial / run.PREDICTED, PREDICTIONS))
        (partial / "metrics.json").write_bytes(run.encode(metrics))
        if timed is not None:
            timed(seconds, done)
        if finish is not None:
            finish(partial, metrics)
    return metrics


def posed(table: Table, split: str) -> Iterator[Posed]:
    """The problems of a split, in order. Raises UserError when a row is none of a benchmark's."""
    for row in table.iterate(_COLUMNS, split):
        yield Posed(row, of_row(row), tuple(image["bytes"] for image in row["images"]))


def to_ask(settings: Settings, peer: Peer, table: Table) -> tuple[int, int, int]:
    """How many questions there are, how many a peer has not answered yet, and the characters of those; a further
    picture counts as many."""
    count = missing = characters = 0
    with closing(Replies(peer.home)) as store:
        for one in posed(table, settings.evaluate.split):
            count += 1
            if store.read(one.row["image_id"], peer.key(one.row["image_id"], one.change, one.problem.prompt)) is None:
                missing += 1
                characters += len(one.problem.prompt) + round(_TOKENS * (len(one.pictures) - 1))
    return count, missing, characters


def _asked(peer: Peer, one: Posed) -> Asked:
    def pictures() -> tuple[bytes, ...]:
        return tuple(reduced(picture, peer.image_side) for picture in one.pictures)

    return Asked(one.row["image_id"], one.problem.prompt, pictures, partial(_option, one.problem.options), one.change)


def _option(options: Sequence[str], text: str) -> str | None:
    found = read(text, options)
    return None if found is None else options[found]


def _read(options: Sequence[str], text: str) -> dict[str, Any]:
    return {"raw": text, "parsed": _option(options, text)}


def _opened(picture: bytes) -> Image.Image:
    return Image.open(io.BytesIO(picture)).convert("RGB")


def _rows(table: Table, split: str) -> int:
    return sum(batch.num_rows for batch in table.batches(["image_id"], split))


def _several_in(table: Table, split: str) -> int:
    """How many questions show several pictures."""
    return sum(len(row["messages"][0]["content"]) > 2 for row in table.iterate(["messages"], split))


def _row(one: Posed, found: Mapping[str, Any], digest: str) -> dict[str, Any]:
    names = {name: one.row[name] for name in ("image_id", "subject_id", "groups")}
    turn = {name: one.row["turns"][0][name] for name in ("sample_id", "task", "answer")}
    return {**names, **turn, "question": one.problem.prompt, "model_digest": digest, "scores": None, **found}
