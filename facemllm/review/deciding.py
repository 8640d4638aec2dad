"""A decision of the page: what was offered, still the same, is signed here and appended to the repository."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from facemllm.errors import UserError
from facemllm.promote.decide import Verdict, checked_reason, take
from facemllm.review.fields import is_digest
from facemllm.review.pages import Pages
from facemllm.review.views import CHOICES, OwnKey, RequestPage
from facemllm.signing import keys, local
from facemllm.signing.statements import Draft, Statement


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
    if not (why := checked_reason(reason)):
        raise UserError("a decision needs a reason; write one sentence")
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
    prompt = (lambda _: passphrase) if passphrase else None
    signer = keys.signer(local.keys_folder(pages.settings), offered.key, prompt)
    verdict = cast(Verdict, offered.decision)
    draft = Draft(verdict, offered.bundle, offered.model, offered.reason, offered.role, offered.previous)
    version = decisions.bundle(offered.bundle).get("model", {}).get("version", 0)
    try:
        return take(pages.settings, decisions, policy, draft, signer, version)
    finally:
        pages.forget()


def _role(request: RequestPage, own: OwnKey) -> str:
    missing: Sequence[str] = [role for role in own.roles if role in request.missing]
    return (*missing, *own.roles)[0]


def _unchanged(request: RequestPage, seen: str) -> None:
    if request.seen != seen:
        raise Changed(
            "since that page was shown, something was signed about this model or the policy changed; nothing was "
            "signed now: read the page again"
        )
