"""Private keys on disk, passphrases, and the policy file that lists keys."""

import os
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from facemllm.signing import keys
from facemllm.signing.canonical import utc_now
from facemllm.signing.policy import Key, add_key, entry_text, find_key, read_policy, revoke_key, write_policy
from tests.refusing import refuses
from tests.signed import FOUR_EYES, ONE, START, key, policy, signer, timedelta, usual


def given(words: bytes) -> keys.Passphrase:
    """As with `--passphrase-fd`."""
    out, into = os.pipe()
    os.write(into, words)
    os.close(into)
    return keys.passphrase_from(out)


def test_a_key_is_kept_private_and_signs(tmp_path: Path) -> None:
    name, public = keys.new_key(tmp_path / "keys", None)
    assert keys.private_keys(tmp_path / "keys") == [name]
    assert (tmp_path / "keys" / f"{name}.pem").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    who = keys.signer(tmp_path / "keys", name)
    assert who.key_id == name == keys.key_id(public)
    assert keys.holds(keys.public(public), who.sign(b"message"), b"message")
    assert not keys.holds(keys.public(public), who.sign(b"message"), b"massage")
    assert not keys.encrypted(tmp_path / "keys", name)


def test_a_passphrase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, _ = keys.new_key(tmp_path, b"open sesame")
    assert keys.encrypted(tmp_path, name)
    assert b"ENCRYPTED PRIVATE KEY" in (tmp_path / f"{name}.pem").read_bytes()
    assert keys.signer(tmp_path, name, given(b"open sesame\nmore")).key_id == name
    assert "\n" not in refuses("wrong passphrase", keys.signer, tmp_path, name, given(b"sesame\n"))
    refuses("nothing to read", keys.signer, tmp_path, name, given(b""))
    refuses("--passphrase-fd", keys.signer, tmp_path, name)
    refuses("as in `--passphrase-fd 3 3<file`", keys.signer, tmp_path, name, keys.passphrase_from(987))
    with open(os.devnull) as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        refuses("no terminal", keys.signer, tmp_path, name, keys.passphrase_from(None))
        refuses("no terminal", keys.new_passphrase, None)


def test_a_passphrase_from_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal of its own; what is typed does not appear on it."""
    import pty
    import subprocess
    import sys

    code = "from facemllm.signing.keys import new_passphrase; print(len(new_passphrase(None)))"
    main, side = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=side,
        stdout=side,
        stderr=side,
        start_new_session=True,
        preexec_fn=_take_terminal,
    )
    os.close(side)
    shown = b""
    for prompt in (b"New passphrase: ", b"Once more: "):
        while not shown.endswith(prompt):
            shown += os.read(main, 1000)
        os.write(main, b"s3cret\n")
    assert child.wait() == 0
    shown += os.read(main, 1000)
    assert b"s3cret" not in shown
    assert shown.split()[-1] == b"6"


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _pem(private: object) -> bytes:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return private.private_bytes(encoding, form, serialization.NoEncryption())  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no private key in PEM"),
        (b"\x00" * 100_000, "no private key in PEM"),
        (_pem(rsa.generate_private_key(65537, 2048)), "not an ECDSA P-256 key"),
        (_pem(ec.generate_private_key(ec.SECP384R1())), "not an ECDSA P-256 key"),
        (_pem(ec.generate_private_key(ec.SECP256R1())), "not the one it is named after"),
    ],
    ids=["empty", "zeros", "rsa", "p384", "another"],
)
def test_no_such_key(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / f"{'a' * 64}.pem").write_bytes(content)
    refuses(words, keys.signer, tmp_path, "a" * 64)
    refuses("no private key bbbb", keys.signer, tmp_path, "b" * 64)


def test_a_pipe_for_a_key(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"{'a' * 64}.pem")
    refuses("not a regular file", keys.signer, tmp_path, "a" * 64)


def test_a_policy_is_read_as_it_was_written(tmp_path: Path) -> None:
    known = usual(FOUR_EYES)
    write_policy(tmp_path / "policy.yaml", known)
    assert read_policy(tmp_path / "policy.yaml") == known


def test_a_key_is_revoked(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    for name in ("ada", "bob"):
        add_key(path, key(name, name, "approver"), ONE)
    refuses("listed already", add_key, path, key("ada", "x", "approver"), ONE)
    ada = signer("ada").key_id
    assert revoke_key(path, ada[:10], "laptop stolen", utc_now()).why == "laptop stolen"
    found = read_policy(path).keys[ada]
    assert (found.state(utc_now()), found.why, found.valid_at(START)) == ("revoked", "laptop stolen", False)
    assert read_policy(path).persons("approver", utc_now()) == ["bob"]
    refuses("was revoked on", revoke_key, path, ada[:10], "again", utc_now())
    refuses("8 digits or more", revoke_key, path, ada[:7], "x", utc_now())
    refuses("no such key", find_key, read_policy(path), "0" * 12)


def test_the_dates_of_a_key() -> None:
    one = key("ada", "Ada", "approver", not_before=START, not_after=START + timedelta(days=1))
    at = [START - timedelta(seconds=1), START, START + timedelta(days=1), START + timedelta(days=1, seconds=1)]
    assert [one.state(time) for time in at] == ["not yet valid", "valid", "valid", "expired"]


def test_an_entry_for_a_policy_that_others_keep(tmp_path: Path) -> None:
    one = key("ada", "Ada", "approver")
    text = "version: 1\nkeys:\n" + "".join(f"  {line}\n" for line in entry_text(one).splitlines())
    text += "rule: {approvals: {approver: 1}, request_by: [pipeline], requester_may_approve: true, valid_days: 90}\n"
    (tmp_path / "policy.yaml").write_text(text)
    assert read_policy(tmp_path / "policy.yaml").keys == {one.id: one}


def test_times_as_people_write_them(tmp_path: Path) -> None:
    write_policy(tmp_path / "p.yaml", policy(key("ada", "Ada", "approver")))
    for written in ("2026-01-01T00:00:00Z", "2026-01-01T01:00:00+01:00", "2026-01-01"):
        text = (tmp_path / "p.yaml").read_text().replace("'2026-01-01T00:00:00Z'", written)
        (tmp_path / "q.yaml").write_text(text)
        assert read_policy(tmp_path / "q.yaml").keys[signer("ada").key_id].not_before == START


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("version",), 2, "version: 2"),
        (("rule",), None, "rule: expected a mapping"),
        (("rule", "approvals"), {}, "approvals: expected roles"),
        (("rule", "approvals"), {"approver": 0}, "from 1 to 100"),
        (("rule", "approvals"), {"approver": True}, "from 1 to 100"),
        (("rule", "approvals"), {"pipeline": 1}, "no role of persons"),
        (("rule", "request_by"), [], "request_by: expected a list"),
        (("rule", "requester_may_approve"), "no", "true or false"),
        (("rule", "valid_days"), 0, "valid_days"),
        (("rule", "validdays"), 3, "validdays: unknown key"),
        (("keys", "K", "person"), "", "person: expected a name"),
        (("keys", "K", "person"), "A\x1b[2J", "person: expected a name"),
        (("keys", "K", "roles"), "approver", "roles: expected a list"),
        (("keys", "K", "not_before"), "2026-01-01T00:00:00", "with its zone"),
        (("keys", "K", "not_before"), None, "not_before: expected a time"),
        (("keys", "K", "revoked"), True, "revoked: expected a time"),
        (("keys", "K", "public_key"), "x", "no public key"),
        (("keys", "K", "public_key"), key("bob", "b", "x").public_key, "its id is"),
        (("keys", "K", "more"), 1, "more: unknown key"),
    ],
)
def test_no_such_policy(tmp_path: Path, path: tuple[str, ...], value: object, words: str) -> None:
    file = tmp_path / "policy.yaml"
    write_policy(file, policy(key("ada", "Ada", "approver")))
    read_policy(file)
    data = yaml.safe_load(file.read_text())
    at = data
    for part in path[:-1]:
        at = at[signer("ada").key_id if part == "K" else part]
    at[path[-1]] = value
    file.write_text(yaml.safe_dump(data))
    assert str(file) in refuses(words, read_policy, file)


def test_a_policy_that_says_a_key_twice_or_is_not_there(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    refuses("promote.policy", read_policy, file)
    file.write_text("version: 1\nversion: 1\n")
    refuses("twice", read_policy, file)
    refuses("check your rights|promote.policy", read_policy, tmp_path)


def test_two_spellings_are_one_person() -> None:
    from facemllm.signing.policy import same_person

    assert same_person("Ada  LOVELACE") == same_person("ada lovelace") == same_person("Ａda Lovelace")
    assert isinstance(key("ada", "x", "y"), Key)
