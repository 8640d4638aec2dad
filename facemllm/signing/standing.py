"""What is in force about a bundle: its state, who signed, what is missing and who may still sign.

A rejection or revocation beats every approval of the same model that does not have it among its `previous`,
transitively; so an old approval that is put in again undoes nothing. Where a statement is missing that another builds
on, no approval of that model counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from facemllm.signing.canonical import Refused, time_text, utc_now
from facemllm.signing.decisions import Decisions, Entry, model_of
from facemllm.signing.policy import Policy, Rule, same_person
from facemllm.signing.statements import SKEW, Statement

State = Literal["pending", "requested", "approved", "rejected", "revoked", "expired"]


@dataclass(frozen=True)
class Standing:
    """What is in force about a bundle at a time.

    `requests` are who asked (one that has ended waits no more, but what it led to stays), `approvals` the approvals in
    force, `against` the rejection or revocation in force; `missing` how many must still sign in each role, `may_sign`
    the persons who can; `refused` says of every statement that counts for nothing, why. `expires` is when an approved
    bundle stops being so.
    """

    bundle: str
    model: str
    state: State
    requests: tuple[Statement, ...]
    approvals: tuple[Statement, ...]
    against: Statement | None
    missing: Mapping[str, int]
    may_sign: tuple[str, ...]
    refused: tuple[Refused, ...]
    expires: datetime | None

    @property
    def requester(self) -> str | None:
        """Who asked last."""
        return self.requests[-1].person if self.requests else None


def standing(decisions: Decisions, policy: Policy, bundle: str, now: datetime | None = None) -> Standing:
    """What is in force about a bundle. Raises Refused ("missing") if the repository does not hold it."""
    model = model_of(decisions.bundle(bundle), bundle)
    return judge(bundle, model, decisions.statements(model, policy), policy, now or utc_now())


def require_counts(decisions: Decisions, policy: Policy, statement: Statement, now: datetime | None = None) -> None:
    """Raises Refused if a statement that is about to be added would count for nothing, with the check that fails."""
    if statement.decision != "approve":
        return
    now = now or utc_now()
    entries = decisions.statements(statement.model, policy)
    before = judge(statement.bundle, statement.model, entries, policy, now)
    if not before.requests:
        raise Refused(
            "missing", f"nobody asked for a decision on bundle {statement.bundle[:12]}; `facemllm promote request`"
        )
    for other in before.approvals:
        if other.key != statement.key and same_person(other.person) == same_person(statement.person):
            raise Refused("same_person", f"{other.person} has signed with another key; a person counts once")
    entries = [one for one in entries if one.id != statement.id]
    entry = Entry(statement, None, "", now, f"statements/{statement.model}/{statement.id}.json", statement.id)
    after = judge(statement.bundle, statement.model, [*entries, entry], policy, now)
    for refused in after.refused:
        if refused.statement == statement.id:
            raise refused


def judge(bundle: str, model: str, entries: Sequence[Entry], policy: Policy, now: datetime) -> Standing:
    """What is in force about a bundle of a model, from the statements about the model in the order they were added."""
    rule = policy.rule
    valid = [entry.statement for entry in entries if entry.statement is not None]
    own = [one for one in valid if one.bundle == bundle]
    asked = [one for one in own if one.decision == "request"]
    requests = [one for one in asked if one.issued <= now + SKEW]
    waiting = [one for one in requests if one.expires is None or now < one.expires]
    against = [one for one in valid if one.decision in ("reject", "revoke")]
    past = _Past(valid)
    known = {entry.id for entry in entries}
    lost = next(((one, name) for one in valid for name in one.previous if name not in known), None)
    barred = set() if rule.requester_may_approve else {same_person(one.person) for one in asked}

    refused = [entry.refused for entry in entries if entry.refused is not None]
    good: list[Statement] = []
    late: list[Statement] = []
    for one in own:
        if one.decision != "approve":
            continue
        why = _lasting_refusal(one, lost, against, past, barred)
        over = _time_refusal(one, rule, now)
        if why is None and over is None:
            good.append(one)
        elif why is None and over is not None and over.check == "expired":
            late.append(one)
        refused += [one_why for one_why in (why or over,) if one_why is not None]

    counted = _once_a_person(good, rule)
    refused += [
        Refused("same_person", f"{one.words} counts once with the other by the same person", one.id)
        for one in good
        if one not in counted
    ]
    missing = _missing(counted, rule)
    last = next((one for one in reversed(against) if not requests or not past.has(requests[-1], one)), None)
    state: State
    if requests and not missing:
        state, last = "approved", None
    elif last is not None:
        state = "rejected" if last.decision == "reject" else "revoked"
    elif requests and late and not _missing(_once_a_person([*good, *late], rule), rule):
        state = "expired"
    else:
        state = "requested" if waiting else "pending"
    signed = {same_person(one.person) for one in counted} | barred
    able = {person for role in missing for person in policy.persons(role, now)} if requests else set()
    return Standing(
        bundle=bundle,
        model=model,
        state=state,
        requests=tuple(requests),
        approvals=tuple(counted),
        against=last,
        missing=missing,
        may_sign=tuple(sorted(person for person in able if same_person(person) not in signed)),
        refused=tuple(refused),
        expires=_end(counted, rule) if state == "approved" else None,
    )


class _Past:
    """What each statement's signer had seen, directly or through the statements seen."""

    def __init__(self, valid: Iterable[Statement]):
        self._previous = {one.id: one.previous for one in valid}
        self._known: dict[str, set[str]] = {}

    def has(self, one: Statement, other: Statement) -> bool:
        """Whether the signer of `one` had seen `other`."""
        if one.id not in self._known:
            seen: set[str] = set()
            todo = list(one.previous)
            while todo:
                if (name := todo.pop()) not in seen:
                    seen.add(name)
                    todo += self._previous.get(name, ())
            self._known[one.id] = seen
        return other.id in self._known[one.id]


def ends(one: Statement, rule: Rule) -> datetime:
    """When an approval stops counting: by its own word or the policy's, whichever is earlier."""
    longest = one.issued + timedelta(days=rule.valid_days)
    return longest if one.expires is None else min(one.expires, longest)


def _time_refusal(one: Statement, rule: Rule, now: datetime) -> Refused | None:
    if one.issued > now + SKEW:
        return Refused("not_yet_valid", f"{one.words} is of a time to come", one.id)
    if now >= (end := ends(one, rule)):
        return Refused("expired", f"{one.words} held until {time_text(end)}; sign it anew", one.id)
    return None


def _lasting_refusal(
    one: Statement, lost: tuple[Statement, str] | None, against: Sequence[Statement], past: _Past, barred: set[str]
) -> Refused | None:
    if lost is not None:
        why = f"{lost[0].words} builds on statement {lost[1]}, which is not in the repository (any more)"
        return Refused("history", why, one.id)
    if same_person(one.person) in barred:
        return Refused("requester", f"{one.person} asked for the decision and may not approve it", one.id)
    for other in reversed(against):
        if not past.has(one, other):
            check = "rejected" if other.decision == "reject" else "revoked"
            return Refused(check, f"{one.words} does not stand against {other.words}: {other.reason}", one.id)
    return None


def _once_a_person(approvals: Sequence[Statement], rule: Rule) -> list[Statement]:
    """One approval a person, so that as many roles as possible are signed (a maximum matching of persons and roles)."""
    choices: dict[str, dict[str, Statement]] = {}
    for one in sorted(approvals, key=lambda one: ends(one, rule)):  # of two in one role the one that holds longer
        choices.setdefault(same_person(one.person), {})[one.role] = one
    taken: dict[tuple[str, int], str] = {}

    def place(person: str, tried: set[tuple[str, int]]) -> bool:
        for role in choices[person]:
            for slot in ((role, number) for number in range(rule.approvals.get(role, 0))):
                if slot not in tried:
                    tried.add(slot)
                    if slot not in taken or place(taken[slot], tried):
                        taken[slot] = person
                        return True
        return False

    for person in choices:
        place(person, set())
    chosen = {person: role for (role, _), person in taken.items()}
    counted = {id(held[chosen.get(person, next(iter(held)))]) for person, held in choices.items()}
    return [one for one in approvals if id(one) in counted]


def _missing(counted: Iterable[Statement], rule: Rule) -> dict[str, int]:
    signed = Counter(one.role for one in counted)
    return {role: number - signed[role] for role, number in rule.approvals.items() if signed[role] < number}


def _end(counted: Sequence[Statement], rule: Rule) -> datetime:
    """When too few of the approvals will be left."""
    times = sorted(ends(one, rule) for one in counted)
    for time in times:
        rest = [one for one in counted if ends(one, rule) > time]
        if _missing(rest, rule):
            return time
    return times[-1]
