"""May a model with these bytes be served now? The one question that release, server and cluster ask."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from facemllm.signing.decisions import Decisions
from facemllm.signing.policy import Policy
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
    checkpoint on. Raises Refused with the one check that failed.
    """
    raise NotImplementedError
