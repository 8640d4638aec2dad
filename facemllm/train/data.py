"""The dataset of a split: turns as flat integer arrays, pixels in a memory map (`pixels.py`).

Turns hold token ids of each distinct text once; mirrored texts (left <-> right) are tokenised beside them, so that a
mirrored face is asked and answered correctly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from facemllm.errors import UserError
from facemllm.model.inputs import Frame
from facemllm.model.pieces import Speller
from facemllm.tables import Table
from facemllm.tasks import asking
from facemllm.tasks.base import CLOSED, Form
from facemllm.tasks.relations import Relation

SPELLED = 0.15
"""Share of training questions that are asked with words in pieces, so that a word that is spelled is nothing new."""
_WORDS = 0.35  # of these questions
TRUE = 0.4
"""Share of the statements drawn that are true. Of those that evaluation asks about it is a third: who takes true and
false for equally likely grants a face two colours of eyes; fewer true ones, and the task is learnt late."""
CAPTION = "caption"
"""The task whose answers are captions."""
CLASSES: tuple[Form, ...] = ("choice", "boolean")
HEAVIEST = 3.0
"""Largest weight of a class in the loss: a face or two in a thousand must not rule a step."""
_MIRROR = {"left": "right", "right": "left"}
_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


def mirror_text(text: str) -> str:
    """The text as it reads for the mirrored face: the words left and right change places, case kept."""

    def swap(match: re.Match[str]) -> str:
        word = match[0]
        other = _MIRROR[word.lower()]
        return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other

    return _SIDES.sub(swap, text)


@dataclass(frozen=True)
class Texts:
    """Token ids of distinct texts, end to end. Text `i` is `ids[starts[i]:starts[i + 1]]`."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]

    def __getitem__(self, index: int) -> NDArray[np.int32]:
        return self.ids[self.starts[index] : self.starts[index + 1]]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every text."""
        return np.diff(self.starts)


@dataclass(frozen=True)
class Numbers:
    """Answers to questions about numbers that are one token each: the token, the question's number, the value."""

    token: NDArray[np.int64]  # (M,)
    family: NDArray[np.int64]  # (M,)
    value: NDArray[np.float64]  # (M,)

    @classmethod
    def none(cls) -> Numbers:
        """No such answers."""
        return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))


@dataclass(frozen=True)
class Corpus:
    """The conversations of one split: which pixels, which turns, which texts. Row `r` shows pixels `pixel_row[r]` and
    has turns `turn_starts[r]:turn_starts[r + 1]`. A turn names its texts in `texts`: prompt and answer, plain and
    mirrored (column 1). A turn that `follows` continues the one before it. `fact` numbers what a closed turn asks and
    its canonical answer, `item` what a turn answered by a class asks, both -1 elsewhere. `form` is a place in
    `asking.VARIANTS`, and `share` the turn's share in the weight of its form: several statements about one item of a
    face share it, `TRUE` of it for what is true."""

    image_id: pa.Array  # (rows,)
    pixel_row: NDArray[np.int64]
    turn_starts: NDArray[np.int64]
    prompt: NDArray[np.int32]  # (turns, 2)
    answer: NDArray[np.int32]  # (turns, 2)
    task: NDArray[np.int16]
    follows: NDArray[np.bool_]
    tasks: tuple[str, ...]
    texts: Texts
    fact: NDArray[np.int32]
    item: NDArray[np.int32]
    form: NDArray[np.int8]
    share: NDArray[np.float64]
    numbers: Numbers = field(default_factory=Numbers.none)

    def __len__(self) -> int:
        return len(self.pixel_row)

    def weights(self, mixture: Mapping[str, float], forms: Mapping[str, float] | None = None) -> NDArray[np.float64]:
        """Weight of each turn under a stage's mixture of tasks, 0 for a task the stage does not name, and of forms."""
        weights = np.array([mixture.get(name, 0.0) for name in self.tasks])[self.task]
        if forms is None:
            return weights
        return weights * self.share * np.array([forms.get(name, 1.0) for name in asking.VARIANTS])[self.form]

    def captions(self) -> NDArray[np.int64]:
        """The first turn of each row that asks for its caption, -1 where none does. (rows,)"""
        turns = np.flatnonzero(np.array([name == CAPTION for name in self.tasks])[self.task])
        rows, first = np.unique(np.searchsorted(self.turn_starts, turns, "right") - 1, return_index=True)
        found = np.full(len(self), -1)
        found[rows] = turns[first]
        return found

    def class_weights(self, power: float) -> NDArray[np.float32]:
        """What each turn's answer weighs in the loss: a class as its share among its question's answers to the power of
        `-power`, with mean 1 over the question's turns and at most `HEAVIEST`; other turns 1. (turns,)"""
        weights = np.ones(len(self.item), np.float32)
        turns = np.flatnonzero(self.item >= 0)
        if power and len(turns):
            item, fact = self.item[turns], self.fact[turns]
            asked = np.bincount(item)[item]
            rare = (np.bincount(fact)[fact] / asked) ** -power
            weights[turns] = np.minimum(rare / (np.bincount(item, rare)[item] / asked), HEAVIEST)
        return weights

    def chain_tokens(self, asked: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """Tokens from each turn to the end of the turns that follow it, as shown or mirrored, whichever are more. A
        turn that is not `asked` (turns,) ends those before it: it does not count, nor does what follows it."""
        lengths = self.texts.lengths
        tokens = (lengths[self.prompt] + lengths[self.answer]).max(1)
        opens = ~self.follows
        opens[self.turn_starts[:-1][np.diff(self.turn_starts) > 0]] = True
        chain = np.cumsum(opens) - 1
        if asked is not None:
            ended = np.cumsum(~asked & ~opens)
            tokens = np.where(ended > ended[opens][chain], 0, tokens)
        total = np.bincount(chain, tokens, minlength=chain[-1] + 1 if len(chain) else 0).astype(np.int64)
        return total[chain] if len(chain) else total


@dataclass(frozen=True)
class FaceDataset:
    """What a stage learns from: the conversations of a split, the pixels (rows, S, S, 3) of all rows of the table, the
    maps of face parts (rows, S, S) if the model takes them, and the labels of its characteristics (corpus rows, A), 1,
    0 or -1 for unknown, if it scores them. `features` of a frozen tower, by corpus row, stand in for the pixels."""

    corpus: Corpus
    pixels: NDArray[np.uint8]
    maps: NDArray[np.uint8] | None = None
    labels: NDArray[np.int8] | None = None
    relations: tuple[Relation, ...] = ()
    features: Any | None = None


@dataclass(frozen=True)
class Turns:
    """Columns of the turns of a split, as text; `canonical` is what `answer` says, machine-readable."""

    image_id: pa.Array
    pixel_row: NDArray[np.int64]
    count: NDArray[np.int64]
    question: pa.Array
    answer: pa.Array
    task: pa.Array
    form: pa.Array
    template: pa.Array
    canonical: pa.Array
    follows: NDArray[np.bool_]


def read_turns(table: Table, split: str) -> Turns:
    """The turns of one split, by column. Raises UserError when the split is empty or messages and turns differ."""
    images, rows, counts, questions, answers, follows = [], [], [], [], [], []
    labels: dict[str, list[pa.Array]] = {name: [] for name in ("task", "form", "template", "canonical")}
    first = 0
    for batch in table.batches(columns=["image_id", "split", "messages", "turns"], batch_rows=1024):
        keep = pc.equal(batch.column("split"), split)
        index = np.flatnonzero(keep.to_numpy(zero_copy_only=False))
        if len(index):
            chosen = batch.filter(keep)
            messages, turns = chosen.column("messages"), chosen.column("turns")
            parts = messages.flatten().field("content").flatten()
            text = parts.field("text").filter(pc.equal(parts.field("type"), "text"))
            flat = turns.flatten()
            if len(text) != 2 * len(flat):
                raise UserError(f"{table.path}: messages are not question-answer pairs, one text each, one pair a turn")
            images.append(chosen.column("image_id"))
            rows.append(index + first)
            counts.append(pc.list_value_length(turns).to_numpy(zero_copy_only=False).astype(np.int64))
            questions.append(text.take(pa.array(np.arange(0, len(text), 2))))
            answers.append(text.take(pa.array(np.arange(1, len(text), 2))))
            for name, arrays in labels.items():
                arrays.append(flat.field("answer" if name == "canonical" else name))
            follows.append(pc.fill_null(flat.field("follows"), False).to_numpy(zero_copy_only=False))
        first += batch.num_rows
    if not rows:
        raise UserError(
            f"{table.path}: no row of split '{split}'; check ingest.validation_share and the source's splits"
        )
    return Turns(
        image_id=pa.concat_arrays(images),
        pixel_row=np.concatenate(rows),
        count=np.concatenate(counts),
        question=pa.concat_arrays(questions),
        answer=pa.concat_arrays(answers),
        follows=np.concatenate(follows).astype(bool),
        **{name: pa.concat_arrays(arrays) for name, arrays in labels.items()},
    )


def vocabulary_texts(turns: Turns) -> tuple[list[str], list[str]]:
    """Distinct texts of a split and its distinct closed answers, mirrored ones too: a tiny tokenizer's material."""
    closed = pc.is_in(turns.form, value_set=pa.array(CLOSED))
    answers = pc.unique(turns.answer.filter(closed)).to_pylist()
    texts = pc.unique(turns.question).to_pylist() + pc.unique(turns.answer).to_pylist()
    return _with_mirrors(texts), _with_mirrors(answers)


def _with_mirrors(texts: Sequence[str]) -> list[str]:
    return sorted({*texts, *(mirror_text(text) for text in texts)})


def tokenise(turns: Turns, frame: Frame, *, spelled: float = 0.0, seed: int = 0) -> Corpus:
    """Turns as token ids, each distinct text tokenised once, plain and mirrored. A share of the questions, `spelled`,
    drawn by `seed`, has some of its words in pieces."""
    ids: list[list[int]] = []
    known: dict[tuple[str, bool | None, bool], int] = {}
    speller = Speller(frame.tokenizer)

    def text_id(text: str, follows: bool | None, pieces: bool = False) -> int:
        key = (text, follows, pieces)
        if key not in known:
            known[key] = len(ids)
            plain = frame.answer(text) if follows is None else frame.prompt(text, follows=follows)
            ids.append(speller.spelled(plain, _WORDS, str(seed), text) if pieces else plain)
        return known[key]

    question, answer = turns.question.dictionary_encode(), turns.answer.dictionary_encode()
    questions, answers = question.dictionary.to_pylist(), answer.dictionary.to_pylist()
    ask = np.array([[[text_id(t, f) for t in (q, mirror_text(q))] for f in (False, True)] for q in questions], np.int32)
    reply = np.array([[text_id(t, None) for t in (a, mirror_text(a))] for a in answers], np.int32)
    asked = question.indices.to_numpy()
    prompt = ask[asked, turns.follows.astype(int)]
    for turn in np.flatnonzero(np.random.default_rng(seed).random(len(prompt)) < spelled):
        text, follows = questions[asked[turn]], bool(turns.follows[turn])
        prompt[turn] = [text_id(one, follows, True) for one in (text, mirror_text(text))]
    task, form = turns.task.dictionary_encode(), _forms(turns)
    return Corpus(
        image_id=turns.image_id,
        pixel_row=turns.pixel_row,
        turn_starts=np.concatenate([[0], np.cumsum(turns.count)]),
        prompt=prompt,
        answer=reply[answer.indices.to_numpy()],
        task=task.indices.to_numpy().astype(np.int16),
        follows=turns.follows,
        tasks=tuple(task.dictionary.to_pylist()),
        texts=Texts(
            np.fromiter((i for text in ids for i in text), np.int32),
            np.cumsum([0, *(len(text) for text in ids)]).astype(np.int64),
        ),
        fact=_numbered(turns, CLOSED, turns.answer),
        item=_numbered(turns, CLASSES),
        form=form,
        share=_shares(turns, form),
        numbers=_numbers(turns, frame),
    )


def _numbered(turns: Turns, forms: Sequence[str], *also: pa.Array) -> NDArray[np.int32]:
    """A number for each item asked natively in one of `forms`, or for each item and text of `also`; -1 for
    other turns. (turns,)"""
    item = pc.replace_substring_regex(turns.template, "/.*", "")
    native = pc.and_(pc.is_in(turns.form, value_set=pa.array(forms)), pc.invert(pc.match_substring(item, ":")))
    key = pc.binary_join_element_wise(*(part.filter(native) for part in (turns.task, item, *also)), "\t")
    numbers = np.full(len(native), -1, np.int32)
    numbers[native.to_numpy(zero_copy_only=False)] = key.dictionary_encode().indices.to_numpy()
    return numbers


def _forms(turns: Turns) -> NDArray[np.int8]:
    """Place of each turn's variant in `asking.VARIANTS`. (turns,)"""
    named = pc.struct_field(pc.extract_regex(turns.template, r":(?P<variant>[a-z]+)"), "variant")
    known = pc.index_in(pc.fill_null(named, asking.NATIVE), value_set=pa.array(asking.VARIANTS))
    return pc.fill_null(known, 0).to_numpy(zero_copy_only=False).astype(np.int8)


def _shares(turns: Turns, form: NDArray[np.int8]) -> NDArray[np.float64]:
    """The share of statements as true as it is (`TRUE` of those drawn are true) over the number of those about
    its face and item; 1 for other turns."""
    share = np.ones(len(turns.template))
    stated = np.flatnonzero(form == asking.VARIANTS.index(asking.STATEMENT))
    if not len(stated):
        return share
    row = np.repeat(np.arange(len(turns.count)), turns.count)[stated]
    places = pa.array(stated)
    item = pc.replace_substring_regex(turns.template.take(places), ":.*", "").dictionary_encode().indices.to_numpy()
    true = pc.equal(turns.canonical.take(places), "true").to_numpy(zero_copy_only=False)
    _, group, count = np.unique(np.stack([row, item, true]), axis=1, return_inverse=True, return_counts=True)
    share[stated] = np.where(true, TRUE, 1 - TRUE) / count[group.ravel()]
    return share


def _numbers(turns: Turns, frame: Frame) -> Numbers:
    """The one-token answers to questions about numbers; an answer's value is the mean of those it stands for."""
    asked = pa.table(
        {
            "item": pc.binary_join_element_wise(turns.task, pc.replace_substring_regex(turns.template, "/.*", ""), "/"),
            "text": turns.answer,
            "value": turns.canonical,
        }
    ).filter(pc.equal(turns.form, "number"))
    values: dict[tuple[str, str], list[float]] = {}
    for row in asked.group_by(["item", "text", "value"], use_threads=False).aggregate([]).to_pylist():
        with suppress(TypeError, ValueError):  # a task of one's own may call its numbers otherwise
            value = float(row["value"])
            values.setdefault((row["item"], row["text"]), []).append(value)
    found: dict[int, tuple[int, float]] = {}
    families: dict[str, int] = {}
    for (item, text), each in values.items():
        ids = frame.answer(text)
        if len(ids) == 2:  # with the end token
            mean = sum(each) / len(each)
            found[ids[0]] = (families.setdefault(item, len(families)), mean)
    tokens = sorted(found)
    return Numbers(
        np.array(tokens, np.int64),
        np.array([found[token][0] for token in tokens], np.int64),
        np.array([found[token][1] for token in tokens], np.float64),
    )
