"""The policy file: which keys are whose, what their roles are, and how many of which roles must sign.

It is the only authority: a key that it does not list is nobody's. YAML:

    version: 1
    keys:
      <key id>: {person: Ada Lovelace, roles: [approver, requester], not_before: 2026-11-29T00:00:00Z, not_after: null,
                 revoked: null, public_key: "-----BEGIN PUBLIC KEY-----..."}
    rule: {approvals: {approver: 1}, request_by: [pipeline, requester], requester_may_approve: true, valid_days: 90}
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from cryptography.hazmat.primitives.asymmetric import ec

from facemllm.core.files import atomic_write, locked
from facemllm.errors import UserError
from facemllm.settings.mappings import read_yaml
from facemllm.signing import keys as key_pairs
from facemllm.signing.canonical import HEX, time_text

PIPELINE = "pipeline"
RELEASER = "releaser"
REQUESTER = "requester"
APPROVER = "approver"
MACHINES = (PIPELINE, RELEASER)
"""Roles that no approval can be asked of."""
_ROLE = re.compile(r"[a-z][a-z0-9_-]{0,39}")
_LARGEST = 4 << 20  # bytes of a policy file


@dataclass(frozen=True)
class Key:
    """A person's public key and what it may sign. Times are UTC; `revoked` is when it was, `why` the reason given."""

    id: str
    person: str
    roles: tuple[str, ...]
    public_key: str = field(repr=False)
    not_before: datetime
    not_after: datetime | None = None
    revoked: datetime | None = None
    why: str = ""

    @cached_property
    def public(self) -> ec.EllipticCurvePublicKey:
        """The public key itself."""
        return key_pairs.public(self.public_key)

    def state(self, time: datetime) -> str:
        """`valid`, `revoked` (at any time), or by its dates `not yet valid` or `expired`."""
        if self.revoked is not None:
            return "revoked"
        if time < self.not_before:
            return "not yet valid"
        return "expired" if self.not_after is not None and time > self.not_after else "valid"

    def valid_at(self, time: datetime) -> bool:
        """Whether it may sign at a time."""
        return self.state(time) == "valid"


@dataclass(frozen=True)
class Rule:
    """How many distinct persons must sign in each role, who may ask, and for how many days an approval holds."""

    approvals: Mapping[str, int]
    request_by: tuple[str, ...]
    requester_may_approve: bool
    valid_days: int


@dataclass(frozen=True)
class Policy:
    """The keys by id, and the rule."""

    keys: Mapping[str, Key]
    rule: Rule

    def roles_for(self, decision: str) -> tuple[str, ...]:
        """The roles in which a decision may be signed."""
        if decision == "request":
            return self.rule.request_by
        return (RELEASER,) if decision in ("release", "rollback") else tuple(self.rule.approvals)

    def persons(self, role: str, now: datetime) -> list[str]:
        """Who may sign in a role now, by name."""
        able = [key.person for key in self.keys.values() if role in key.roles and key.valid_at(now)]
        return sorted({same_person(name): name for name in reversed(able)}.values())


def same_person(name: str) -> str:
    """What is equal for two spellings of one person's name: case, spaces and Unicode forms aside."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def read_policy(path: Path) -> Policy:
    """The policy in a file. Raises UserError naming file and key where something is missing, unknown or impossible."""
    try:
        if path.stat().st_size > _LARGEST:
            raise UserError(f"{path}: larger than {_LARGEST} bytes; a policy lists keys and one rule")
        data = read_yaml(path)
    except FileNotFoundError:
        raise UserError(
            f"no policy at {path} (promote.policy); `facemllm keys new NAME --role approver` makes one"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; promote.policy names the policy file") from None
    return parse_policy(data, str(path))


def parse_policy(data: Any, where: str) -> Policy:
    """A policy from what its YAML holds; `where` names it. Raises UserError."""
    found = _mapping(data, where, {"version", "keys", "rule"})
    if found["version"] != 1:
        raise UserError(f"{where}: version: {found['version']!r}; this program reads version 1")
    entries = found["keys"] if found["keys"] is not None else {}
    if not isinstance(entries, Mapping):
        raise UserError(f"{where}: keys: expected a mapping of key ids")
    keys = {str(name): _key(str(name), value, f"{where}: keys.{str(name)[:12]}") for name, value in entries.items()}
    return Policy(keys, _rule(found["rule"], f"{where}: rule"))


def write_policy(path: Path, policy: Policy) -> None:
    """Write a policy file whole; comments that stood in it are lost. Raises UserError."""
    rule = policy.rule
    entries = {key.id: _entry(key) for key in policy.keys.values()}
    spoken = {
        **{"approvals": dict(rule.approvals), "request_by": list(rule.request_by)},
        **{"requester_may_approve": rule.requester_may_approve, "valid_days": rule.valid_days},
    }
    whole = {"version": 1, "keys": entries, "rule": spoken}
    parse_policy(whole, str(path))
    atomic_write(path, _yaml(whole).encode())


def entry_text(key: Key) -> str:
    """A key's entry of a policy file, in YAML, for whoever keeps that file."""
    return _yaml({key.id: _entry(key)})


def check_key(person: str, roles: Iterable[str]) -> None:
    """Raises UserError where a policy could not list a key of this person with these roles."""
    _person(person, "the person's name")
    _roles(list(roles), "--role")


def add_key(path: Path, key: Key, rule: Rule) -> Policy:
    """Add a key to the policy file, which is made with `rule` if absent. Raises UserError if the key is listed."""
    with locked(path.with_name(f".{path.name}.lock")):
        policy = read_policy(path) if path.exists() else Policy({}, rule)
        if key.id in policy.keys:
            raise UserError(f"{path}: key {key.id[:12]} is listed already")
        changed = replace(policy, keys={**policy.keys, key.id: key})
        write_policy(path, changed)
    return changed


def revoke_key(path: Path, key: str, why: str, now: datetime) -> Key:
    """Mark a key (its id, or the first eight or more digits) as revoked. Raises UserError if unknown or revoked."""
    with locked(path.with_name(f".{path.name}.lock")):
        policy = read_policy(path)
        found = find_key(policy, key, str(path))
        if found.revoked is not None:
            raise UserError(f"{path}: key {found.id[:12]} was revoked on {time_text(found.revoked)[:10]} already")
        revoked = replace(found, revoked=now, why=why)
        write_policy(path, replace(policy, keys={**policy.keys, found.id: revoked}))
    return revoked


def find_key(policy: Policy, key: str, where: str = "the policy") -> Key:
    """A key by its id or the first eight or more digits of it. Raises UserError if none or several fit."""
    fits = [one for one in policy.keys.values() if len(key) >= 8 and one.id.startswith(key)]
    if len(fits) != 1:
        how = "several keys begin so" if fits else "no such key; `facemllm keys list` shows them (8 digits or more)"
        raise UserError(f"{where}: key {key}: {how}")
    return fits[0]


def _entry(key: Key) -> dict[str, Any]:
    times = {"not_before": time_text(key.not_before), "not_after": key.not_after and time_text(key.not_after)}
    times |= {"revoked": key.revoked and time_text(key.revoked)} | ({"why": key.why} if key.why else {})
    return {"person": key.person, "roles": list(key.roles), **times, "public_key": key.public_key}


def _yaml(value: Any) -> str:
    return str(yaml.dump(value, Dumper=_Blocks, sort_keys=False, allow_unicode=True, width=120))


class _Blocks(yaml.SafeDumper):
    """Writes text of several lines as a block, as a person would."""


_Blocks.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def _mapping(data: Any, where: str, names: Iterable[str], more: Iterable[str] = ()) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: expected a mapping of {', '.join(sorted(names))}")
    if missing := sorted(set(names) - set(data)):
        raise UserError(f"{where}: {', '.join(missing)}: required and missing")
    if unknown := sorted(map(str, set(data) - set(names) - set(more))):
        raise UserError(f"{where}: {', '.join(unknown)}: unknown key")
    return data


def _key(name: str, data: Any, where: str) -> Key:
    known = {"person", "roles", "not_before", "not_after", "revoked", "public_key"}
    found = _mapping(data, where, known, {"why"})
    person, why = _person(found["person"], f"{where}: person"), found.get("why") or ""
    if not HEX.fullmatch(name):
        raise UserError(f"{where}: a key id is 64 hexadecimal digits")
    if not isinstance(why, str):
        raise UserError(f"{where}: why: expected text")
    roles = _roles(found["roles"], f"{where}: roles")
    times = {at: _time(found[at], f"{where}: {at}") for at in ("not_before", "not_after", "revoked")}
    if times["not_before"] is None:
        raise UserError(f"{where}: not_before: expected a time such as 2026-11-29T00:00:00Z")
    try:
        held = key_pairs.key_id(str(found["public_key"]))
    except UserError as error:
        raise UserError(f"{where}: public_key: {error}") from None
    if held != name:
        raise UserError(f"{where}: public_key: its id is {held}; an entry is named after its key")
    start = times["not_before"]
    return Key(name, person, roles, found["public_key"], start, times["not_after"], times["revoked"], why)


def _rule(data: Any, where: str) -> Rule:
    found = _mapping(data, where, {"approvals", "request_by", "requester_may_approve", "valid_days"})
    approvals, days = found["approvals"], found["valid_days"]
    if not isinstance(approvals, Mapping) or not approvals:
        raise UserError(f"{where}: approvals: expected roles with numbers, as in {{approver: 1}}")
    for role, number in approvals.items():
        if not isinstance(role, str) or not _ROLE.fullmatch(role) or role in MACHINES:
            raise UserError(f"{where}: approvals: {role}: no role of persons")
        if type(number) is not int or not 1 <= number <= 100:
            raise UserError(f"{where}: approvals.{role}: expected a whole number from 1 to 100, found {number!r}")
    if type(found["requester_may_approve"]) is not bool:
        raise UserError(f"{where}: requester_may_approve: expected true or false")
    if type(days) is not int or not 1 <= days <= 3650:
        raise UserError(f"{where}: valid_days: expected a whole number from 1 to 3650, found {days!r}")
    asking = _roles(found["request_by"], f"{where}: request_by")
    return Rule(dict(approvals), asking, found["requester_may_approve"], days)


def _person(name: Any, where: str) -> str:
    if not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name) > 200:
        raise UserError(f"{where}: expected a name of one line, of at most 200 characters")
    return name


def _roles(data: Any, where: str) -> tuple[str, ...]:
    right = isinstance(data, list) and data and all(isinstance(one, str) and _ROLE.fullmatch(one) for one in data)
    if not right:
        raise UserError(f"{where}: expected a list of roles in small letters, as in [approver, requester]")
    return tuple(dict.fromkeys(data))


def _time(value: Any, where: str) -> datetime | None:
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            value = None
    elif isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day, tzinfo=UTC)
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise UserError(f"{where}: expected a time with its zone, such as 2026-11-29T00:00:00Z")
    return value.astimezone(UTC)
