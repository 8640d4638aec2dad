"""The history of the decisions repository, read commit by commit: what each added, and whether it only added."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain

from facemllm.signing.canonical import Refused, time_text
from facemllm.signing.git import Git, Objects

LAYOUT = re.compile(
    r"bundles/[0-9a-f]{64}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,99}){1,3}"
    r"|statements/[0-9a-f]{64}/[0-9a-f]{64}\.json|signatures/[0-9a-f]{64}\.json"
)
"""The paths that there may be."""
_DEEPEST = 5
_COMMIT = 1 << 20  # bytes of a commit
_TREE = 64 << 20  # bytes of a folder's listing
FILE, FOLDER = b"100644", b"40000"
MEND = "bring back a copy from before it, or start a repository anew and decide again"


@dataclass(frozen=True)
class Change:
    """A commit: when it was made (UTC), and what its message says."""

    commit: str
    committed_at: datetime
    message: str


@dataclass
class History:
    """All that was added, up to commit `head` with the root folder `tree`: files by path, and the commit of each.

    `folders` are the paths by their first two parts, as in `statements/<model digest>`.
    """

    head: str | None = None
    tree: str | None = None
    changes: list[Change] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    added: dict[str, Change] = field(default_factory=dict)
    commits: set[str] = field(default_factory=set)
    folders: dict[str, list[str]] = field(default_factory=dict)

    def copy(self) -> History:
        """One that can go on by itself."""
        folders = {name: [*paths] for name, paths in self.folders.items()}
        return History(self.head, self.tree, [*self.changes], {**self.files}, {**self.added}, {*self.commits}, folders)

    def in_order(self, paths: Iterable[str]) -> list[str]:
        """Paths in the order in which they were added."""
        order = {path: number for number, path in enumerate(self.files)}
        return sorted(paths, key=order.__getitem__)

    def extend(self, commits: Sequence[str], objects: Objects) -> None:
        """Go on along commits, oldest first. Raises Refused ("history") naming the first that does more than add."""
        folders: dict[str, Raw] = {}
        for commit in commits:
            read = objects.read(commit, "commit", _COMMIT)
            try:
                tree, parents, time, message = _parsed(read or b"")
                if len(parents) > 1:
                    raise _Wrong("is a merge; decisions stand in one line (rebase instead)")
                if parents != ([self.head] if self.head else []):
                    raise _Wrong("does not follow the commit before it")
                if self.changes and time < self.changes[-1].committed_at:
                    raise _Wrong(f"is backdated: {time_text(time)}, before {time_text(self.changes[-1].committed_at)}")
                found = dict(_compared(folders, objects, self.tree, tree, ""))
                _whole(found, self.files)
            except _Wrong as wrong:
                raise Refused("history", f"commit {commit} {wrong}; {MEND}") from None
            change = Change(commit, time, message)
            self.head, self.tree = commit, tree
            self.changes.append(change)
            self.commits.add(commit)
            self.files |= found
            self.added |= dict.fromkeys(found, change)
            for path in found:
                self.folders.setdefault("/".join(path.split("/")[:2]), []).append(path)


Folder = Mapping[bytes, tuple[bytes, str]]
"""The entries of a folder: mode and object by name."""
Raw = frozenset[tuple[bytes, bytes, bytes]]
"""The same as git keeps them: mode, name and object, in bytes."""


def folder(objects: Objects, name: str) -> Folder:
    """A folder's entries. Raises Refused ("history") if it is damaged, ValueError for one that git would not make."""
    return {path: (mode, one.hex()) for mode, path, one in _raw(objects, name)}


def _raw(objects: Objects, name: str) -> Raw:
    data = objects.read(name, "tree", _TREE) or b""
    size = len(name) // 2
    entries = re.findall(rb"([0-7]{5,6}) ([^\0]+)\0(.{%d})" % size, data, re.DOTALL)
    names = {path for _, path, _ in entries}
    if len(names) < len(entries) or sum(map(len, chain.from_iterable(entries))) + 2 * len(entries) != len(data):
        raise ValueError("a name twice, or bytes that are no entry")
    return frozenset(entries)


def folder_bytes(entries: Folder) -> bytes:
    """A folder as git keeps it, in git's order."""

    def place(item: tuple[bytes, tuple[bytes, str]]) -> bytes:
        return item[0] + (b"/" if item[1][0] == FOLDER else b"")

    listed = sorted(entries.items(), key=place)
    return b"".join(b"%s %s\0%s" % (mode, path, bytes.fromhex(one)) for path, (mode, one) in listed)


def grown(git: Git, name: str | None, files: Mapping[tuple[bytes, ...], str]) -> str:
    """The folder `name` with files (path in parts, object) added, as a new folder. Returns its name."""
    entries = dict(folder(git.objects(), name)) if name else {}
    below: dict[bytes, dict[tuple[bytes, ...], str]] = {}
    for parts, one in files.items():
        if len(parts) == 1:
            entries[parts[0]] = (FILE, one)
        else:
            below.setdefault(parts[0], {})[parts[1:]] = one
    for part, inner in below.items():
        entries[part] = (FOLDER, grown(git, entries[part][1] if part in entries else None, inner))
    return git.write("tree", folder_bytes(entries))


class _Wrong(Exception):
    """What is wrong with a commit, to go behind its name."""


def _compared(
    folders: dict[str, Raw], objects: Objects, old: str | None, new: str, prefix: str
) -> Iterator[tuple[str, str]]:
    """The files (path, object) that folder `new` has over `old`. Raises _Wrong where it lacks or changes one."""
    if old == new:
        return
    before: Raw = _folder(folders, objects, old, prefix) if old else frozenset()
    after = _folder(folders, objects, new, prefix)
    gone = {name: (mode, one) for mode, name, one in before - after}
    come = {name: (mode, one) for mode, name, one in after - before}
    for name in sorted(gone.keys() - come.keys()):
        raise _Wrong(f"drops {_shown(prefix, name)}")
    for name, (mode, one) in sorted(come.items()):
        known = gone.get(name)
        path = prefix + name.decode("ascii", "surrogateescape")
        if known is not None and not known[0] == mode == FOLDER:
            raise _Wrong(f"rewrites {_shown(prefix, name)}")
        if mode == FOLDER and path.count("/") < _DEEPEST:
            yield from _compared(folders, objects, known[1].hex() if known else None, one.hex(), f"{path}/")
        elif mode == FILE and LAYOUT.fullmatch(path):
            yield path, one.hex()
        else:
            kind = {FILE: "", b"120000": " (a symbolic link)", b"160000": " (a submodule)"}.get(mode, " (its mode)")
            raise _Wrong(f"adds {_shown(prefix, name)}{kind}, which is no bundle, statement or signature")


def _folder(folders: dict[str, Raw], objects: Objects, name: str, prefix: str) -> Raw:
    if name not in folders:
        if len(folders) > 64:  # the next commit needs those of this one alone
            for old in list(folders)[:32]:
                del folders[old]
        try:
            folders[name] = _raw(objects, name)
        except ValueError as error:
            raise _Wrong(f"has a damaged folder '{prefix}': {error}") from None
    return folders[name]


def _whole(found: Mapping[str, str], files: Mapping[str, str]) -> None:
    """A bundle's folder comes whole, in one commit. Raises _Wrong."""
    for path in found:
        top, name, *_ = path.split("/")
        if top == "bundles" and f"{top}/{name}/bundle.json" not in found:
            what = "to a bundle that was there" if f"{top}/{name}/bundle.json" in files else "without a bundle.json"
            raise _Wrong(f"adds {path} {what}")


def _parsed(data: bytes) -> tuple[str, list[str], datetime, str]:
    """Root folder, parents, time and first line of the message of a commit."""
    head, _, message = data.partition(b"\n\n")
    lines = head.split(b"\n")
    trees = [line[5:].decode("ascii", "replace") for line in lines if line.startswith(b"tree ")]
    parents = [line[7:].decode("ascii", "replace") for line in lines if line.startswith(b"parent ")]
    times = [re.fullmatch(rb"committer .*> (\d{1,11}) [+-]\d{4}", line) for line in lines]
    found = [int(match[1]) for match in times if match]
    if len(trees) != 1 or len(found) != 1:
        raise _Wrong("is malformed")
    said = "".join(c if c.isprintable() else " " for c in message.decode("utf-8", "replace").split("\n")[0])
    return trees[0], parents, datetime.fromtimestamp(found[0], UTC), said[:500]


def _shown(prefix: str, name: bytes) -> str:
    """A path for messages, what cannot be printed as escapes."""
    return ascii(prefix + name.decode("utf-8", "backslashreplace"))[1:-1][:200]
