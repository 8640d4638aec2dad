"""What each page is given: plain data, ready to be written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from facemllm.review.facts import Digest, Facts
from facemllm.review.samples import Samples
from facemllm.signing.statements import Statement

STATES: Mapping[str, tuple[str, ...]] = {
    "waiting": ("requested",),
    "approved": ("approved",),
    "rejected": ("rejected",),
    "revoked": ("revoked",),
    "expired": ("expired",),
    "not requested": ("pending",),
    "all": ("requested", "approved", "rejected", "revoked", "expired", "pending"),
}
"""Filters of the queue, and the states that each shows."""
CHOICES = (("approve", "Approve"), ("reject", "Reject"), ("revoke", "Revoke an approval"))
FILES = {
    "bundle.json": "what the decision stands on; its SHA-256 is what is signed",
    "card.md": "model card",
    "sbom.json": "bill of materials, CycloneDX",
}
"""Files of a bundle that can be downloaded, and what they are."""


@dataclass(frozen=True)
class Row:
    """A request in the queue."""

    bundle: str
    name: str
    version: str
    model: str
    state: str
    asked: datetime | None
    by: str
    missing: str
    passed: bool | None
    failed: int
    loosened: int
    near: int
    worse: int | None
    problem: str


@dataclass(frozen=True)
class Queue:
    """A page of the queue: its rows, how many requests each filter shows, and what is wrong with the repository."""

    rows: tuple[Row, ...]
    counts: Mapping[str, int]
    state: str
    page: int
    pages: int
    total: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Event:
    """A statement about the model, or why one counts for nothing (`refused`, and the `check` that failed)."""

    id: str
    decision: str
    person: str
    role: str
    reason: str
    issued: datetime | None
    expires: datetime | None
    key: str
    commit: str
    ours: bool
    refused: str
    check: str


@dataclass(frozen=True)
class OwnKey:
    """A private key here that the policy lets decide: whose, in which roles, and whether it has a passphrase."""

    id: str
    person: str
    roles: tuple[str, ...]
    encrypted: bool


@dataclass(frozen=True)
class RequestPage:
    """All that is known about one request. `seen` changes with everything a decision could depend on."""

    bundle: str
    facts: Facts
    state: str
    requester: str
    asked: datetime | None
    reason: str
    approvals: tuple[Statement, ...]
    missing: Mapping[str, int]
    may_sign: tuple[str, ...]
    history: tuple[Event, ...]
    earlier: Mapping[str, Sequence[tuple[str, float]]]
    newer: tuple[str, ...]
    samples: Samples
    digests: tuple[Digest, ...]
    files: tuple[tuple[str, str], ...]
    card: str
    keys: tuple[OwnKey, ...]
    choices: tuple[tuple[str, str], ...]
    commands: tuple[str, ...]
    previous: tuple[str, ...]
    seen: str
    mlflow: str
    warnings: tuple[str, ...]
    notice: str = ""

    @property
    def missing_count(self) -> int:
        """How many signatures are missing."""
        return sum(self.missing.values())
