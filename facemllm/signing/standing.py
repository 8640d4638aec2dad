"""What is in force about a bundle: its state, who signed, what is missing and who may still sign.

A rejection or revocation beats every approval of the same model that does not have it among its `previous`,
transitively; so an old approval that is put in again undoes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from facemllm.signing.decisions import Decisions
from facemllm.signing.policy import Policy
from facemllm.signing.statements import Refused, Statement

State = Literal["pending", "requested", "approved", "rejected", "revoked", "expired"]


@dataclass(frozen=True)
class Standing:
    """What is in force about a bundle at a time.

    `requests` are those that count, `approvals` the approvals in force, `against` the rejection or revocation in
    force; `missing` how many must still sign in each role, `may_sign` the persons who can; `refused` says of every
    statement about the bundle that counts for nothing, why. `expires` is when an approved bundle stops being so.
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
    raise NotImplementedError
