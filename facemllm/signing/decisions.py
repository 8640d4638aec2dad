"""The decisions repository: a git repository to which bundles, statements and model signatures are only ever added.

    bundles/<bundle digest>/bundle.json, card.md, ...    statements/<model digest>/<envelope digest>.json
    signatures/<model digest>.json

Nothing in it is trusted: files are read from git's objects, never from a work tree; statements count by their
signatures, bundles by their digests; the history must have added only, and lead on from the one in the checkpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from facemllm.core.digests import of_bytes
from facemllm.errors import UserError
from facemllm.settings import Settings
from facemllm.signing import local
from facemllm.signing.canonical import (
    HEX,
    LARGEST,
    Refused,
    parse,
    parse_canonical,
    time_text,
    utc_now,
)
from facemllm.signing.history import LAYOUT, Change, History
from facemllm.signing.policy import Policy
from facemllm.signing.repository import Repository
from facemllm.signing.statements import SKEW, Statement, opened, verify

__all__ = ["Change", "Decisions", "Entry"]

_AGAINST = ("reject", "revoke")
LARGEST_FILE = 32 << 20
"""Bytes of a file of a bundle."""


@dataclass(frozen=True)
class Entry:
    """A statement's file: the statement, or why it counts for nothing; the commit that added it, and when (UTC).

    `id` is the statement's, whoever signed it; empty where the file holds none, or not what it is named after.
    """

    statement: Statement | None
    refused: Refused | None
    commit: str
    committed_at: datetime
    path: str
    id: str = ""

    @property
    def name(self) -> str:
        """The statement's id, or where there is none the name of the file."""
        return self.id or Path(self.path).stem

    @property
    def model(self) -> str:
        """Digest of the model whose folder it lies in."""
        return self.path.split("/")[1]


class Decisions:
    """The decisions repository at a path or address, as it was when opened or last refreshed."""

    def __init__(self, path: str | Path, policy: Policy, checkpoint: Path | None = None, clones: Path | None = None):
        """`clones` is the folder for copies of repositories at addresses; one at a path is made by the first to append.

        Raises UserError if there is something else, or an address has never been reached; Refused as `refresh`.
        """
        self.policy = policy
        self._repository = Repository(path, checkpoint, clones)
        self._lock = threading.RLock()
        self._verified: tuple[Policy, dict[str, Entry]] = (policy, {})
        self._bundles: dict[str, dict[str, Any]] = {}
        self.refresh()

    @classmethod
    def open(cls, settings: Settings, policy: Policy | None = None) -> Decisions:
        """The repository that the settings name, with their policy and the checkpoint under home."""
        known = policy if policy is not None else local.policy(settings)
        return cls(settings.decisions, known, settings.checkpoint, settings.signing / "clones")

    @property
    def place(self) -> str:
        """Where the repository is, for messages."""
        return self._repository.place

    @property
    def stale(self) -> str | None:
        """One line where the address was out of reach, so that what is read is the copy of last time."""
        return self._repository.stale

    @property
    def head(self) -> str | None:
        """The newest commit that was read."""
        return self._history.head

    @property
    def _history(self) -> History:
        return self._repository.history

    def refresh(self) -> str | None:
        """Read what others appended meanwhile. Returns `stale`. Raises Refused ("history") as `verify_history` does."""
        self._repository.refresh()
        return self.stale

    def append_bundle(self, files: Mapping[str, bytes]) -> str:
        """Add a bundle's files, `bundle.json` among them; nothing happens if it is there. Returns the digest."""
        whole = files.get("bundle.json", b"")
        parse_canonical(whole, "bundle.json", LARGEST_FILE)
        digest = of_bytes(whole)
        named = {f"bundles/{digest}/{name}": data for name, data in files.items()}
        listed = _digests(parse(whole, "bundle.json", LARGEST_FILE))
        for path, data in named.items():
            name = path.split("/", 2)[2]
            if not LAYOUT.fullmatch(path):
                raise UserError(f"bundle: {name!r} is no file name for a bundle; use letters, digits, '.', '_' and '-'")
            if len(data) > LARGEST_FILE:
                raise UserError(f"bundle: {name} has {len(data)} bytes; at most {LARGEST_FILE} are kept")
            if name != "bundle.json" and of_bytes(data) not in listed:
                raise UserError(f"bundle: bundle.json does not give the digest of {name}")
        self._repository.add(named, f"bundle {digest[:12]}", "facemllm", f"bundles/{digest}/bundle.json")
        return digest

    def append(self, envelope: bytes) -> Statement:
        """Verify a statement and add it; nothing happens if it is there.

        Raises Refused if it does not verify, or its bundle is absent or another model's; UserError if it is not kept.
        """
        statement = verify(envelope, self.policy)
        _in_time(statement, self.policy, utc_now())
        self.refresh()
        about = model_of(self.bundle(statement.bundle), statement.bundle)
        if about != statement.model:
            raise Refused(
                "other_model", f"bundle {statement.bundle[:12]} is about model {about[:12]}, not {statement.model[:12]}"
            )
        known = {entry.id for entry in self.statements(statement.model)}
        if unknown := [name for name in statement.previous if name not in known]:
            raise Refused("history", f"{statement.words} builds on statement {unknown[0]}, which {self.place} lacks")
        path = f"statements/{statement.model}/{of_bytes(envelope)}.json"
        message = f"{statement.decision} {statement.model[:12]} by {statement.person}\n\n{statement.reason}"
        who = f"{statement.person} ({statement.key[:12]})"
        # a commit of somebody else's with a date to come must not keep a model from being taken back
        self._repository.add(
            {path: envelope}, message, who, path, exact=True, at_any_time=statement.decision in _AGAINST
        )
        return statement

    def append_signature(self, model: str, signature: bytes) -> None:
        """Add the signature of a model's directory (OpenSSF model-signing); nothing happens if the model has one."""
        path = f"signatures/{model}.json"
        if not HEX.fullmatch(model) or len(signature) > LARGEST_FILE:
            raise UserError(f"signature of {model[:80]!r}: expected a model's digest and at most {LARGEST_FILE} bytes")
        self._repository.add({path: signature}, f"signature {model[:12]}", "facemllm", path)

    def signature(self, model: str) -> bytes | None:
        """The signature of a model's directory, if there is one; it is to be verified by whoever reads it."""
        path = f"signatures/{model}.json"
        return self._repository.read(path, LARGEST_FILE) if path in self._history.files else None

    def bundle(self, digest: str) -> dict[str, Any]:
        """A bundle's `bundle.json`, whose bytes have this digest. Raises Refused ("missing", "digest", "malformed")."""
        if digest not in self._bundles:
            found = parse_canonical(self.bundle_file(digest, "bundle.json"), f"bundle {digest[:12]}", LARGEST_FILE)
            if not isinstance(found, dict):
                raise Refused("malformed", f"bundle {digest[:12]}: expected a JSON object")
            self._bundles[digest] = found
        return self._bundles[digest]

    def bundle_file(self, digest: str, name: str) -> bytes:
        """A file of a bundle: `bundle.json`, or one whose digest that gives. Raises Refused ("missing", "digest")."""
        path = f"bundles/{digest}/{name}"
        if path not in self._history.files:
            raise Refused(
                "missing", f"no {name} of bundle {digest[:12]} in {self.place}; `facemllm promote request` adds it"
            )
        data = self._repository.read(path, LARGEST_FILE)
        expected = {digest} if name == "bundle.json" else _digests(self.bundle(digest))
        if of_bytes(data) not in expected:
            raise Refused("digest", f"{path} is not the file that was signed: its bytes have another digest")
        return data

    def bundles(self) -> list[str]:
        """The digests of all bundles, in the order in which they were added."""
        return [name.split("/")[1] for name in self._history.folders if name.startswith("bundles/")]

    def statements(self, model: str | None = None, policy: Policy | None = None) -> list[Entry]:
        """Every statement, or those about one model, in the order they were added; by `policy`, else its own."""
        policy = policy if policy is not None else self.policy
        with self._lock:
            if policy != self._verified[0]:
                self._verified = (policy, {})
            entries = self._verified[1]
            folders = self._history.folders
            names = [f"statements/{model}"] if model is not None else folders
            paths = [path for name in names if name.startswith("statements/") for path in folders.get(name, ())]
            for path, data in self._repository.read_all([one for one in paths if one not in entries], LARGEST):
                entries[path] = self._entry(path, data, policy)
            return [entries[path] for path in (paths if model is not None else self._history.in_order(paths))]

    def previous(self, model: str) -> tuple[str, ...]:
        """The ids of the statements about a model that count: what whoever signs next has seen."""
        return tuple(sorted(one.id for one in self.statements(model) if one.statement is not None))

    def history(self) -> list[Change]:
        """Every commit, oldest first."""
        return list(self._history.changes)

    def verify_history(self, now: datetime | None = None) -> None:
        """Read the repository anew and verify all of it, from the first commit on.

        Raises Refused ("history") naming the first commit that rewrites, drops or backdates something, or adds what is
        none of ours, or when the head does not lead on from the one in the checkpoint; ("clock") if time went back.
        """
        self._repository.verify(now or utc_now())

    def check(self, now: datetime | None = None) -> None:
        """Compare what was read with the checkpoint and the clock. Raises Refused ("history", "clock")."""
        self._repository.check(now or utc_now())

    def remember(self, now: datetime | None = None) -> None:
        """Write the checkpoint: the head that was verified, and the newest time seen."""
        self._repository.remember(now or utc_now())

    def _entry(self, path: str, data: bytes | None, policy: Policy) -> Entry:
        """What a statement's file holds. Of what a key signed that the policy does not list nothing is parsed."""
        change, known = self._history.added[path], ""
        _, model, name = path.split("/")
        statement = refused = None
        try:
            if data is None:
                raise Refused("too_large", f"{path}: larger than {LARGEST} bytes")
            if of_bytes(data) != name.removesuffix(".json"):
                raise Refused("malformed", f"{path}: does not hold the statement that it is named after")
            envelope = opened(data)
            known = envelope.id
            read = verify(envelope, policy)
            if read.model != model:
                raise Refused("other_model", f"{read.words} is about model {read.model[:12]}, not {model[:12]}")
            _in_time(read, policy, change.committed_at)
            statement = read
        except Refused as error:
            refused = error
        return Entry(statement, refused, change.commit, change.committed_at, path, known)


def model_of(bundle: Mapping[str, Any], digest: str) -> str:
    """The digest of the model that a bundle is about. Raises Refused ("malformed") where it does not say."""
    model = bundle.get("model")
    found = model.get("digest") if isinstance(model, dict) else None
    if not isinstance(found, str) or not HEX.fullmatch(found):
        raise Refused("malformed", f"bundle {digest[:12]} gives no digest of its model (model.digest)")
    return found


def _in_time(statement: Statement, policy: Policy, kept_at: datetime) -> None:
    """Raises Refused if a statement was kept before it was issued, or after its key's time was over."""
    key = policy.keys[statement.key]
    if statement.issued > kept_at + SKEW:
        raise Refused("not_yet_valid", f"{statement.words} is of a time after it was recorded, {time_text(kept_at)}")
    if key.not_after is not None and kept_at > key.not_after + SKEW and statement.decision not in _AGAINST:
        raise Refused(
            "expired", f"{statement.words} was recorded after its key's time was over, {time_text(key.not_after)}"
        )


def _digests(value: Any) -> set[str]:
    """Every digest that JSON names, wherever it stands."""
    if isinstance(value, dict):
        return set().union(*map(_digests, value.values()))
    if isinstance(value, list):
        return set().union(*map(_digests, value))
    return {value} if isinstance(value, str) and HEX.fullmatch(value) else set()
