"""The decisions repository: a git repository to which bundles, statements and model signatures are only ever added.

bundles/<bundle digest>/bundle.json, card.md, ...    statements/<model digest>/<statement id>.json
signatures/<model digest>.json
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from facemllm.settings import Settings
from facemllm.signing.policy import Policy
from facemllm.signing.statements import Refused, Statement


@dataclass(frozen=True)
class Entry:
    """A statement's file: the statement, or why it counts for nothing; the commit that added it, and when (UTC)."""

    statement: Statement | None
    refused: Refused | None
    commit: str
    committed_at: datetime
    path: str

    @property
    def id(self) -> str:
        """The statement's id, as its file is named."""
        return Path(self.path).stem

    @property
    def model(self) -> str:
        """Digest of the model whose folder it lies in."""
        return self.path.split("/")[1]


@dataclass(frozen=True)
class Change:
    """A commit: what its message says and the files it added."""

    commit: str
    committed_at: datetime
    message: str
    paths: tuple[str, ...]


class Decisions:
    """The decisions repository at a path or address.

    `stale` says in one line that the address could not be reached, so that what is read is the copy of last time.
    """

    stale: str | None

    def __init__(self, path: str | Path, policy: Policy, checkpoint: Path | None = None, clones: Path | None = None):
        """A repository is made at a path where none is; `clones` is the folder for copies of those at addresses."""
        raise NotImplementedError

    @classmethod
    def open(cls, settings: Settings, policy: Policy | None = None) -> Decisions:
        """The repository that the settings name, with their policy and the checkpoint under home."""
        raise NotImplementedError

    def refresh(self) -> str | None:
        """Read what others appended meanwhile. Returns `stale`."""
        raise NotImplementedError

    def append_bundle(self, files: Mapping[str, bytes]) -> str:
        """Add a bundle's files, `bundle.json` among them; nothing happens if it is there. Returns the digest."""
        raise NotImplementedError

    def append(self, envelope: bytes) -> Statement:
        """Verify a statement and add it; nothing happens if it is there. Raises Refused if it does not verify."""
        raise NotImplementedError

    def append_signature(self, model: str, signature: bytes) -> None:
        """Add the signature of a model's directory (OpenSSF model-signing) under the model's digest."""
        raise NotImplementedError

    def signature(self, model: str) -> bytes | None:
        """The signature of a model's directory, if there is one; it is to be verified by whoever reads it."""
        raise NotImplementedError

    def bundle(self, digest: str) -> dict[str, Any]:
        """A bundle's `bundle.json`, whose bytes have this digest. Raises Refused ("missing", "malformed")."""
        raise NotImplementedError

    def bundle_file(self, digest: str, name: str) -> bytes:
        """A file of a bundle, `bundle.json` or one whose digest that gives. Raises Refused ("missing", "digest")."""
        raise NotImplementedError

    def bundles(self) -> list[str]:
        """The digests of all bundles, in the order in which they were added."""
        raise NotImplementedError

    def statements(self, model: str | None = None) -> list[Entry]:
        """Every statement, or those about one model, in the order in which they were added."""
        raise NotImplementedError

    def previous(self, model: str) -> tuple[str, ...]:
        """The ids of all statements about a model now: what whoever signs next has seen."""
        raise NotImplementedError

    def history(self) -> list[Change]:
        """Every commit, oldest first."""
        raise NotImplementedError

    def verify_history(self, now: datetime | None = None) -> None:
        """Raises Refused ("history") naming the first commit that rewrites, drops or backdates something, or adds what
        is none of ours, or when the head is no descendant of the one in the checkpoint; ("clock") if time went back."""
        raise NotImplementedError

    def remember(self, now: datetime | None = None) -> None:
        """Write the checkpoint: the head now verified, and the newest time seen."""
        raise NotImplementedError
