"""What a face-perception task is: questions, exact labels, the options that say them, and a strict reader of answers.

A task is data: a name, a metric and its items. An item is one thing to ask about (`hair_color`, `yaw`); the kinds of
items are in `items`, the variants of a question (outright, as a statement, with lettered options) in `asking`.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

from facemllm.core.digests import draw
from facemllm.tables import mapping
from facemllm.tables.schemas import SEGMENTATION
from facemllm.tasks.paraphrases import admitted, paraphrases
from facemllm.tasks.topics import TOPICS
from facemllm.tasks.wordings import written

Form = Literal["choice", "boolean", "number", "open", "several", "statement", "lettered"]
"""`several` is a set of things, answered in free order. `statement` and `lettered` are variants of a choice or a yes/no
question, not forms of items: a claim that is true or false, and options behind letters."""

CLOSED: tuple[Form, ...] = ("choice", "boolean", "number", "statement", "lettered")
"""Forms that are answered by one of their options."""

Center = Literal["median", "mean"]
"""Of a distribution over a grid of numbers: the median has the least expected error if the distribution is right; of
angles the mean errs less, as measured."""

Metric = Literal["balanced_accuracy", "accuracy", "mae", "fact_f1", "f1"]
"""`fact_f1` compares sets of facts or things, `f1` finds the `yes` among yes/no questions (action units)."""

Row = Mapping[str, Any]
_PARAPHRASED = (3, 4)
"""So many of so many training questions are asked in a paraphrase."""
MAX_PIXELS = 2048 * 2048
FAINT = 2000
"""A part of less than one in so many of the map's pixels is neither plainly there nor plainly absent."""

Sizes = Mapping[str, float]
"""Class name -> its share of the map's pixels."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One possible answer: its canonical value and the words that say it."""

    value: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked about one item, in several wordings. `options` is empty for an open question and for a set; for a
    number it is the grid, each value being the number as text. `variant` and `claim` tell how it is asked (`asking`):
    `claim` is the value that a statement is about. `center` says which number stands for probabilities of a grid."""

    task: str
    item: str
    form: Form
    templates: tuple[str, ...]
    options: tuple[Option, ...]
    variant: str = "native"
    claim: str | None = None
    center: Center = "median"

    def number(self, weights: Sequence[float]) -> float:
        """The number that stands for a distribution over the grid, `weights` by option, some of them above zero: its
        mean, or its median, with the weight of a step spread evenly between the middles to the steps beside it."""
        grid = [float(option.value) for option in self.options]
        total = sum(weights)
        if self.center == "mean":
            return sum(value * weight for value, weight in zip(grid, weights, strict=True)) / total
        middles = [(one + other) / 2 for one, other in pairwise(grid)]
        edges = [2 * grid[0] - middles[0], *middles, 2 * grid[-1] - middles[-1]]
        below, step = 0.0, 0
        while below + weights[step] < total / 2:
            below += weights[step]
            step += 1
        low, high = edges[step : step + 2]
        return low + (high - low) * (total / 2 - below) / weights[step]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing a task asks about; what is here holds for items without options that a caption does not mention. `name`
    is unique among all tasks. `templates` word the question; append only, since their order is part of stored turns;
    `unseen` are wordings kept for evaluation, which no training turn uses; `paraphrases` are made of the templates or
    of the item's topic, and some are written one by one. `hidden` tells from a row's labels that what is asked cannot
    be seen on this face; None: it always can. `center` is how a number is taken from probabilities."""

    name: str
    templates: tuple[str, ...]
    options: tuple[Option, ...] = ()
    form: Form
    unseen: tuple[str, ...] = ()
    hidden: Callable[[Row], bool] | None = None
    center: Center = "median"
    wordings_agree: ClassVar[bool] = True
    """Whether the true answer is the same in whatever wording a row is asked."""

    def label(self, row: Row) -> str | None:
        """Canonical exact answer from a row of `faces` (a number as text, "37.4"); None when the row does not say."""
        raise NotImplementedError

    def parse(self, text: str) -> str | None:
        """Canonical answer from free text; None when it is not plainly there."""
        raise NotImplementedError

    @cached_property
    def paraphrases(self) -> tuple[str, ...]:
        """Further wordings, which training alone uses; none of `unseen` is among them."""
        made = paraphrases(self.templates, self.unseen, TOPICS.get(self.name))
        return (*made, *admitted(written(self.name), (*self.templates, *made), self.unseen))

    @property
    def wordings(self) -> tuple[str, ...]:
        """All wordings that ask for the item."""
        return (*self.templates, *self.paraphrases, *self.unseen)

    def wording(self, row: Row) -> int:
        """Which wording a row is asked in, drawn: one of `templates`, and in training also of the `paraphrases`, which
        are counted on from these."""
        image_id, few = str(row["image_id"]), len(self.templates)
        often, of = _PARAPHRASED
        if row.get("split") == "train" and self.paraphrases and draw(of, image_id, self.name, "wording") < often:
            return few + draw(len(self.paraphrases), image_id, self.name)
        return draw(few, image_id, self.name)

    def reply(self, row: Row, label: str) -> str:
        """The words of the true answer: those of the option, for an open question those of the row."""
        return self.option_for(label).text

    def option_for(self, label: str) -> Option:
        """The option that says a label, for a number the nearest. Raises ValueError where there are no options."""
        if not self.options:
            raise ValueError(f"{self.name} is an open question or a set: it has no options")
        return self._by_value[label]

    def mention(self, label: str) -> str | None:
        """Words for a caption; None where a caption would keep silent, as about a hat that is not there."""
        return None

    def denied(self, words: str) -> str | None:
        """The one label that a normalised text denies, and says nothing else of."""
        return None

    def names(self, words: str) -> bool:
        """Whether a normalised text speaks of any answer."""
        return True

    @property
    def claims(self) -> Mapping[str, str]:
        """Claims that are true or false of a face ("brown hair can be seen"), by the label that makes them true."""
        return {}

    @cached_property
    def _by_value(self) -> dict[str, Option]:
        return {option.value: option for option in self.options}


@dataclass(frozen=True, kw_only=True)
class FollowUp:
    """A question that an answer opens: `opener` asks whether there is anything to ask about, and only its yes is
    followed by `item` of the task, in the wordings `templates`. The opener's answer is no where the item's is `absent`,
    or where the item is hidden."""

    opener: Item
    item: str
    templates: tuple[str, ...]
    absent: str | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """One face-perception task. Metrics are macro averages over its items. `use` says what its answers may be used
    for; a `sensitive` task is asked only where the configuration gives a reason (`reformat.reasons`), and so is one
    that `reveals` the answers of sensitive tasks in passing."""

    name: str
    metric: Metric
    unit: str = ""
    items: tuple[Item, ...]
    use: str
    sensitive: bool = False
    reveals: tuple[str, ...] = ()
    follow_ups: tuple[FollowUp, ...] = ()

    def item(self, name: str) -> Item:
        """The item of that name. Raises KeyError."""
        return self._by_name[name]

    def find(self, name: str) -> Item | None:
        """The item of that name, if there is one."""
        return self._by_name.get(name)

    def question(self, item: str) -> Question:
        """The question that an item asks in its own form. Raises KeyError."""
        return self._by_item[item]

    def follow_up(self, item: str) -> FollowUp | None:
        """The follow-up that asks for that item, if there is one."""
        return next((found for found in self.follow_ups if found.item == item), None)

    def questions(self) -> tuple[Question, ...]:
        """All questions of the task, one an item."""
        return tuple(self._by_item.values())

    @cached_property
    def memo(self) -> dict[Any, Any]:
        """What `asking` has made of the task's questions, so that it is made once."""
        return {}

    @cached_property
    def _by_name(self) -> dict[str, Item]:
        return {item.name: item for item in self.items}

    @cached_property
    def _by_item(self) -> dict[str, Question]:
        return {
            i.name: Question(
                **{name: getattr(i, name) for name in ("form", "templates", "options", "center")},
                task=self.name,
                item=i.name,
            )
            for i in self.items
        }


def fault_of(task: Task) -> str | None:
    """What is wrong with a task, in words; None if it is sound."""
    if task.metric not in get_args(Metric):
        return f"unknown metric '{task.metric}'; there are {', '.join(get_args(Metric))}"
    names = [item.name for item in task.items]
    if not names or len(set(names)) < len(names):
        return f"its items need names that differ, and there must be one: {names}"
    for item in task.items:
        where = f"item '{item.name}'"
        values = [option.value for option in item.options]
        if re.fullmatch(r"[\w-]+", item.name) is None:
            return f"{where}: a name is made of letters, digits, _ and -"
        if not item.templates or set(item.templates) & set(item.unseen):
            return f"{where}: it needs wordings, and unseen ones that are not among them"
        if len(set(values)) < len(values):
            return f"{where}: two options have the same value"
        if item.form in CLOSED and len(values) < 2:
            return f"{where}: a question of form '{item.form}' needs options"
    return None


def known(row: Row, column: str) -> Mapping[str, Any]:
    """A column of named values (`attributes`, `action_units`) as a mapping, whether stored as pairs or one already."""
    stored = row.get(column)
    return stored if isinstance(stored, Mapping) else mapping(stored)


def attribute(row: Row, name: str) -> bool | None:
    """An attribute of a row of `faces`; None is unknown."""
    return known(row, "attributes").get(name)


def number_text(value: float | None) -> str | None:
    """A number as canonical text: 37.4 for the float32 nearest to it, 35 for 35.0; None if it is none."""
    if value is None or not math.isfinite(value):
        return None
    return f"{round(value, 4) + 0.0:.6g}"


def exactly_one(names: tuple[str, ...]) -> Callable[[Row], str | None]:
    """Label of a group of exclusive attributes: known only if all members are known and one of them is true."""

    def label(row: Row) -> str | None:
        found = known(row, "attributes")
        values = [found.get(name) for name in names]
        if None in values or sum(map(bool, values)) != 1:
            return None
        return names[values.index(True)]

    return label


def column(name: str) -> Callable[[Row], Any]:
    """Label that stands in a column of its own."""
    return lambda row: row.get(name)


def sizes(row: Row) -> Sizes | None:
    """Shares of the classes in a row's segmentation; None where there is none or it is no such map."""
    stored = row.get("segmentation")
    data = stored.get("bytes") if isinstance(stored, Mapping) else stored
    return _sizes(data) if data else None


@lru_cache(maxsize=4)  # all questions about a face are asked in a row
def _sizes(data: bytes) -> Sizes | None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS or image.mode not in ("L", "P"):
                return None
            counts = image.histogram()
    except Exception:  # damaged data can raise almost anything from a decoder
        return None
    if any(counts[len(SEGMENTATION) :]):
        return None
    total = sum(counts)
    return {name: count / total for name, count in zip(SEGMENTATION, counts, strict=False)}


def shown(found: Sizes, classes: tuple[str, ...]) -> bool | None:
    """Whether any of these classes is to be seen: no pixel is no; a few pixels are neither yes nor no."""
    share = sum(found[name] for name in classes)
    return True if share >= 1 / FAINT else None if share else False


def hidden_from(row: Row, *classes: str) -> bool:
    """Whether a row's segmentation says that none of these classes can be seen."""
    found = sizes(row)
    return found is not None and shown(found, classes) is False
