"""The OpenSSF signature of a model directory (`model-signing`): every file by name and SHA-256, by one P-256 key.

It serves whoever has the directory and that public key alone, with `model_signing verify`. What is served is decided by
statements instead (`authorization`): this signature names no bundle, no role, no validity, and its subject's digest is
not our digest of a directory. The hashing configuration is stated, as a verifier's should be: by default the library
skips `.git` and its like, and a directory with files added there would verify.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path

from facemllm.errors import UserError, one_line


def sign_model(folder: Path, private_key: Path, passphrase: bytes | None = None) -> bytes:
    """The signature of a model directory (a Sigstore bundle, JSON) by the private key of a file.

    Raises UserError when the directory holds a link or anything but files and folders, or the key cannot be used.
    """
    from model_signing import hashing, signing

    every = hashing.Config().use_file_serialization(hashing_algorithm="sha256", allow_symlinks=False)
    every.set_ignored_paths(paths=[], ignore_git_paths=False)
    # the library prints its warnings; standard output belongs to the command
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        out = Path(scratch, "model.sig")
        try:
            # its annotation says str, but cryptography takes bytes alone
            config = signing.Config().use_elliptic_key_signer(private_key=private_key, password=passphrase)  # type: ignore[arg-type]
            config.set_hashing_config(every).sign(folder, out)
        except Exception as error:
            raise UserError(f"{folder}: the model cannot be signed: {one_line(error)}") from None
        return out.read_bytes()
