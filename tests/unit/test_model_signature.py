"""The OpenSSF signature of a model directory."""

import json
import os
import shutil

import pytest
from cryptography.hazmat.primitives import serialization

from facemllm.errors import UserError
from facemllm.signing import keys
from facemllm.signing.canonical import Refused
from facemllm.signing.model_signature import LARGEST, sign_model, verify_model


@pytest.fixture(scope="module")
def signed(tmp_path_factory):
    """A model directory, its signature, and the public key."""
    home = tmp_path_factory.mktemp("signed")
    model = home / "model"
    (model / "adapter").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (model / "adapter" / "weights.bin").write_bytes(b"adapter")
    key, public = keys.new_key(home / "keys", None)
    return model, sign_model(model, home / "keys" / f"{key}.pem"), public


def flip(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)


def hidden(folder):
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("x")


CHANGES = {
    **{f"a bit of {name}": lambda f, name=name: flip(f, name) for name in ("config.json", "model.safetensors")},
    "a bit below": lambda f: flip(f, "adapter/weights.bin"),
    "added": lambda f: (f / "extra.py").write_text("x"),
    "hidden": lambda f: (f / ".hidden").write_text("x"),
    "git's folder": hidden,
    "git's file": lambda f: (f / ".gitattributes").write_text("x"),
    "removed": lambda f: (f / "config.json").unlink(),
    "renamed": lambda f: (f / "config.json").rename(f / "settings.json"),
    "moved": lambda f: (f / "config.json").rename(f / "adapter" / "config.json"),
    "a link": lambda f: os.symlink("config.json", f / "link.json"),
    "a link to a folder": lambda f: os.symlink("adapter", f / "other"),
    "a FIFO": lambda f: os.mkfifo(f / "pipe"),
}


def test_the_directory_that_was_signed_is_known_again_elsewhere_too(signed, tmp_path, capsys):
    model, signature, public = signed
    verify_model(model, signature, public)
    verify_model(shutil.copytree(model, tmp_path / "another name"), signature, public)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_directory_is_refused(signed, tmp_path, change):
    model, signature, public = signed
    folder = shutil.copytree(model, tmp_path / "model")
    CHANGES[change](folder)
    with pytest.raises(Refused) as refused:
        verify_model(folder, signature, public)
    assert refused.value.check == "signature"
    assert "\n" not in str(refused.value)


def test_another_key_and_what_is_no_signature_are_refused(signed, tmp_path):
    model, signature, public = signed
    _, other = keys.new_key(tmp_path / "keys", None)
    with pytest.raises(Refused, match="not the directory"):
        verify_model(model, signature, other)
    empty = json.loads(signature)
    empty["dsseEnvelope"]["signatures"] = []
    bad = [b"", b"{}", b"[]", b"\xff", b"[" * 100_000, json.dumps(empty).encode()]
    for data in bad:
        with pytest.raises(Refused) as refused:
            verify_model(model, data, public)
        assert refused.value.check == "signature"
    with pytest.raises(Refused) as refused:
        verify_model(model, b" " * (LARGEST + 1), public)
    assert refused.value.check == "too_large"
    with pytest.raises(UserError, match="no public key"):
        verify_model(model, signature, "not a key")


def test_an_encrypted_key_signs_with_its_passphrase_alone(signed, tmp_path):
    model = signed[0]
    key, public = keys.new_key(tmp_path, b"open sesame")
    private = tmp_path / f"{key}.pem"
    assert serialization.load_pem_private_key(private.read_bytes(), b"open sesame")
    verify_model(model, sign_model(model, private, b"open sesame"), public)
    for wrong in (None, b"guess"):
        with pytest.raises(UserError, match="cannot be signed"):
            sign_model(model, private, wrong)
    os.symlink("config.json", (linked := shutil.copytree(model, tmp_path / "linked")) / "link")
    with pytest.raises(UserError, match="cannot be signed"):
        sign_model(linked, private, b"open sesame")
