"""Where production finds a model's bytes: write-once, by digest, in S3 or in a folder that training does not have.

    PLACE/<model digest>/files/...              what `save_pretrained` wrote
    PLACE/<model digest>/evaluated-<digest>.json   what the server is told of an evaluation
    PLACE/<model digest>/manifest.json          its files: SHA-256 and bytes; written last, without it there is no model

A model that is whole is never written again. Nothing here is trusted by whoever reads it: the manifest has to have the
model's digest, and every byte that is loaded is hashed on its way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any

from facemllm.core.digests import of_bytes
from facemllm.core.files import atomic_write, publish
from facemllm.core.machine import cores
from facemllm.core.objects import filesystem, path_of, reached
from facemllm.errors import UserError
from facemllm.signing import manifest
from facemllm.signing.canonical import Refused
from facemllm.signing.manifest import Manifest

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

KEY = "cluster.serving.models"
FILES, MANIFEST = "files", "manifest.json"
LARGEST = 4 << 20
"""Bytes of a manifest, and of the figures of an evaluation."""
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Stored:
    """A file of a stored model."""

    sha256: str
    bytes: int


def checked(place: str) -> str:
    """The place of a store, as its addresses begin. Raises UserError unless it can be one."""
    plain = place.rstrip("/")
    if "://" not in plain and not Path(plain).is_absolute():
        raise UserError(f"{KEY}: {place} is neither s3://bucket/prefix nor an absolute folder; give one of both")
    path_of(plain, KEY)
    return plain


class ModelStore:
    """The models at `place`, s3://bucket/prefix or an absolute folder."""

    def __init__(self, place: str) -> None:
        self.place = checked(place)
        self._fs, self._root = filesystem(self.place, KEY)

    def address(self, digest: str) -> str:
        """What a server's `--model` is given."""
        return f"{self.place}/{digest}" if "://" in self.place else f"{self.place}/{digest}/{FILES}"

    def put(self, folder: Path, digest: str) -> str:
        """Have the store hold a model directory that has this digest; returns its address.

        Nothing happens if it holds it; of a put that was killed, what arrived whole is kept. Raises Refused for a
        directory of other bytes, also where it changes meanwhile, and UserError where the store does not take it.
        """
        found, base = manifest.require(folder, digest), f"{self._root}/{digest}"
        with _reached(self.place):
            if _listed(self._fs, base, digest) is None:
                with ThreadPoolExecutor(min(4, cores())) as pool:
                    sent = pool.map(lambda one: self._send(folder / one[0], base, *one), found.files.items())
                    files = {path: {"sha256": one.sha256, "bytes": one.bytes} for path, one in sent}
                self._write(f"{base}/{MANIFEST}", json.dumps({"digest": digest, "files": files}, indent=1).encode())
        return self.address(digest)

    def put_figures(self, digest: str, figures: bytes) -> str:
        """Have the store hold what a server is told of a model's evaluation; returns the address of the file."""
        name = f"{digest}/evaluated-{of_bytes(figures)[:16]}.json"
        with _reached(self.place):
            if _size(self._fs, f"{self._root}/{name}") != len(figures):
                self._write(f"{self._root}/{name}", figures)
        return f"{self.place}/{name}"

    def _write(self, path: str, data: bytes) -> None:
        if "://" not in self.place:
            atomic_write(Path(path), data)
            return
        with self._fs.open_output_stream(path) as stream:  # an object of S3 is there with all its bytes or not at all
            stream.write(data)

    def _send(self, file: Path, base: str, path: str, sha256: str) -> tuple[str, Stored]:
        """Send one file, unless it is there. Raises Refused where it is not what was hashed before."""
        target = f"{base}/{FILES}/{path}"
        there = _size(self._fs, target)
        if there == file.stat().st_size:
            with self._fs.open_input_stream(target) as stream:
                if _copied(stream, None) == (sha256, there):
                    return path, Stored(sha256, there)
        if "://" not in self.place:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
        with open(file, "rb") as source, self._fs.open_output_stream(target) as stream:
            found, size = _copied(source, stream)
        if found != sha256:
            self._fs.delete_file(target)
            raise Refused("digest", f"{file} changed while it was sent; nothing may change a model meanwhile")
        return path, Stored(sha256, size)


def is_remote(place: str) -> bool:
    """Whether what a server is given is an address of a store, not a folder."""
    return "://" in place


@contextmanager
def verified_copy(
    place: str, digest: str, scratch: Path, files: Mapping[str, str] | None = None
) -> Iterator[tuple[Path, Manifest]]:
    """As `manifest.verified_copy`, of a model directory or of an address in a store: the bytes of the copy are those
    that were hashed. Raises Refused ("digest", "files") and UserError as that."""
    if not is_remote(place):
        with manifest.verified_copy(Path(place), digest, scratch, files) as found:
            yield found
        return
    with manifest.private_folder(scratch) as private:
        yield private / "model", _fetched(place, digest, private / "model")


def copy_to(place: str, digest: str, out: Path, files: Mapping[str, str] | None = None) -> Manifest:
    """As `manifest.copy_to`, of a model directory or of an address in a store."""
    if not is_remote(place) or out.exists():
        return manifest.copy_to(out if is_remote(place) else Path(place), digest, out, files)
    with verified_copy(place, digest, out.parent, files) as (copy, found):
        publish(copy, out)
    return found


def read(place: str) -> bytes:
    """A small file, of a folder or of a store. Raises UserError."""
    fs, path = filesystem(place, "--evaluated") if is_remote(place) else (None, place)
    with _reached(place):
        if fs is None:
            return Path(path).read_bytes()
        with fs.open_input_stream(path) as stream:
            return bytes(stream.read(LARGEST))


def _fetched(place: str, digest: str, copy: Path) -> Manifest:
    fs, base = filesystem(place, "--model")
    with _reached(place):
        listed = _listed(fs, base, digest)
        if listed is None:
            raise UserError(f"{place} holds no whole model; `pipeline.py` step `deploy` or `release` puts it there")
        manifest.make(copy, sum(one.bytes for one in listed.values()))
        for path in listed:
            (copy / path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)

        def fetch(path: str) -> None:
            with fs.open_input_stream(f"{base}/{FILES}/{path}") as stream, open(copy / path, "xb") as target:
                if _copied(stream, target, listed[path].bytes) != (listed[path].sha256, listed[path].bytes):
                    raise Refused("digest", f"{place}: {path} is not the file that was stored; put back its bytes")

        ordered = sorted(listed, key=lambda path: -listed[path].bytes)
        with ThreadPoolExecutor(cores()) as pool:
            for _ in pool.map(fetch, ordered):
                pass
    files = {path: listed[path].sha256 for path in sorted(listed)}
    return Manifest(MappingProxyType(files), sum(one.bytes for one in listed.values()))


def _listed(fs: FileSystem, base: str, digest: str) -> dict[str, Stored] | None:
    """The files of a whole model; None where there is none. Raises Refused where they are not those of the digest."""
    if _size(fs, f"{base}/{MANIFEST}") is None:
        return None
    with fs.open_input_stream(f"{base}/{MANIFEST}") as stream:
        text = stream.read(LARGEST)
    try:
        given = json.loads(text)["files"]
        files = {str(path): Stored(str(one["sha256"]), int(one["bytes"])) for path, one in sorted(given.items())}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Refused("malformed", f"{base}/{MANIFEST} is no manifest of a model") from None
    for path in files:
        parts = path.split("/")
        if len(parts) > manifest.MOST_LEVELS or not all(manifest.NAME.fullmatch(part) for part in parts):
            raise Refused("files", f"{base}/{MANIFEST} lists {ascii(path)[:200]}, which no model directory may hold")
    made = Manifest({path: one.sha256 for path, one in files.items()}, 0)
    if made.digest != digest or len(files) > manifest.MOST_FILES:
        raise Refused("digest", f"{base} holds model {made.digest[:12]}, not {digest[:12]}")
    return files


def _size(fs: FileSystem, path: str) -> int | None:
    found = fs.get_file_info(path)
    return int(found.size) if found.is_file else None


def _copied(source: Any, target: IO[bytes] | Any | None, most: int | None = None) -> tuple[str, int]:
    """SHA-256 and size of a stream, whose bytes are written to `target`; it is left where it has more than `most`."""
    hashed, size = hashlib.sha256(), 0
    while block := source.read(_BLOCK):
        hashed.update(block)
        size += len(block)
        if most is not None and size > most:
            break
        if target is not None:
            target.write(block)
    return hashed.hexdigest(), size


def _reached(place: str) -> AbstractContextManager[None]:
    return reached(place, "is it reachable, and may this account use it?")
