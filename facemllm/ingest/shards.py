"""Shards as img2dataset writes them in webdataset form: plain tar files whose members belong together by their stem.

    00000.tar:  000000012.jpg    000000012.txt      000000012.json
    also:       12.input.jpg     12.output.txt      12.json         one sample, by what stands before the first dot
    and:        12.left.jpg      12.left.json       12.right.jpg    12.right.json: two, by what stands before the last

Members are read in order, one sample at a time; nothing is unpacked. Links, devices, sparse files, names that lead out
and members that are too large are refused, the rest of the shard is read on. A shard that breaks off gives what came
before, and a refused row; so does one without the empty blocks that end a tar file.
Source: img2dataset's README; the tar format as in POSIX pax.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from facemllm.core.images import MAX_BYTES
from facemllm.errors import one_line
from facemllm.ingest.reader import Box, Refused, files

MARGIN = 0.25
"""Part of a face box's width and height that is added to the crop on each side."""

MAX_TEXT = 2**20
_PICTURES = ("jpg", "jpeg", "png", "webp")
_END = 1024


@dataclass(frozen=True)
class Sample:
    """One picture of a shard: `file` names it, `key` is its stem. What is not there is None."""

    file: str
    key: str
    picture: bytes | None
    text: str | None
    facts: Mapping[str, Any] | None


@dataclass
class _Held:
    """Members of the sample that is being read, by their ending: what stands between the stem and it, and the bytes.
    `parted`: another sample has the same stem."""

    stem: str = ""
    file: str = ""
    parted: bool = False
    content: dict[str, tuple[str, bytes]] = field(default_factory=dict)


def tars(folder: Path) -> list[Path]:
    """The shards of a folder in name order. Raises UserError when it cannot be listed."""
    return [folder / name for name in files(folder) if name.lower().endswith(".tar")]


def samples(path: Path, root: Path) -> Iterator[Sample | Refused]:
    """Samples of a shard in its order; memory holds one of them, and the keys of the shard."""
    name = path.relative_to(root).as_posix()
    held, seen, broken = _Held(), set[str](), ""
    try:
        with tarfile.open(path, "r|", encoding="utf-8", errors="replace") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it would keep every header
                file = f"{name}/{member.name[:200]}"
                if member.isdir():
                    continue
                if reason := _reason(member):
                    yield Refused(file, 0, reason)
                    continue
                first, _, rest = PurePosixPath(member.name).name.partition(".")
                middle, _, kind = rest.rpartition(".")
                stem, kind = (PurePosixPath(member.name).parent / first).as_posix(), kind.lower()
                again = stem == held.stem and kind in held.content
                if again and held.content[kind][0] == middle:
                    yield Refused(file, 0, "its name stands in the shard already")
                    continue
                if again or stem != held.stem:
                    held.parted |= again
                    yield from _complete(held)
                    held = _Held(stem, f"{name}/{stem[:200]}", again)
                    if not again and stem in seen:
                        yield Refused(file, 0, "its name stands in the shard already")
                        held.file = ""
                    seen.add(stem)
                reader = archive.extractfile(member)
                held.content[kind] = middle, reader.read() if reader else b""
                if kind in _PICTURES and held.file:
                    held.file = file
    except Exception as error:  # a hostile header can raise almost anything
        broken = one_line(error)
    yield from _complete(held)
    if broken:
        yield Refused(name, 0, f"the shard is damaged or cut short ({broken}); what came before it is kept")
    elif not _ended(path):
        yield Refused(name, 0, "the shard has no end mark; it may be cut short")


def widened(box: Box) -> Box:
    """A face box with `MARGIN` of its width and height added on each side."""
    across, down = MARGIN * (box[2] - box[0]), MARGIN * (box[3] - box[1])
    return box[0] - across, box[1] - down, box[2] + across, box[3] + down


def _reason(member: tarfile.TarInfo) -> str:
    name = PurePosixPath(member.name)
    if not member.isreg() or member.issparse():
        return "a link, device or other special member"
    if name.is_absolute() or ".." in name.parts or "\0" in member.name or "\\" in member.name:
        return "its name leads out of the shard"
    limit = MAX_BYTES if name.suffix.lower().lstrip(".") in _PICTURES else MAX_TEXT
    return f"{member.size:,} bytes, more than {limit:,}" if member.size > limit else ""


def _complete(held: _Held) -> Iterator[Sample | Refused]:
    if not held.file:
        return
    middles = {middle for middle, _ in held.content.values()}
    if held.parted and len(middles) > 1:
        yield Refused(
            held.file, 0, "several pictures of this name and one label file; give each its own, or one picture"
        )
        return
    key = ".".join([held.stem, *filter(None, middles)]) if len(middles) == 1 else held.stem
    content = {kind: read for kind, (_, read) in held.content.items()}
    text, facts = content.get("txt"), content.get("json")
    try:
        found = None if facts is None else json.loads(facts.decode("utf-8-sig"))
        words = None if text is None else text.decode("utf-8-sig").strip()
    except (ValueError, RecursionError) as error:
        yield Refused(held.file, 0, f"damaged .json or .txt beside it ({type(error).__name__})")
        return
    if found is not None and not isinstance(found, dict):
        yield Refused(held.file, 0, "the .json beside it holds no object")
        return
    picture = next((content[kind] for kind in _PICTURES if kind in content), None)
    yield Sample(held.file, key, picture, words, found)


def _ended(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _END))
        return size >= _END and not any(file.read(_END))
