"""May a model with these bytes be served now? The one question that release, server and cluster ask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from facemllm.signing.canonical import Refused, utc_now
from facemllm.signing.decisions import Decisions, Entry, model_of
from facemllm.signing.policy import Policy
from facemllm.signing.standing import Standing, judge
from facemllm.signing.statements import Statement


@dataclass(frozen=True)
class Authorization:
    """Why a model may be served: the bundle, the approvals in force, until when, and the commit that was read.

    `stale` says in one line that the repository's address was out of reach.
    """

    model: str
    bundle: str
    approvals: tuple[Statement, ...]
    expires: datetime
    head: str
    stale: str | None


def authorize(
    model_digest: str, decisions: Decisions, policy: Policy, now: datetime | None = None, bundle: str | None = None
) -> Authorization:
    """Whether the model of this digest may be served now, on the grounds of `bundle` where one is given.

    Verifies the repository's history, every signature, roles, persons, expiry and revocation, and moves the
    checkpoint on. Raises Refused with the one check that failed; what is against the model comes before the clock, or a
    commit with a date to come would hide a revocation.
    """
    now = now or utc_now()
    decisions.refresh()
    late: Refused | None = None
    try:
        decisions.check(now)
        decisions.remember(now)
    except Refused as error:
        if error.check != "clock":
            raise
        late = error
    entries = decisions.statements(model_digest, policy)
    named = list(dict.fromkeys(one.statement.bundle for one in reversed(entries) if one.statement is not None))
    refusals: list[Refused] = []
    for name in [bundle] if bundle is not None else named:
        try:
            about = model_of(decisions.bundle(name), name)
            if about != model_digest:
                raise Refused("other_model", f"bundle {name[:12]} is about model {about[:12]}, not {model_digest[:12]}")
            found = judge(name, model_digest, entries, policy, now)
            if found.state == "approved" and found.expires is not None and decisions.head is not None:
                if late is not None:
                    raise late
                head, stale = decisions.head, decisions.stale
                return Authorization(model_digest, name, found.approvals, found.expires, head, stale)
            refusals.append(_why(found, entries))
        except Refused as error:
            if error.check in ("history", "clock"):
                raise
            refusals.append(error)
    refusals += [one.refused for one in reversed(entries) if one.refused is not None]
    way = "`facemllm promote show` says what is missing"
    if refusals:
        first = refusals[0]
        if late is not None and first.check in ("expired", "not_yet_valid"):
            raise late
        raise Refused(first.check, f"model {model_digest[:12]} may not be served: {first}; {way}", first.statement)
    nobody = f"nobody has decided about it in {decisions.place}; `facemllm promote request` asks for a decision"
    raise Refused("missing", f"model {model_digest[:12]} may not be served: {nobody}")


def _why(found: Standing, entries: Sequence[Entry]) -> Refused:
    """The one reason why a bundle is not approved."""
    if found.against is not None:
        return Refused(found.state, f"{found.against.words}: {found.against.reason}", found.against.id)
    if found.refused:
        return found.refused[-1]
    valid = [one.statement for one in entries if one.statement is not None]
    other = [one for one in valid if one.decision == "approve" and one.bundle != found.bundle]
    if other:
        what = f"is about another bundle, {other[-1].bundle[:12]}, not {found.bundle[:12]}"
        return Refused("other_bundle", f"{other[-1].words} {what}", other[-1].id)
    lacks = " and ".join(f"{number} x {role}" for role, number in found.missing.items())
    asked = "" if found.requests else "nobody asked for a decision; "
    who = f" ({', '.join(found.may_sign)} may sign)" if found.may_sign else ""
    return Refused("missing", f"{asked}approvals are missing: {lacks}{who}" if lacks else f"{asked.rstrip('; ')}")
