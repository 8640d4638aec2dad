"""From a conversations table to a `Corpus`: the turns of a split by column, and their texts as token ids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

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
from facemllm.train.corpus import Corpus, Numbers, Texts

SPELLED = 0.15
"""Share of training questions that are asked with words in pieces, so that a word that is spelled is nothing new."""
_WORDS = 0.35  # of these questions
TRUE = 0.4
"""Share of the statements drawn that are true. Of those that evaluation asks about it is a third; with as few in
training the task was learnt late, and with half of them three seeds show no difference."""
_CLASSES: tuple[Form, ...] = ("choice", "boolean")  # forms of questions that a class answers
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
        item=_numbered(turns, _CLASSES),
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
