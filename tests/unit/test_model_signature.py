"""The OpenSSF signature of a model directory, verified by the library alone, as whoever gets one does."""

import os
import shutil
from pathlib import Path

import pytest
from model_signing import hashing, verifying

from facemllm.errors import UserError
from facemllm.signing import keys
from facemllm.signing.model_signature import sign_model
from tests.approved import flip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signed") / "model"
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "adapter" / "weights.bin").write_bytes(b"adapter")
    return folder


def verify(folder: Path, signature: bytes, public: str, scratch: Path) -> None:
    (scratch / "key.pem").write_text(public)
    (scratch / "model.sig").write_bytes(signature)
    every = hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False)
    config = verifying.Config().use_elliptic_key_verifier(public_key=scratch / "key.pem")
    config.set_hashing_config(every).verify(folder, scratch / "model.sig")


def hidden(folder: Path) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("x")


CHANGES = {
    "a bit below": lambda f: flip(f / "adapter" / "weights.bin"),
    "added": lambda f: (f / ".hidden").write_text("x"),
    "git's folder": hidden,
    "removed": lambda f: (f / "config.json").unlink(),
    "moved": lambda f: (f / "config.json").rename(f / "adapter" / "config.json"),
}


def test_a_signature_is_of_every_file_wherever_the_directory_lies(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, public = keys.new_key(tmp_path / "keys", None)
    signature = sign_model(model, tmp_path / "keys" / f"{key}.pem")
    assert capsys.readouterr().out == ""
    verify(shutil.copytree(model, tmp_path / "another name"), signature, public, tmp_path)
    for name, change in CHANGES.items():
        folder = shutil.copytree(model, tmp_path / name)
        change(folder)
        with pytest.raises(ValueError, match=r"mismatch|Signature"):
            verify(folder, signature, public, tmp_path)


def test_an_encrypted_key_signs_with_its_passphrase_alone(model: Path, tmp_path: Path) -> None:
    key, public = keys.new_key(tmp_path, b"open sesame")
    private = tmp_path / f"{key}.pem"
    verify(model, sign_model(model, private, b"open sesame"), public, tmp_path)
    for wrong in (None, b"guess"):
        with pytest.raises(UserError, match="cannot be signed"):
            sign_model(model, private, wrong)
    os.symlink("config.json", (linked := shutil.copytree(model, tmp_path / "linked")) / "link")
    with pytest.raises(UserError, match="cannot be signed"):
        sign_model(linked, private, b"open sesame")
