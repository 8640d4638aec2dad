"""The gate's rules about where a model and its figures come from: whose figures they are, what the model cost, and what
the terms of its data allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from facemllm.core import cost
from facemllm.promote.checks import Check, check, number
from facemllm.settings import Settings
from facemllm.version import ledger


@dataclass(frozen=True)
class Origin:
    """What a verdict rests on beside the figures.

    `model` and `champion` are digests of the two models' own bytes (`champion` None: none is in production, or it is
    this model); `answered` says whose answers the evaluations of `candidate` and, if there is one, `champion` hold.
    `digests` has, by input, the digest it goes by and the one recomputed from its bytes. `sources` are ledger keys of
    what the model was trained on, `costs` what each step behind it cost.
    """

    model: str
    champion: str | None
    answered: Mapping[str, str]
    digests: Mapping[str, tuple[str, str]]
    sources: Sequence[str]
    costs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def same_bytes(origin: Origin) -> list[Check]:
    """Every input has the digest it goes by."""
    found = []
    for name, (named, recomputed) in origin.digests.items():
        passed = named == recomputed
        words = "are those of its digest" if passed else "are not those of its digest"
        reason = f"the bytes of the {name} {words} {named[:12]}"
        found.append(check("digest", name, passed, reason, value=recomputed, limit=named))
    return found


def own_figures(origin: Origin) -> list[Check]:
    """The candidate's answers are the model's own, the champion's those of the model in production."""
    found = []
    for who, said in origin.answered.items():
        digest = origin.model if who == "candidate" else str(origin.champion)
        passed = said == digest
        reason = f"the {who}'s figures are those of model {said[:12]}" + ("" if passed else f", not of {digest[:12]}")
        found.append(check("identity", who, passed, reason, value=said, limit=digest))
    return found


def within_budget(settings: Settings, origin: Origin) -> list[Check]:
    """All steps behind the model together did not cost more than they may."""
    rate = settings.cost.price_per_hour
    each = [number(body.get("seconds")) for body in origin.costs.values()]
    seconds = sum(part for part in each if part is not None) if each and None not in each else None
    price = None if seconds is None else cost.priced({"seconds": seconds}, rate).get("price")
    found = []
    for name, limit in settings.promote.budget.model_dump().items():
        value = seconds if name == "seconds" else price
        if limit is None:
            continue
        setting = f"promote.budget.{name}"
        if value is None:
            missing = "cost.price_per_hour is not set" if seconds is not None else "no cost of its steps is recorded"
            reason = f"the model has no {name} to hold against {limit:g}: {missing}"
        else:
            reason = f"the model cost {value:,.6g} {name}, {'at most' if value <= limit else 'more than'} {limit:,.6g}"
        passed = value is not None and value <= limit
        found.append(check("budget", name, passed, reason, setting=setting, value=value, limit=limit))
    return found


def allowed_uses(settings: Settings, origin: Origin) -> list[Check]:
    """The terms of every source allow what is asked for. A source without a row in the ledger allows nothing."""
    rows, asked = ledger.entries(settings), settings.promote.uses
    found = []
    for use in asked:
        against = [key for key in origin.sources if key not in rows or not _allows(rows[key], use)]
        named = [f"{key} ({rows[key].licence}; {rows[key].status})" if key in rows else key for key in against]
        reason = f"the terms of {', '.join(named) or 'all sources'} {'do not ' if named else ''}allow to "
        passed = not against and bool(origin.sources)
        reason = reason + ledger.MEANING[use] if origin.sources else "the model names no source, so nothing is allowed"
        value = [key for key in origin.sources if key not in against]
        setting = f"promote.uses.{use}"
        found.append(check("uses", use, passed, reason, setting=setting, value=value, limit=list(origin.sources)))
    return found


def _allows(row: ledger.Entry, use: ledger.Use) -> bool:
    return row.status != "withdrawn" and use in row.uses
