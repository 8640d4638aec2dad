"""Where words and labels of one face contradict each other: what annotation counts and the quality room reports.

Strict in both directions: silence, hedging and unknown labels contradict nothing, and a number counts as another one
only when it is plainly off: an age by more than ten years, an angle by more than fifteen degrees.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from facemllm.tables import mapping
from facemllm.tasks import attributes
from facemllm.tasks.base import Item, Row
from facemllm.tasks.caption import FACTS, stated_facts
from facemllm.tasks.language import assertions

TOLERANCE = {"age": 10.0, "yaw": 15.0, "pitch": 15.0, "roll": 15.0}
"""How far a number may be from its label: years, degrees."""

Differences = dict[str, tuple[str, str]]
"""Item name -> (what is stated, what is labelled), both canonical."""


def disagreements(row: Row) -> Differences:
    """Facts that the caption of a row of `faces` states otherwise than the labels of the row do."""
    plain = assertions(row.get("caption") or "")
    if not plain:
        return {}
    found = {}
    for item in FACTS:
        labelled = item.label(row)
        stated = None if labelled is None else stated_facts(plain).get(item.name)
        if labelled is not None and stated is not None and _differ(item, stated, labelled):
            found[item.name] = stated, labelled
    return found


def label_disagreements(stated: Row, row: Row) -> Differences:
    """Labels given for a row that differ from its own; attributes are compared name by name (`yes` or `no`)."""
    found = {}
    given, own = _attributes(stated), _attributes(row)
    for name in sorted(given.keys() & own.keys()):
        if None not in (given[name], own[name]) and given[name] != own[name]:
            found[name] = _word(given[name]), _word(own[name])
    for item in FACTS:
        if item in attributes.TASK.items:
            continue
        says, labelled = item.label(stated), item.label(row)
        if says is not None and labelled is not None and _differ(item, says, labelled):
            found[item.name] = says, labelled
    return found


def _differ(item: Item, stated: str, labelled: str) -> bool:
    if item.form != "number":
        return stated != labelled
    if item.option_for(stated) == item.option_for(labelled):
        return False  # beyond the grid's end, both are said the same way
    return abs(float(stated) - float(labelled)) > TOLERANCE[item.name]


def _attributes(row: Row) -> Mapping[str, Any]:
    stored = row.get("attributes")
    return stored if isinstance(stored, Mapping) else mapping(stored)


def _word(value: bool) -> str:
    return "yes" if value else "no"
