"""Characteristics: what an answer says of a face, how often they occur together, and the graph that follows.

A characteristic is a thing that a yes/no item asks for, named by the item, or a value of a choice. Canonical values
are lower case and attribute names are not, so an attribute is the same characteristic whichever question asks for it;
any other value is `item=value`.

Nodes and labels come from the turns of the training split alone. The matrix is FaceInsight's (arXiv 2504.15624), which
prints no equations; its construction is that of ML-GCN (Chen and others, CVPR 2019, arXiv 1904.03582).
Legend: R rows (faces), N nodes, T turns that differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from facemllm import tasks
from facemllm.errors import UserError
from facemllm.tasks import asking
from facemllm.tasks.base import Item, Question, Task
from facemllm.tasks.relations import RELATIONS, Relation

UNKNOWN = -1
_SIDED = re.compile(r"\b(left|right)\b")
_ROWS = 32_768  # at a time, so that memory beyond the labels stays flat


def characteristic(item: Item, value: str) -> str:
    """The characteristic that a value of a yes/no item or of a choice is about."""
    if item.form == "boolean":
        return item.name
    return value if value != value.lower() else f"{item.name}={value}"


def asserted(task: Task, question: Question, answer: str) -> tuple[list[str], list[str]]:
    """Names that a canonical answer affirms and denies, to a question about a choice or a yes/no item as it was asked:
    a chosen value denies the others, a refuted claim denies its own. Nothing when it is no answer to the question."""
    item = task.item(question.item)
    values = [option.value for option in item.options]
    left = [value for value in values if asking.implied(task, question, value) == answer]
    if item.form == "boolean":
        return ([item.name] if left == ["yes"] else []), ([item.name] if left == ["no"] else [])
    names = [characteristic(item, value) for value in left]
    denied = [characteristic(item, value) for value in values if left and value not in left]
    return (names if len(names) == 1 else []), denied


@dataclass(frozen=True, kw_only=True)
class Node:
    """A characteristic: `value` of a choice, or `yes` to a yes/no item. `words` say it; the graph starts from them."""

    task: str
    item: str
    value: str
    name: str
    words: str


@dataclass(frozen=True)
class Characteristics:
    """Nodes, and the label of each on every row: 1 true, 0 false, -1 unknown."""

    nodes: tuple[Node, ...]
    labels_RN: NDArray[np.int8]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the nodes, in their order."""
        return tuple(node.name for node in self.nodes)


class Turns(Protocol):
    """Columns of the turns of a split, and how many turns each row has."""

    @property
    def count(self) -> NDArray[np.int64]:
        """Turns of each row."""

    @property
    def task(self) -> pa.Array:
        """Task of each turn."""

    @property
    def template(self) -> pa.Array:
        """Wording in which each turn asks."""

    @property
    def canonical(self) -> pa.Array:
        """Canonical answer of each turn."""


def characteristics(names: Sequence[str], turns: Turns) -> Characteristics:
    """The characteristics of the tasks of these names, and their labels on every row of the turns. A characteristic
    that no row has, or every row that tells, gives no node. Raises UserError when none is left, or when a turn asks
    what its task does not know."""
    nodes = _nodes(names)
    labels_RN = _labels(nodes, names, turns)
    varies = (labels_RN == 1).any(0) & (labels_RN == 0).any(0)
    if not varies.any():
        raise UserError(
            f"model.knowledge.tasks: the training split tells no characteristic of {', '.join(names)} that some faces "
            "have and others have not; name tasks that it asks, or turn model.knowledge.enabled off"
        )
    return Characteristics(tuple(np.array(nodes, dtype=object)[varies]), np.ascontiguousarray(labels_RN[:, varies]))


def _labels(nodes: Sequence[Node], names: Sequence[str], turns: Turns) -> NDArray[np.int8]:
    """Labels (rows, nodes) as the turns of these tasks tell them; what one affirms outweighs what another denies."""
    table_TN, kinds = _said(nodes, names, turns)
    ends = np.cumsum(turns.count)
    starts = ends - turns.count
    labels_RN = np.full((len(turns.count), len(nodes)), UNKNOWN, dtype=np.int8)
    for first in range(0, len(ends), _ROWS):
        block = slice(first, first + _ROWS)
        asked = turns.count[block] > 0
        if asked.any():
            labels_TN = table_TN[kinds[starts[first] : ends[block][-1]]]
            labels_RN[block][asked] = np.maximum.reduceat(labels_TN, (starts[block] - starts[first])[asked], axis=0)
    return labels_RN


def _said(nodes: Sequence[Node], names: Sequence[str], turns: Turns) -> tuple[NDArray[np.int8], NDArray[np.intp]]:
    """What turns of each kind (a wording and its answer) tell of the nodes, and the kind of every turn; the last row
    of the table, for turns that tell nothing, is unknown throughout."""
    wanted = pa.array([name for name in names if any(members(name))], pa.string())
    chosen = pc.and_(pc.is_in(turns.task, value_set=wanted), pc.is_valid(turns.canonical))
    chosen = chosen.to_numpy(zero_copy_only=False)
    columns = [column.filter(chosen).dictionary_encode() for column in (turns.task, turns.template, turns.canonical)]
    sizes = [max(len(column.dictionary), 1) for column in columns]
    codes = np.ravel_multi_index([column.indices.to_numpy() for column in columns], sizes)
    distinct, kind = np.unique(codes, return_inverse=True)
    texts = [column.dictionary.to_pylist() for column in columns]
    places = {node.name: place for place, node in enumerate(nodes)}
    table_TN = np.full((len(distinct) + 1, len(nodes)), UNKNOWN, dtype=np.int8)
    for row, code in enumerate(distinct):
        turn = (words[index] for words, index in zip(texts, np.unravel_index(code, sizes), strict=True))
        affirmed, denied = _of_answer(*turn)
        table_TN[row, [places[name] for name in denied if name in places]] = 0
        table_TN[row, [places[name] for name in affirmed if name in places]] = 1
    kinds = np.full(len(chosen), len(distinct), dtype=np.intp)
    kinds[chosen] = kind
    return table_TN, kinds


def _of_answer(task: str, template: str, answer: str) -> tuple[list[str], list[str]]:
    # of a lettered question only the option chosen has to be known here, not what else was shown
    question = tasks.question_of({"task": task, "template": template, "options": [answer]})
    found = tasks.get(task)
    return asserted(found, question, answer) if _is_member(found.item(question.item)) else ([], [])


def _nodes(names: Iterable[str]) -> tuple[Node, ...]:
    """Every characteristic of the tasks; one that two of them ask for stands at the first."""
    found: dict[str, Node] = {}
    for task in names:
        for item in members(task):
            for value in ("yes",) if item.form == "boolean" else [option.value for option in item.options]:
                words = item.mention(value) or item.option_for(value).text
                name = characteristic(item, value)
                found.setdefault(name, Node(task=task, item=item.name, value=value, name=name, words=words))
    return tuple(found.values())


def members(task: str) -> Iterator[Item]:
    """The items of a task whose answers are characteristics."""
    return filter(_is_member, tasks.get(task).items)


def _is_member(item: Item) -> bool:
    """Whether an item is a yes/no question or a choice whose answer a mirror does not change."""
    texts = (*(option.text for option in item.options), *item.claims.values())
    return item.form in ("boolean", "choice") and not any(_SIDED.search(text) for text in texts)


def relations_of(names: Iterable[str], nodes: Iterable[Node]) -> tuple[Relation, ...]:
    """The logical relations between these nodes of the tasks of these names. Exactly one value of a choice is true, at
    most one where what is asked can be hidden; after these, what `relations.yaml` says of the nodes."""
    known = {node.name for node in nodes}
    own = (_of_choice(item, known) for task in names for item in members(task))
    left = (relation.within(known) for relation in RELATIONS)
    return tuple(dict.fromkeys(relation for relation in (*own, *left) if relation is not None))


def _of_choice(item: Item, known: set[str]) -> Relation | None:
    values = tuple(characteristic(item, option.value) for option in item.options)
    if item.form != "choice" or len(left := tuple(name for name in values if name in known)) < 2:
        return None
    return Relation(kind="exactly_one" if item.hidden is None else "exclusive", names=left)


def cooccurrence(labels_RN: NDArray[np.int8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Counts `m_ij` of rows on which i and j are true, and `n_ij` of rows on which i is true and j is known. Where
    every label is known, each column of n is the paper's n_i; where j is unknown on some, a row that cannot tell of j
    says nothing for or against it."""
    count = labels_RN.shape[1]
    m_NN, n_NN = np.zeros((2, count, count), dtype=np.int64)
    for first in range(0, len(labels_RN), _ROWS):
        block_RN = labels_RN[first : first + _ROWS]
        # float32 is exact here: no sum exceeds the rows of a block
        true_RN, known_RN = (block_RN == 1).astype(np.float32), (block_RN != UNKNOWN).astype(np.float32)
        m_NN += (true_RN.T @ true_RN).astype(np.int64)
        n_NN += (true_RN.T @ known_RN).astype(np.int64)
    return m_NN, n_NN


def correlation_matrix(m_NN: NDArray[Any], n_NN: NDArray[Any], tau: float, omega: float) -> NDArray[np.float64]:
    """The re-weighted graph: row i mixes node i with the nodes that it makes likely.

    p_ij = m_ij / n_ij; C_ij = 1 where p_ij >= tau and i != j; then omega * C_ij / sum_{k != i} C_ik beside the diagonal
    and 1 - omega on it. A node without neighbours keeps 1 there: every row sums to 1, and no node shrinks from layer
    to layer for standing alone. Pairs never seen together with both known (n_ij = 0) are no neighbours.
    """
    observed_NN = n_NN > 0
    p_NN = np.divide(m_NN, n_NN, out=np.zeros(m_NN.shape), where=observed_NN)
    edges_NN = (p_NN >= tau) & observed_NN
    np.fill_diagonal(edges_NN, False)
    degree_N = edges_NN.sum(1)
    c_NN = omega * edges_NN / np.maximum(degree_N, 1)[:, None]
    np.fill_diagonal(c_NN, np.where(degree_N > 0, 1 - omega, 1.0))
    return c_NN
