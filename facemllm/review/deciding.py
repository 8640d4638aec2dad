"""A decision of the page: what was offered, still the same, is signed here and appended to the repository."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from facemllm.errors import UserError
from facemllm.review.fields import is_digest
from facemllm.review.pages import Pages
from facemllm.review.views import CHOICES, OwnKey, RequestPage
from facemllm.settings import Settings
from facemllm.signing import keys, local
from facemllm.signing.canonical import utc_now
from facemllm.signing.decisions import Decisions
from facemllm.signing.policy import Policy
from facemllm.signing.standing import require_counts
from facemllm.signing.statements import LONGEST_REASON, Draft, Statement, sign, verify


class Changed(UserError):
    """Since the page was shown, something was decided, or the policy changed."""


@dataclass(frozen=True)
class Offer:
    """A decision as the last page shows it: what is signed if the person agrees, and what they had seen."""

    decision: str
    bundle: str
    model: str
    reason: str
    key: str
    person: str
    role: str
    previous: tuple[str, ...]
    seen: str


def offer(request: RequestPage, decision: str, reason: str, key: str, seen: str) -> Offer:
    """What a form asks to sign, held against the page that it came from. Raises UserError, Changed."""
    _unchanged(request, seen)
    if decision not in dict(CHOICES):
        raise UserError("choose a decision: approve, reject or revoke")
    why = " ".join(reason.split())
    if not why:
        raise UserError("a decision needs a reason; write one sentence")
    if len(why) > LONGEST_REASON:
        raise UserError(f"the reason is {len(why)} characters long; keep it below {LONGEST_REASON}")
    if not why.isprintable():
        raise UserError("the reason holds characters that cannot be seen; write it in plain characters")
    own = next((one for one in request.keys if one.id == key), None)
    if own is None:
        raise UserError("that key does not lie here, or the policy does not let it decide; choose one of the list")
    if decision == "approve" and own.person not in request.may_sign:
        others = ", ".join(request.may_sign) or "nobody else"
        raise UserError(f"{own.person} may not approve this (asked for it, or has signed); still may: {others}")
    if not is_digest(request.facts.model):
        raise UserError("this bundle does not say which model it is about; nothing can be signed about it")
    if decision == "approve" and request.facts.passed is not True:
        raise UserError("this model did not pass its gate; nobody can approve it")
    role = _role(request, own)
    return Offer(
        decision, request.bundle, request.facts.model, why, own.id, own.person, role, request.previous, request.seen
    )


def decide(pages: Pages, offered: Offer, passphrase: bytes | None) -> Statement:
    """Sign what was offered and append it. Raises Changed where it is no longer what was seen, UserError."""
    _unchanged(pages.request(offered.bundle), offered.seen)
    decisions, policy = pages.current()
    try:
        return _signed(pages.settings, decisions, policy, offered, passphrase)
    finally:
        pages.forget()


def _signed(
    settings: Settings, decisions: Decisions, policy: Policy, offered: Offer, passphrase: bytes | None
) -> Statement:
    signer = keys.signer(local.keys_folder(settings), offered.key, (lambda _: passphrase) if passphrase else None)
    now = utc_now()
    draft = Draft(
        decision=offered.decision,  # type: ignore[arg-type]  # one of CHOICES
        bundle=offered.bundle,
        model=offered.model,
        reason=offered.reason,
        role=offered.role,
        previous=offered.previous,
        issued=now,
        expires=now + timedelta(days=policy.rule.valid_days) if offered.decision == "approve" else None,
    )
    envelope = sign(draft, signer)
    require_counts(decisions, policy, verify(envelope, policy), now)
    return decisions.append(envelope)


def _role(request: RequestPage, own: OwnKey) -> str:
    missing: Sequence[str] = [role for role in own.roles if role in request.missing]
    return (*missing, *own.roles)[0]


def _unchanged(request: RequestPage, seen: str) -> None:
    if request.seen != seen:
        raise Changed(
            "since that page was shown, something was signed about this model or the policy changed; nothing was "
            "signed now: read the page again"
        )
