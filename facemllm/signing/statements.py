"""A decision as a signed statement: an in-toto Statement in canonical JSON, in a DSSE envelope with one signature.

Only bytes whose signature held are read. A statement's id is the SHA-256 of its payload.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any, Literal, get_args

from facemllm.core.digests import of_bytes
from facemllm.errors import UserError
from facemllm.signing.canonical import (
    HEX,
    LARGEST,
    Refused,
    canonical,
    parse,
    parse_canonical,
    parse_time,
    time_text,
    utc_now,
)
from facemllm.signing.keys import Signer, holds
from facemllm.signing.policy import Key, Policy

__all__ = ["Decision", "Draft", "Envelope", "Refused", "Statement", "opened", "sign", "verify"]

Decision = Literal["request", "approve", "reject", "revoke", "release", "rollback"]
DECISIONS: tuple[Decision, ...] = get_args(Decision)
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://face-mllm.dev/decision/v1"
LONGEST_REASON = 2000
"""Characters of a reason."""
SKEW = timedelta(minutes=5)
"""How far the clocks of two machines may differ."""
_WRITTEN = re.compile(
    rb'\{"payload":"([A-Za-z0-9+/=]*)","payloadType":"%s","signatures":'
    rb'\[\{"keyid":"([0-9a-f]{64})","sig":"([A-Za-z0-9+/=]*)"\}\]\}' % re.escape(PAYLOAD_TYPE.encode())
)
_PREDICATE = {"decision", "reason", "role", "issued", "expires", "previous", "replaces"}


@dataclass(frozen=True)
class Draft:
    """A decision that is to be signed. `previous` are the ids of the statements about this model that the signer saw.

    `expires` of an approval or a request; `issued` is now where None. `replaces` is the digest of the model that a
    release or rollback takes out of production.
    """

    decision: Decision
    bundle: str
    model: str
    reason: str
    role: str
    previous: tuple[str, ...] = ()
    expires: datetime | None = None
    issued: datetime | None = None
    replaces: str | None = None


@dataclass(frozen=True)
class Statement:
    """A decision whose signature, key and form were verified. `person` is the key's, from the policy; times are UTC."""

    id: str
    decision: Decision
    bundle: str
    model: str
    reason: str
    key: str
    person: str
    role: str
    issued: datetime
    expires: datetime | None
    previous: tuple[str, ...]
    replaces: str | None

    @property
    def words(self) -> str:
        """What it is, in a few words, for messages."""
        return f"{self.decision} by {self.person} of {time_text(self.issued)}"


def sign(draft: Draft, signer: Signer) -> bytes:
    """The envelope of a decision, signed. Raises UserError where the decision is malformed, as without a reason."""
    payload = canonical(_payload(draft))
    try:
        _read(payload, "this decision")
    except Refused as error:
        raise UserError(str(error)) from None
    signature = signer.sign(_pae(payload))
    signed = {"keyid": signer.key_id, "sig": base64.b64encode(signature).decode()}
    text = base64.b64encode(payload).decode()
    return canonical({"payload": text, "payloadType": PAYLOAD_TYPE, "signatures": [signed]})


@dataclass(frozen=True)
class Envelope:
    """A DSSE envelope, nothing of it verified but its form. `id` is that of the statement in it, whoever signed it."""

    payload: bytes
    key: str
    signature: bytes

    @cached_property
    def id(self) -> str:
        """SHA-256 of the payload."""
        return of_bytes(self.payload)


def verify(envelope: bytes | Envelope, policy: Policy) -> Statement:
    """The statement in an envelope, if the policy lets its key say so. Says nothing of whether it is still in force.

    Raises Refused with the one check that failed: too_large, malformed, unknown_key, revoked_key, signature, role,
    not_yet_valid or expired (of the key, when the statement was issued).
    """
    given = envelope if isinstance(envelope, Envelope) else opened(envelope)
    payload, signature, key = given.payload, given.signature, policy.keys.get(given.key)
    if key is None:
        raise Refused("unknown_key", f"statement signed by key {given.key[:12]}, which the policy does not list")
    who = f"key {key.id[:12]} of {key.person}"
    if key.revoked is not None:
        raise Refused(
            "revoked_key", f"{who} was revoked on {time_text(key.revoked)[:10]}; what it signed counts for nothing"
        )
    if not holds(key.public, signature, _pae(payload)):
        raise Refused("signature", f"the signature is not that of {who} on these bytes")
    statement = _statement(payload, key)
    what = f"{statement.decision} by {who}"
    allowed = policy.roles_for(statement.decision)
    if statement.role not in key.roles:
        raise Refused("role", f"{what}: the key has no role '{statement.role}', only {', '.join(key.roles)}")
    if statement.role not in allowed:
        raise Refused(
            "role", f"{what}: a {statement.decision} is signed as {' or '.join(allowed)}, not as {statement.role}"
        )
    if statement.issued < key.not_before:
        raise Refused("not_yet_valid", f"{what}: the key is valid from {time_text(key.not_before)} only")
    if key.not_after is not None and statement.issued > key.not_after:
        raise Refused("expired", f"{what}: the key was valid until {time_text(key.not_after)} only")
    return statement


def _pae(payload: bytes) -> bytes:
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def _payload(draft: Draft) -> dict[str, Any]:
    return {
        "_type": STATEMENT_TYPE,
        "subject": [
            {"name": "bundle", "digest": {"sha256": draft.bundle}},
            {"name": "model", "digest": {"sha256": draft.model}},
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "decision": draft.decision,
            "reason": draft.reason,
            "role": draft.role,
            "issued": time_text(draft.issued or utc_now()),
            "expires": draft.expires and time_text(draft.expires),
            "previous": sorted(set(draft.previous)),
            "replaces": draft.replaces,
        },
    }


def opened(envelope: bytes) -> Envelope:
    """The parts of an envelope. Raises Refused ("too_large", "malformed")."""
    if len(envelope) <= LARGEST and (written := _WRITTEN.fullmatch(envelope)):  # as `sign` writes it: nothing to parse
        payload, key, signature = (part.decode() for part in written.groups())
        return Envelope(_decoded(payload), key, _decoded(signature))
    found = parse(envelope, "statement")
    _shape(isinstance(found, dict) and set(found) == {"payload", "payloadType", "signatures"}, "a DSSE envelope")
    _shape(found["payloadType"] == PAYLOAD_TYPE, f"payloadType {PAYLOAD_TYPE}")
    signatures = found["signatures"]
    _shape(isinstance(signatures, list) and len(signatures) == 1, "exactly one signature")
    one = signatures[0]
    _shape(isinstance(one, dict) and set(one) == {"keyid", "sig"}, "a signature of keyid and sig")
    _shape(isinstance(one["keyid"], str) and HEX.fullmatch(one["keyid"]), "a key id of 64 hexadecimal digits")
    return Envelope(_decoded(found["payload"]), one["keyid"], _decoded(one["sig"]))


def _statement(payload: bytes, key: Key) -> Statement:
    found = _read(payload, "statement")
    said = found["predicate"]
    bundle, model = (one["digest"]["sha256"] for one in found["subject"])
    return Statement(
        id=of_bytes(payload),
        decision=said["decision"],
        bundle=bundle,
        model=model,
        reason=said["reason"],
        key=key.id,
        person=key.person,
        role=said["role"],
        issued=parse_time(said["issued"]),
        expires=said["expires"] and parse_time(said["expires"]),
        previous=tuple(said["previous"]),
        replaces=said["replaces"],
    )


def _read(payload: bytes, what: str) -> dict[str, Any]:
    """The payload as JSON, every part of it as it must be."""
    found = parse_canonical(payload, what)
    _shape(
        isinstance(found, dict) and set(found) == {"_type", "subject", "predicateType", "predicate"},
        "a Statement",
        what,
    )
    _shape(found["_type"] == STATEMENT_TYPE, f"_type {STATEMENT_TYPE}", what)
    _shape(found["predicateType"] == PREDICATE_TYPE, f"predicateType {PREDICATE_TYPE}", what)
    subject, said = found["subject"], found["predicate"]
    _shape(isinstance(subject, list) and len(subject) == 2, "the subjects bundle and model", what)
    for one, name in zip(subject, ("bundle", "model"), strict=True):
        _shape(
            isinstance(one, dict) and set(one) == {"name", "digest"} and one["name"] == name,
            f"the subject {name}",
            what,
        )
        digest = one["digest"]
        _shape(
            isinstance(digest, dict) and set(digest) == {"sha256"} and _digest(digest["sha256"]),
            f"the {name}'s digest",
            what,
        )
    _shape(isinstance(said, dict) and set(said) == _PREDICATE, f"a predicate of {', '.join(sorted(_PREDICATE))}", what)
    decision, reason = said["decision"], said["reason"]
    _shape(decision in DECISIONS, f"a decision of {', '.join(DECISIONS)}", what)
    _shape(isinstance(reason, str) and reason.isprintable(), "a reason of one line, without control characters", what)
    _shape(len(reason) <= LONGEST_REASON, f"a reason of at most {LONGEST_REASON} characters", what)
    judged = decision in ("approve", "reject", "revoke")
    _shape(reason.strip() or not judged, 'a reason (--reason "...")', what)
    _shape(isinstance(said["role"], str) and said["role"], "a role", what)
    issued, expires = _time(said["issued"], "issued", what), said["expires"]
    _shape(expires is None or decision in ("approve", "request"), "no expires but on an approval or request", what)
    _shape(expires is None or _time(expires, "expires", what) > issued, "expires after issued", what)
    previous, replaces = said["previous"], said["replaces"]
    _shape(isinstance(previous, list) and all(map(_digest, previous)), "previous as a list of statement ids", what)
    _shape(previous == sorted(set(previous)), "previous sorted, each id once", what)
    released = decision in ("release", "rollback")
    _shape(replaces is None or (released and _digest(replaces)), "replaces as a digest, on a release or rollback", what)
    return found


def _shape(right: Any, expected: str, what: str = "statement") -> None:
    if not right:
        raise Refused("malformed", f"{what}: expected {expected}")


def _time(value: Any, name: str, what: str) -> datetime:
    try:
        return parse_time(value)
    except ValueError:
        raise Refused("malformed", f"{what}: expected {name} as a time such as 2026-11-29T08:00:00Z") from None


def _digest(value: Any) -> bool:
    return isinstance(value, str) and HEX.fullmatch(value) is not None


def _decoded(text: Any) -> bytes:
    """Base64 in its one form: no other text gives the same bytes."""
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else None
    except (binascii.Error, ValueError):
        data = None
    if data is None or base64.b64encode(data).decode() != text:
        raise Refused("malformed", "statement: expected payload and sig in base64")
    return data
