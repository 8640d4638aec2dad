"""Key pairs (ECDSA P-256, SHA-256) and whoever signs with one.

A key's id is the SHA-256 of its public half (DER SubjectPublicKeyInfo). A private key lies in `<folder>/<id>.pem`
(PKCS#8, mode 0600), encrypted when a passphrase is given. Statements are signed through `Signer`, which an ssh agent or
a PKCS#11 token can be, too.
"""

from __future__ import annotations

import getpass
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from facemllm.core.digests import of_bytes
from facemllm.core.files import atomic_file, writing
from facemllm.errors import UserError

Passphrase = Callable[[str], bytes]
"""Gives the passphrase of the key whose id it is told; asked for only where the key is encrypted."""
_ALGORITHM = ec.ECDSA(hashes.SHA256())
_LARGEST = 16_384  # bytes of a key's file


class Signer(Protocol):
    """Whoever signs: `key_id` names the key, `sign` gives the signature of bytes (ECDSA P-256, SHA-256, DER)."""

    @property
    def key_id(self) -> str:
        """SHA-256 of the public key, in hex."""

    def sign(self, message: bytes) -> bytes:
        """The signature of `message`."""


@dataclass(frozen=True)
class FileSigner:
    """Signs with a private key that was read from a file."""

    key_id: str
    private: ec.EllipticCurvePrivateKey = field(repr=False, compare=False)

    def sign(self, message: bytes) -> bytes:
        """The signature of `message`, DER."""
        return self.private.sign(message, _ALGORITHM)


def new_key(folder: Path, passphrase: bytes | None) -> tuple[str, str]:
    """Make a key pair in `folder`. Returns its id and public key (PEM). Raises UserError if it cannot be written."""
    private = ec.generate_private_key(ec.SECP256R1())
    public = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    pem = private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    name = key_id(public.decode())
    path = folder / f"{name}.pem"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with atomic_file(path) as partial, open(partial, "xb", opener=_private) as file:
            file.write(pem)
    return name, public.decode()


def signer(folder: Path, key: str, passphrase: Passphrase | None = None) -> FileSigner:
    """Who signs with the private key `key` (an id) of `folder`; `passphrase` is asked where it is encrypted.

    Raises UserError when there is no such key, the passphrase is wrong or missing, or the file holds another key.
    """
    path = folder / f"{key}.pem"
    pem = _content(path)
    loaded: object
    try:
        loaded = serialization.load_pem_private_key(pem, None)
    except TypeError:  # it is encrypted
        loaded = _decrypted(path, pem, passphrase)
    except (ValueError, UnsupportedAlgorithm):
        raise UserError(f"{path}: no private key in PEM; make one with `facemllm keys new`") from None
    if not isinstance(loaded, ec.EllipticCurvePrivateKey) or not isinstance(loaded.curve, ec.SECP256R1):
        raise UserError(f"{path}: not an ECDSA P-256 key; make one with `facemllm keys new`")
    held = of_bytes(
        loaded.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    if held != key:
        raise UserError(f"{path}: holds the key {held[:12]}, not the one it is named after; rename it to {held}.pem")
    return FileSigner(held, loaded)


def private_keys(folder: Path) -> list[str]:
    """The ids of the private keys that lie in `folder`, sorted."""
    return sorted(path.stem for path in folder.glob("*.pem") if len(path.stem) == 64)


def encrypted(folder: Path, key: str) -> bool:
    """Whether the private key `key` of `folder` asks for a passphrase. Raises UserError when there is no such key."""
    return b"ENCRYPTED PRIVATE KEY" in _content(folder / f"{key}.pem")


def key_id(public_key: str) -> str:
    """The id of a public key (PEM): SHA-256 of its DER SubjectPublicKeyInfo. Raises UserError if it is no P-256 key."""
    der = public(public_key).public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return of_bytes(der)


def public(public_key: str) -> ec.EllipticCurvePublicKey:
    """A public key from its PEM. Raises UserError if it is no ECDSA P-256 key."""
    try:
        loaded = serialization.load_pem_public_key(public_key.encode())
    except (ValueError, UnsupportedAlgorithm):
        loaded = None
    if not isinstance(loaded, ec.EllipticCurvePublicKey) or not isinstance(loaded.curve, ec.SECP256R1):
        raise UserError("no public key of ECDSA P-256 in PEM; `facemllm keys new` makes one")
    return loaded


def holds(key: ec.EllipticCurvePublicKey, signature: bytes, message: bytes) -> bool:
    """Whether `signature` is that of `message` by `key`."""
    try:
        key.verify(signature, message, _ALGORITHM)
    except InvalidSignature:
        return False
    return True


def passphrase_from(descriptor: int | None) -> Passphrase:
    """Where a passphrase comes from: the first line of a file descriptor, else a prompt on the terminal.

    Raises UserError, when asked, if there is neither or the descriptor gives nothing.
    """

    def ask(key: str) -> bytes:
        if descriptor is None:
            if not sys.stdin.isatty():
                raise UserError(f"key {key[:12]} has a passphrase and there is no terminal: --passphrase-fd N")
            return getpass.getpass(f"Passphrase of key {key[:12]}: ").encode()
        return _first_line(descriptor)

    return ask


def new_passphrase(descriptor: int | None) -> bytes:
    """A new key's passphrase: from a file descriptor, or asked for twice. Raises UserError if empty or different."""
    if descriptor is not None:
        return _first_line(descriptor)
    if not sys.stdin.isatty():
        raise UserError("no terminal to ask for a passphrase: --passphrase-fd N, or --no-passphrase for none")
    given = getpass.getpass("New passphrase: ")
    if not given:
        raise UserError("the passphrase is empty; --no-passphrase makes a key without one")
    if getpass.getpass("Once more: ") != given:
        raise UserError("the two passphrases differ; run the command again")
    return given.encode()


def _first_line(descriptor: int) -> bytes:
    try:
        with open(os.dup(descriptor), "rb") as file:
            given = file.readline(4096).rstrip(b"\r\n")
    except OSError as error:
        raise UserError(f"--passphrase-fd {descriptor}: {error.strerror}; as in `--passphrase-fd 3 3<file`") from None
    if not given:
        raise UserError(f"--passphrase-fd {descriptor}: nothing to read; as in `--passphrase-fd 3 3<file`")
    return given


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _content(path: Path) -> bytes:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file.read(_LARGEST)
    except FileNotFoundError:
        raise UserError(
            f"no private key {path.stem[:12]} in {path.parent}; make one with `facemllm keys new`"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check your rights there") from None
    raise UserError(f"{path}: not a regular file")


def _decrypted(path: Path, pem: bytes, passphrase: Passphrase | None) -> object:
    if passphrase is None:
        raise UserError(f"key {path.stem[:12]} has a passphrase: give it at the prompt or with --passphrase-fd N")
    try:
        return serialization.load_pem_private_key(pem, passphrase(path.stem))
    except (ValueError, TypeError):
        raise UserError(f"wrong passphrase for key {path.stem[:12]}, or {path} is damaged") from None
