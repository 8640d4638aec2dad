"""A laptop's keys and policy, made on first use, and the command that makes others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from facemllm.settings import Settings, load
from facemllm.signing import local
from facemllm.signing.authorization import authorize
from facemllm.signing.decisions import Decisions
from facemllm.signing.policy import read_policy
from facemllm.signing.statements import Draft, sign
from tests.refusing import refuses
from tests.signed import MODEL, bundle_files

ROOT = Path(__file__).parents[2]


def settings_in(folder: Path, *more: str, profile: str = "laptop") -> Settings:
    return load(profile, [f"storage.home={folder / 'home'}", *more])


def test_first_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The pipeline asks, Ada approves with a key made on the spot; each new key is printed in one line."""
    settings = settings_in(tmp_path)
    known = local.policy(settings)
    assert [(key.person, key.roles) for key in known.keys.values()] == [("pipeline", ("pipeline", "releaser"))]
    assert str(settings.policy_file) in capsys.readouterr().err
    decisions = Decisions.open(settings)
    bundle = decisions.append_bundle(bundle_files())
    asking = local.pipeline_signer(settings)
    decisions.append(sign(Draft("request", bundle, MODEL, "", "pipeline"), asking))
    signer, role = local.person_signer(settings, "approve", "Ada Lovelace")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{signer.key_id}.pem" in said
    assert "unencrypted" in said
    assert role == "approver"
    known = local.policy(settings)
    decisions = Decisions.open(settings, known)
    decisions.append(sign(Draft("approve", bundle, MODEL, "fine", role, decisions.previous(MODEL)), signer))
    assert [one.person for one in authorize(MODEL, decisions, known).approvals] == ["Ada Lovelace"]
    assert local.pipeline_signer(settings, "releaser").key_id == asking.key_id
    assert local.person_signer(settings, "approve")[0].key_id == signer.key_id, "the only person here"
    assert capsys.readouterr().err == "", "told once"
    words = "no valid key of Bob .*keys new 'Bob' --role approver"
    assert "\n" not in refuses(words, local.person_signer, settings, "approve", "Bob")
    refuses("release .as releaser", local.person_signer, settings, "release")


def test_which_key(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    local.policy(settings)
    ada, bob = (local.new_person_key(settings, name, ("approver", "requester"), None) for name in ("Ada", "Bob"))
    second = local.new_person_key(settings, "Ada", ("approver",), b"secret")
    assert local.person_signer(settings, "approve", "bob")[0].key_id == bob.id
    refuses("several keys here may approve .*--key", local.person_signer, settings, "approve", "Ada")
    assert local.person_signer(settings, "approve", "Ada", key=ada.id[:8])[0].key_id == ada.id
    refuses("has a passphrase", local.person_signer, settings, "approve", key=second.id[:8])
    signer, role = local.person_signer(settings, "request", "Ada")
    assert (signer.key_id, role) == (ada.id, "requester")
    refuses("may approve", local.person_signer, settings, "approve", "Bob", role="fairness")
    (local.keys_folder(settings) / f"{bob.id}.pem").unlink()
    refuses("no valid key of Bob", local.person_signer, settings, "approve", "Bob")


def test_a_teams_policy_is_not_made_here(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, f"promote.policy={tmp_path / 'policy.yaml'}")
    refuses("no policy at", local.policy, settings)
    local.new_person_key(settings, "Ada", ("approver",), None)
    refuses("no valid key with the role pipeline", local.pipeline_signer, settings)


def test_the_rule_of_the_profile_is_that_of_a_new_policy(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, profile="two-person")
    rule = local.policy(settings).rule
    assert (dict(rule.approvals), rule.request_by) == ({"approver": 1}, ("requester",))
    assert not rule.requester_may_approve
    assert local.policy(settings_in(tmp_path)).rule == rule, "the file rules, whatever the profile"


def test_a_key_that_no_policy_takes_is_not_kept(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    local.policy(settings)
    settings.policy_file.write_text("version: 3\nkeys: {}\nrule: {}\n")
    refuses("version: 3", local.new_person_key, settings, "Ada", ("approver",), None)
    assert len(list(local.keys_folder(settings).iterdir())) == 1


def test_many_first_uses_at_once(tmp_path: Path) -> None:
    code = "import sys\nfrom facemllm.settings import load\nfrom facemllm.signing import local\n"
    code += "local.policy(load('laptop', [sys.argv[1]]))"
    command = [sys.executable, "-c", code, f"storage.home={tmp_path / 'home'}"]
    running = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0] * 4
    assert len([line for line in said if line]) == 1, said
    assert len(read_policy(tmp_path / "home" / "signing" / "policy.yaml").keys) == 1


def keys(folder: Path, *arguments: str, passphrase: bytes | None = None, code: int = 0) -> str:
    """`facemllm keys ...`; standard output, or the error's line."""
    command = [sys.executable, "-m", "facemllm", "keys", *arguments, "--set", f"storage.home={folder / 'home'}"]
    given: tuple[int, ...] = ()
    if passphrase is not None:
        out, into = os.pipe()
        os.write(into, passphrase)
        os.close(into)
        command += ["--passphrase-fd", str(out)]
        given = (out,)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, pass_fds=given, stdin=subprocess.DEVNULL)
    for descriptor in given:
        os.close(descriptor)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_the_command(tmp_path: Path) -> None:
    made = json.loads(keys(tmp_path, "new", "Ada Lovelace", "--role", "approver", "--json", passphrase=b"sesame\n"))
    assert b"ENCRYPTED" in Path(made["private_key"]).read_bytes()
    assert "not encrypted" in keys(tmp_path, "new", "Bob", "--role", "approver", "--no-passphrase")
    rows = json.loads(keys(tmp_path, "list", "--json"))["keys"]
    assert [(row["person"], row["state"], row["here"]) for row in rows] == [
        ("pipeline", "valid", True),
        ("Ada Lovelace", "valid", True),
        ("Bob", "valid", True),
    ]
    assert "counts for nothing" in keys(tmp_path, "revoke", made["id"][:8], "--reason", "left")
    assert "revoked" in keys(tmp_path, "list")
    entry = keys(tmp_path, "new", "Cy", "--role", "fairness", "--no-passphrase", "--entry")
    assert "PRIVATE" not in entry
    assert "person: Cy" in entry
    assert len(json.loads(keys(tmp_path, "list", "--json"))["keys"]) == 3
    assert "no terminal" in keys(tmp_path, "new", "Dan", "--role", "approver", code=1)
    assert "small letters" in keys(tmp_path, "new", "Dan", "--role", "Big Boss", "--no-passphrase", code=1)
