"""Statements: what independent readers make of our bytes, and what we make of theirs."""

import base64
import hashlib
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from cryptography.hazmat.primitives import serialization

from facemllm.signing.canonical import LARGEST, Refused, canonical, parse, parse_canonical
from facemllm.signing.statements import PAYLOAD_TYPE, Draft, opened, sign, verify
from tests.refusing import refuses
from tests.signed import MODEL, OTHER, START, key, pem, policy, signer, timedelta, usual

DRAFT = Draft(
    "approve", OTHER, MODEL, "figures hold, card read: é, 漢", "approver", ("0" * 64,), START + timedelta(90), START
)


def test_what_is_signed_is_what_is_read() -> None:
    statement = verify(sign(DRAFT, signer("ada")), usual())
    assert (statement.decision, statement.bundle, statement.model, statement.reason) == (
        "approve",
        OTHER,
        MODEL,
        DRAFT.reason,
    )
    assert (statement.person, statement.role, statement.key) == ("Ada Lovelace", "approver", signer("ada").key_id)
    assert (statement.issued, statement.expires, statement.previous) == (START, START + timedelta(90), ("0" * 64,))


def test_securesystemslib_verifies_our_envelope() -> None:
    """Independent: the reference library of DSSE, with a key made of our PEM, and our id as its key id."""
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import SSlibKey

    envelope = sign(DRAFT, signer("ada"))
    theirs = Envelope.from_dict(json.loads(envelope))
    key = SSlibKey.from_crypto(signer("ada").private.public_key(), keyid=signer("ada").key_id)
    assert list(theirs.verify([key], threshold=1)) == [signer("ada").key_id]
    assert theirs.payload_type == PAYLOAD_TYPE
    theirs.payload = theirs.payload.replace(b"card read", b"card lost")
    with pytest.raises(Exception, match=r"erif|ignature"):
        theirs.verify([key], threshold=1)


def test_openssl_verifies_our_signature(tmp_path: Path) -> None:
    found = json.loads(sign(DRAFT, signer("ada")))
    payload = base64.b64decode(found["payload"])
    (tmp_path / "message").write_bytes(b"DSSEv1 28 application/vnd.in-toto+json %d %s" % (len(payload), payload))
    (tmp_path / "signature").write_bytes(base64.b64decode(found["signatures"][0]["sig"]))
    (tmp_path / "key.pem").write_text(pem(signer("ada").private))
    command = ["openssl", "dgst", "-sha256", "-verify", "key.pem", "-signature", "signature", "message"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout == "Verified OK\n"


def test_we_verify_an_envelope_of_securesystemslib() -> None:
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner, SSlibKey

    private = signer("ada").private
    theirs = CryptoSigner(private, SSlibKey.from_crypto(private.public_key(), keyid=signer("ada").key_id))
    payload = base64.b64decode(json.loads(sign(DRAFT, signer("ada")))["payload"])
    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    envelope.sign(theirs)
    statement = verify(json.dumps(envelope.to_dict()).encode(), usual())
    assert statement == verify(sign(DRAFT, signer("ada")), usual())


def test_the_payload_is_an_intoto_statement_in_canonical_form() -> None:
    payload = base64.b64decode(json.loads(sign(DRAFT, signer("ada")))["payload"])
    found = json.loads(payload)
    assert found["_type"] == "https://in-toto.io/Statement/v1"
    assert found["subject"] == [
        {"name": "bundle", "digest": {"sha256": OTHER}},
        {"name": "model", "digest": {"sha256": MODEL}},
    ]
    assert payload == rfc8785.dumps(found)
    assert opened(sign(DRAFT, signer("ada"))).id == hashlib.sha256(payload).hexdigest()


def test_a_keys_id_is_the_digest_of_its_public_half() -> None:
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert signer("ada").key_id == hashlib.sha256(signer("ada").private.public_key().public_bytes(*form)).hexdigest()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"b": 1, "a": [True, None]}, b'{"a":[true,null],"b":1}'),
        ({"\u20ac": "Euro", "\r": "CR", "1": "One", "\U0001f600": "Smiley", "\ufb33": "Hebrew"}, None),
        (1e21, b"1e+21"),
        (1.0, b"1"),
        ("\u000f\n\u20ac", '"\\u000f\\n€"'.encode()),
    ],
)
def test_canonical_form(value: object, text: bytes | None) -> None:
    """Examples of RFC 8785, 3.2.2 and 3.2.3: keys in order of UTF-16."""
    assert canonical(value) == (text or '{"\\r":"CR","1":"One","€":"Euro","😀":"Smiley","דּ":"Hebrew"}'.encode())


@pytest.mark.parametrize("value", [2**53 + 1, float("nan"), "\ud800", {1: 2}], ids=repr)
def test_no_canonical_form(value: object) -> None:
    refuses("no canonical JSON", canonical, value)


@pytest.mark.parametrize(
    ("data", "check"),
    [
        (b'{"a":1,"a":1}', "malformed"),
        (b'{"a":{"b":1,"b":2}}', "malformed"),
        (b"\xff", "malformed"),
        (b"\xef\xbb\xbf{}", "malformed"),
        (b"NaN", "malformed"),
        (b"[" * 17 + b"]" * 17, "malformed"),
        (b"[" * 30_000, "malformed"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "malformed"),
        (b"9" * 5000, "malformed"),
        (b"", "malformed"),
        (b"{} {}", "malformed"),
        (b" " * (LARGEST + 1), "too_large"),
    ],
)
def test_hostile_json(data: bytes, check: str) -> None:
    with pytest.raises(Refused) as refused:
        parse(data, "x")
    assert refused.value.check == check
    assert parse(b"[" * 16 + b"]" * 16, "x")


@pytest.mark.parametrize(
    "text", ['{"a": 1}', '{"b":1,"a":1}', "1.0", "1e2", '"\\u0061"', "-0", "10000000000000000000001"]
)
def test_other_forms_of_the_same_value(text: str) -> None:
    with pytest.raises(Refused, match="canonical"):
        parse_canonical(text.encode(), "x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reason": " "}, "a reason"),
        ({"reason": "a\nb"}, "one line"),
        ({"reason": "x" * 2001}, "2000 characters"),
        ({"expires": START}, "expires after issued"),
        ({"bundle": "abc"}, "the bundle's digest"),
        ({"decision": "reject"}, "no expires"),
        ({"previous": ("x",)}, "previous"),
        ({"replaces": OTHER}, "replaces"),
    ],
)
def test_what_nobody_can_sign(change: dict[str, object], words: str) -> None:
    refuses(words, sign, replace(DRAFT, **change), signer("ada"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dates", "check"),
    [
        ({"not_before": START + timedelta(1)}, "not_yet_valid"),
        ({"not_after": START - timedelta(1), "not_before": START - timedelta(9)}, "expired"),
        ({"revoked": START + timedelta(900)}, "revoked_key"),
    ],
)
def test_the_keys_dates_by_the_time_of_the_statement(dates: dict[str, Any], check: str) -> None:
    """Said by the envelope and the policy alone, wherever it is kept."""
    verify(sign(DRAFT, signer("ada")), policy(key("ada", "Ada", "approver")))
    with pytest.raises(Refused) as refused:
        verify(sign(DRAFT, signer("ada")), policy(key("ada", "Ada", "approver", **dates)))
    assert refused.value.check == check


def test_no_flipped_bit_verifies() -> None:
    """Not even a bit of base64 that decodes to the same bytes."""
    envelope = sign(DRAFT, signer("ada"))
    for at in range(0, len(envelope), 3):
        changed = bytearray(envelope)
        changed[at] ^= 1 << (at % 7)
        with pytest.raises(Refused):
            verify(bytes(changed), usual())
