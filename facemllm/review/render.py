"""From data to HTML: the templates, what they may call, and which picture stands for what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from facemllm.report.kit import brief, percent, words
from facemllm.report.web import environment, style
from facemllm.review import drawing
from facemllm.review.drawing import Node
from facemllm.review.facts import Change, Check, Digest, Gap, Task
from facemllm.review.views import RequestPage

STYLE = style(Path(__file__).with_name("style.css"))
_LAST = ("evaluate", "evaluation", "gate", "model")
_BESIDE = 5  # sources in the graph; more are counted


def page(template: str, **data: Any) -> str:
    """A page of plain data: `template` is a file of `templates/`."""
    return _environment().get_template(template).render(data)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    filters = {"brief": _brief, "percent": percent, "words": words}
    made = environment(Path(__file__).with_name("templates"), filters)
    made.globals["draw"] = Draw
    return made


def _brief(value: float | None) -> str:
    """A figure in three digits with a true minus; nothing for None."""
    return "" if value is None else brief(round(value, 9) + 0.0).replace("-", "−")


class Draw:
    """The pictures of a request, as templates ask for them."""

    @staticmethod
    def legend(kind: str) -> Markup:
        """A sample of a mark, for the legend."""
        return drawing.legend(kind)

    @staticmethod
    def task(task: Task) -> Markup:
        """A task's figure beside the constant answer and the champion, from zero; shares to one."""
        every = [task.value, task.low, task.high, task.constant, task.champion]
        top = max((value for value in every if value is not None), default=1.0)
        share = task.higher_is_better and 0 <= top <= 1
        ends = (0.0, 1.0) if share else drawing.scale(every, zero=True)
        return drawing.interval(
            task.value, task.low, task.high, ends, {"constant": task.constant, "champion": task.champion}
        )

    @staticmethod
    def check(check: Check) -> Markup:
        """A rule's figure beside its limit."""
        if check.kind == "fairness":
            return Draw._between(check.value, check.low, check.high, check.limit)
        ends = drawing.scale([check.value, check.low, check.high, check.limit])
        return drawing.interval(check.value, check.low, check.high, ends, {"limit": check.limit})

    @staticmethod
    def change(change: Change) -> Markup:
        """How much worse than the champion, zero in the middle."""
        every = [abs(value) for value in (change.worse, change.low, change.high) if value is not None]
        reach = 1.06 * max(every, default=1.0) or 1.0
        return drawing.interval(change.worse, change.low, change.high, (-reach, reach), {"zero": 0.0})

    @staticmethod
    def gap(gap: Gap) -> Markup:
        """A difference between groups, zero in the middle, between its limits."""
        return Draw._between(gap.value, gap.low, gap.high, gap.limit)

    @staticmethod
    def _between(value: float | None, low: float | None, high: float | None, limit: float | None) -> Markup:
        every = [abs(one) for one in (value, low, high, limit) if one is not None]
        reach = 1.06 * max(every, default=1.0) or 1.0
        marks = {"zero": 0.0, "limit": limit, "limit lower": None if limit is None else -limit}
        return drawing.interval(value, low, high, (-reach, reach), marks)

    @staticmethod
    def sparkline(values: Sequence[tuple[str, float]]) -> Markup:
        """A figure over versions."""
        return drawing.sparkline(values)

    @staticmethod
    def lineage(request: RequestPage) -> Markup:
        """What the model came from, and what the decision stands on."""
        return drawing.graph(_nodes(request), "What came from what, from the data above to the bundle below")


def _nodes(request: RequestPage) -> list[Node]:
    facts = request.facts
    known: Mapping[str, Digest] = {one.name: one for one in request.digests}
    steps = [one for one in facts.lineage if one.name not in _LAST and one.value != facts.model]
    last = [one for name in ("model", "evaluation", "bundle") if (one := known.get(name))]
    trunk = [Node(one.name, words(one.name), one.value[:12], f"#{one.anchor}") for one in (*steps, *last)]
    if not trunk:
        return []
    first = trunk[0].key
    beside = [
        Node(f"source {i}", one.name, one.licence, "#data", first) for i, one in enumerate(facts.sources[:_BESIDE])
    ]
    if more := len(facts.sources) - _BESIDE:
        beside += [Node("sources", f"{more} more sources", "", "#data", first)] if more > 0 else []
    made = "model" if "model" in known else first
    commit = dict(facts.code).get("commit", "")
    beside += [Node("commit", "code", commit[:12], "#lineage", made)] if commit else []
    if facts.champion and "evaluation" in known:
        link = known.get("champion's model")
        beside.append(
            Node("champion", "champion", facts.champion[1][:12], f"#{link.anchor}" if link else "", "evaluation")
        )
    for name in ("model card", "SBOM"):
        if one := known.get(name):
            beside.append(Node(name, name, one.value[:12], f"#{one.anchor}", "bundle"))
    return [*trunk, *beside]
