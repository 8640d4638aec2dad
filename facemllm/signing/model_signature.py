"""The OpenSSF signature of a model directory (`model-signing`): every file by name and SHA-256, by one P-256 key.

It serves whoever has the directory and that public key alone, with `model_signing verify` or this. What is served is
decided by statements instead (`authorization`): this signature names no bundle, no role, no validity, and its subject's
digest is not our digest of a directory. The hashing configuration is stated both when signing and verifying: by default
the library skips `.git` and its like, and a directory with files added there would verify.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

from facemllm.core.files import atomic_write
from facemllm.errors import UserError, one_line
from facemllm.signing import keys
from facemllm.signing.canonical import Refused

LARGEST = 4 << 20
"""Bytes of a signature: some hundred for each file of the model."""


def sign_model(folder: Path, private_key: Path, passphrase: bytes | None = None) -> bytes:
    """The signature of a model directory (a Sigstore bundle, JSON) by the private key of a file.

    Raises UserError when the directory holds a link or anything but files and folders, or the key cannot be used.
    """
    from model_signing import signing

    with tempfile.TemporaryDirectory() as scratch, _quiet():
        out = Path(scratch, "model.sig")
        try:
            # its annotation says str, but cryptography takes bytes alone
            config = signing.Config().use_elliptic_key_signer(private_key=private_key, password=passphrase)  # type: ignore[arg-type]
            config.set_hashing_config(_hashing()).sign(folder, out)
        except Exception as error:
            raise UserError(f"{folder}: the model cannot be signed: {one_line(error)}") from None
        signature = out.read_bytes()
    if len(signature) > LARGEST:
        raise UserError(f"{folder}: the signature has {len(signature)} bytes, more than {LARGEST}: too many files")
    return signature


def verify_model(folder: Path, signature: bytes, public_key: str) -> None:
    """Check that a directory is, file by file, the one that the holder of `public_key` (PEM) signed.

    Raises Refused ("too_large", "signature"): one bit changed, a file added, removed, renamed or hidden, any link, a
    FIFO, another key, a signature that is none. Mode, name and empty folders of the directory are not covered.
    """
    from model_signing import verifying

    if len(signature) > LARGEST:
        raise Refused("too_large", f"the model's signature has {len(signature)} bytes; at most {LARGEST} are read")
    keys.public(public_key)
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        key, stored = Path(scratch, "key.pem"), Path(scratch, "model.sig")
        atomic_write(key, public_key.encode())
        atomic_write(stored, signature)
        try:
            config = verifying.Config().use_elliptic_key_verifier(public_key=key)
            config.set_hashing_config(_hashing()).verify(folder, stored)
        except Exception as error:  # ValueError, InvalidSignature, IndexError, KeyError, RecursionError, OSError, ...
            why = one_line(error)
            raise Refused("signature", f"{folder}: not the directory that was signed by this key ({why})") from None


def _hashing() -> Any:
    from model_signing import hashing

    chosen = hashing.Config().use_file_serialization(hashing_algorithm="sha256", allow_symlinks=False)
    return chosen.set_ignored_paths(paths=[], ignore_git_paths=False)


def _quiet() -> contextlib.redirect_stdout[io.StringIO]:
    """The library prints its warnings; standard output belongs to the command."""
    return contextlib.redirect_stdout(io.StringIO())
