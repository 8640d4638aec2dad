"""A small place of decisions for tests: persons with keys, a policy, a bundle about a model, statements about it."""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from facemllm.core.digests import of_bytes
from facemllm.signing.canonical import canonical
from facemllm.signing.decisions import Decisions
from facemllm.signing.keys import FileSigner, key_id
from facemllm.signing.policy import Key, Policy, Rule
from facemllm.signing.statements import Draft, Statement, sign, verify

START = datetime(2026, 1, 1, tzinfo=UTC)
MODEL, OTHER = of_bytes(b"model"), of_bytes(b"other model")
ONE = Rule({"approver": 1}, ("pipeline", "requester"), True, 90)
FOUR_EYES = Rule({"approver": 1}, ("requester",), False, 90)


@cache
def signer(name: str) -> FileSigner:
    """A key pair of this process, one a name."""
    private = ec.generate_private_key(ec.SECP256R1())
    return FileSigner(key_id(pem(private)), private)


def pem(private: ec.EllipticCurvePrivateKey) -> str:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return private.public_key().public_bytes(serialization.Encoding.PEM, form).decode()


def key(name: str, person: str, *roles: str, **more: Any) -> Key:
    """A policy's entry for the key pair `name`."""
    return Key(signer(name).key_id, person, roles, pem(signer(name).private), more.pop("not_before", START), **more)


def policy(*keys: Key, rule: Rule = ONE) -> Policy:
    return Policy({one.id: one for one in keys}, rule)


def usual(rule: Rule = ONE) -> Policy:
    """Ada and Bob may approve and ask, Ada has a second key; the pipeline may ask."""
    both = ("requester", "approver")
    people = [key("ada", "Ada Lovelace", *both), key("ada2", "ada  lovelace", *both), key("bob", "Bob Noyce", *both)]
    return policy(*people, key("pipeline", "pipeline", "pipeline", "releaser"), rule=rule)


def bundle_files(model: str = MODEL, evaluation: str = "evaluation", name: str = "face-mllm") -> dict[str, bytes]:
    card = f"# {name}".encode()
    about = {"name": name, "version": 1, "digest": model}
    whole = {
        "schema": 1,
        "model": about,
        "evaluation": {"digest": of_bytes(evaluation.encode())},
        "card": of_bytes(card),
    }
    return {"bundle.json": canonical(whole), "card.md": card}


class Place:
    """A decisions repository and all that a test does to it."""

    def __init__(self, folder: Path, known: Policy | None = None, address: str | None = None):
        self.folder, self.policy = folder, known or usual()
        self.path = folder / "decisions"
        self.where: str | Path = address or self.path
        self.bundle = self.open().append_bundle(bundle_files())

    def open(self, name: str = "checkpoint.json") -> Decisions:
        return Decisions(self.where, self.policy, self.folder / name, self.folder / "clones")

    def envelope(self, who: str, decision: str, **more: Any) -> bytes:
        """A signed statement about the bundle; the signer saw all that is there unless `previous` says otherwise."""
        roles = {"request": "requester", "release": "releaser", "rollback": "releaser"}
        given = {
            "bundle": self.bundle,
            "model": MODEL,
            "reason": "figures hold",
            "role": roles.get(decision, "approver"),
        }
        given |= {"previous": self.open().previous(more.get("model", MODEL))} | more
        return sign(Draft(decision=decision, **given), signer(who))  # type: ignore[arg-type]

    def add(self, who: str, decision: str, **more: Any) -> Statement:
        return self.open().append(self.envelope(who, decision, **more))

    def anew(self) -> None:
        """Go on with a repository that holds the bundle alone."""
        self.where = self.path = self.folder / "anew"
        (self.folder / "checkpoint.json").unlink(missing_ok=True)
        self.open().append_bundle(bundle_files())

    def put(self, files: Mapping[str, bytes], **more: Any) -> None:
        """What somebody with write access to the repository, but no key, can do: add files in a commit of their own."""
        forge(self.path, files, **more)

    def put_statement(self, envelope: bytes, model: str = MODEL, name: str | None = None) -> None:
        """Add a statement's file, whatever it holds."""
        self.put({f"statements/{model}/{name or of_bytes(envelope)}.json": envelope})

    def file_of(self, statement: str) -> str:
        """Path of the file that holds a statement."""
        return next(one.path for one in self.open().statements() if one.id == statement)


def id_of(envelope: bytes) -> str:
    from facemllm.signing.statements import opened

    return opened(envelope).id


def git(repository: Path, *arguments: str, data: bytes | None = None, whole: bool = False, **environment: str) -> str:
    """Plain git, as a user has it. Space around what it says is left out unless the `whole` is asked for."""
    who = {"GIT_AUTHOR_NAME": "x", "GIT_AUTHOR_EMAIL": "x@x", "GIT_COMMITTER_NAME": "x", "GIT_COMMITTER_EMAIL": "x@x"}
    done = subprocess.run(
        ["git", "-C", str(repository), *arguments],
        env={**os.environ, **who, **environment},
        input=data or b"",
        capture_output=True,
        check=True,
    )
    said = done.stdout.decode("utf-8", "surrogateescape")
    return said if whole else said.strip()


def forge(
    repository: Path,
    files: Mapping[str | bytes, bytes] | Mapping[str, bytes],
    remove: tuple[str, ...] = (),
    at: datetime | None = None,
    mode: str = "100644",
    parents: tuple[str, ...] = (),
) -> str:
    """A commit on the branch with git's own commands: files added or replaced and removed. Returns it."""
    index = str(repository / "forged-index")
    names = git(repository, "for-each-ref", "--format=%(refname)", "refs/heads/decisions")
    if names:
        git(repository, "read-tree", "decisions", GIT_INDEX_FILE=index)
    lines = [f"0 {'0' * 40}\t{name}".encode() for name in remove]
    for name, content in files.items():
        one = git(repository, "hash-object", "-w", "--stdin", data=content) if mode != "160000" else "1" * 40
        lines.append(f"{mode} {one}\t".encode() + (name if isinstance(name, bytes) else name.encode()))
    data = b"".join(line + b"\0" for line in lines)
    git(repository, "update-index", "-z", "--index-info", data=data, GIT_INDEX_FILE=index)
    tree = git(repository, "write-tree", GIT_INDEX_FILE=index)
    Path(index).unlink()
    before = [git(repository, "rev-parse", "decisions")] if names else []
    when = at or datetime.now(UTC)
    date = f"@{int(when.timestamp())} +0000"
    chain = [part for one in [*before, *parents] for part in ("-p", one)]
    made = git(repository, "commit-tree", tree, *chain, "-m", "forged", GIT_COMMITTER_DATE=date, GIT_AUTHOR_DATE=date)
    git(repository, "update-ref", "refs/heads/decisions", made)
    return made


__all__ = ["FOUR_EYES", "MODEL", "ONE", "OTHER", "START", "Place", "bundle_files", "forge", "git", "id_of"]
__all__ += ["key", "policy", "replace", "sign", "signer", "timedelta", "usual", "verify"]
