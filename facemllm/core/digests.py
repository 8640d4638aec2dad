"""SHA-256 of files, folders, settings and code: the names that caching, resuming, lineage and approval compare.

And choices drawn by a hash of what they are about: no other row, source or order of rows can move them.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import time
from collections.abc import Iterable, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
STUDIES = "studies"  # code over the package, which is keyed as the package is
TASKS = "facemllm.tasks"
"""Package whose modules are found by name: who imports the package itself asks the tasks of the settings."""
NEUTRAL = {
    "facemllm.errors": "words of refusals",
    "facemllm.settings": "the values that a step depends on are in its key",
    "facemllm.tracking": "tells MLflow what was done",
    "facemllm.core.cost": "measures what the work takes",
    "facemllm.core.files": "how bytes reach the disk, and who waits; what it fetches is in the key",
    "facemllm.core.machine": "how many processes work, and by which path",
    "facemllm.core.processes": "when processes end, and who keeps servers up",
    "facemllm.core.progress": "shows how far the work is",
    "facemllm.core.servers": "which servers there are",
    "facemllm.core.services": "starts and stops servers",
}
"""Modules, with those below them, that decide no byte of a result, and why: they are no part of any key."""
_SETTLED_NS = 2_000_000_000  # clocks of file systems tick in up to two seconds


def of_bytes(data: bytes) -> str:
    """Hex SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def of_file(path: Path, fresh: bool = False) -> str:
    """Hex SHA-256 of a file, read in blocks; once a process, as long as its size, times and inode stay the same.

    `fresh` reads it in any case: for bytes that are checked before they are served or released.
    """
    state = path.stat()
    changed = max(state.st_mtime_ns, state.st_ctime_ns)
    if fresh or time.time_ns() - changed < _SETTLED_NS:  # it may change again without its times telling
        return _read(path)
    return _remembered(path.resolve(), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)


@lru_cache(4096)
def _remembered(path: Path, *_state: int) -> str:
    return _read(path)


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_json(value: Any) -> str:
    """Hex SHA-256 of a value's canonical JSON (sorted keys, no spaces)."""
    return of_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def of_tree(folder: Path, fresh: bool = False) -> str:
    """Hex SHA-256 of a folder: relative names and contents of all its files, in name order. `fresh` as of `of_file`."""
    return of_listing(of_each(folder, fresh))


def of_each(folder: Path, fresh: bool = False) -> dict[str, str]:
    """Hex SHA-256 of every file of a folder by its relative name, in name order. `fresh` as of `of_file`."""
    files = sorted((p.relative_to(folder).as_posix(), p) for p in folder.rglob("*") if p.is_file())
    return {name: of_file(path, fresh) for name, path in files}


def of_listing(files: Mapping[str, str]) -> str:
    """The digest of a folder (`of_tree`) whose files have these digests by name."""
    return of_json(sorted(files.items()))


def draw(count: int, *parts: str) -> int:
    """A number below `count` that depends on `parts` alone."""
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "big") % count


def drawn(counts: Iterable[int], *parts: str) -> list[int]:
    """A number below each of `counts`, all from one hash of `parts`; the product of the counts stays below 2**240."""
    rest = int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=32).digest(), "big")
    numbers = []
    for count in counts:
        rest, number = divmod(rest, count)
        numbers.append(number)
    return numbers


@cache
def of_package() -> str:
    """Hex SHA-256 of all of `facemllm`: code and data files."""
    return of_json([[p.relative_to(PACKAGE).as_posix(), of_file(p)] for p in _sources(PACKAGE)])


@cache
def of_code(module: str, tasks: tuple[str, ...] | None = None) -> str:
    """Hex SHA-256 of the code behind a module (`code_files`): what Python makes of it, without comments and docstrings.

    A step's results are keyed by this, so that an edit re-runs the steps it can change and no others. Versions of
    Python differ in it.
    """
    files = sorted(code_files(module, tasks))
    digest = {path: of_bytes(_parsed(path)[0].encode()) if path.suffix == ".py" else of_file(path) for path in files}
    return of_json([[path.relative_to(PACKAGE.parent).as_posix(), digest[path]] for path in files])


def code_files(module: str, tasks: tuple[str, ...] | None = None) -> set[Path]:
    """The files behind a module: itself, every `facemllm` module it imports, directly or not, and their data files.

    `NEUTRAL` modules are left out. Where tasks are asked by name, `tasks` says which ones count; None: all.
    """
    modules: dict[str, Path] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        path = _module_path(name)
        if path is None or name in modules or any(f"{name}.".startswith(f"{neutral}.") for neutral in NEUTRAL):
            continue
        modules[name] = path
        imported = _parsed(path)[1]
        todo += imported
        todo += [name.rsplit(".", n)[0] for name in imported for n in range(1, name.count(".") + 1)]
        if TASKS in imported and (folder := _module_path(TASKS)):
            todo += [f"{TASKS}.{task}" for task in tasks or [file.stem for file in folder.parent.glob("*.py")]]
    files = set(modules.values())
    for path in modules.values():
        files.update(p for p in _sources(path.parent) if p.suffix != ".py" and path.parent != PACKAGE)
    return files


def _sources(folder: Path) -> list[Path]:
    skip = {".pyc", ".nbi", ".nbc"}
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix not in skip)


def _module_path(name: str) -> Path | None:
    if name.split(".")[0] not in (PACKAGE.name, STUDIES):
        return None
    base = PACKAGE.parent.joinpath(*name.split("."))
    if (base / "__init__.py").is_file():
        return base / "__init__.py"
    return base.with_suffix(".py") if base.with_suffix(".py").is_file() else None


@cache
def _parsed(path: Path) -> tuple[str, list[str]]:
    """What Python makes of a module, and the names of modules (and other things) that it imports."""
    tree = ast.parse(path.read_text("utf-8"))
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(base, ".".join(parts[:-1]))
            below = [f"{base}.{alias.name}" for alias in node.names]
            names += below if all(map(_module_path, below)) else [base, *below]
    return ast.dump(_Wordless().visit(tree)), names


class _Wordless(ast.NodeTransformer):
    """Takes docstrings out, those of constants too."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        words = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if words else self.generic_visit(node)
