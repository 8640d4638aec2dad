"""SHA-256 of files, folders, settings and code: the names that caching, resuming, lineage and approval compare."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
STUDIES = "studies"  # code over the package, which is keyed as the package is
DISCOVERED = ("facemllm.tasks",)
"""Packages whose modules are found by name: all of their modules count as imported."""


def of_bytes(data: bytes) -> str:
    """Hex SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def of_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_json(value: Any) -> str:
    """Hex SHA-256 of a value's canonical JSON (sorted keys, no spaces)."""
    return of_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def of_tree(folder: Path) -> str:
    """Hex SHA-256 of a folder: relative names and contents of all its files, in name order."""
    files = sorted((p.relative_to(folder).as_posix(), p) for p in folder.rglob("*") if p.is_file())
    return of_json([[name, of_file(path)] for name, path in files])


@cache
def of_package() -> str:
    """Hex SHA-256 of all of `facemllm`: code and data files."""
    return of_json([[p.relative_to(PACKAGE).as_posix(), of_file(p)] for p in _sources(PACKAGE)])


@cache
def of_code(module: str) -> str:
    """Hex SHA-256 of a module and of every `facemllm` module it imports, directly or not, with their data files.

    A step's results are keyed by this, so that an edit re-runs the steps it can change and no others.
    """
    return of_json([[p.relative_to(PACKAGE.parent).as_posix(), of_file(p)] for p in sorted(code_files(module))])


def code_files(module: str) -> set[Path]:
    """The files behind a module: itself, every `facemllm` module it imports, directly or not, and their data files."""
    seen: dict[str, Path] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        path = _module_path(name)
        if path is None or name in seen:
            continue
        seen[name] = path
        todo += _imports(path)
        if name in DISCOVERED:
            todo += [f"{name}.{file.stem}" for file in path.parent.glob("*.py")]
    files = set(seen.values())
    for path in seen.values():
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


def _imports(path: Path) -> list[str]:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    package = ".".join(parts[:-1])
    names = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    parents = [".".join(name.split(".")[:n]) for name in names for n in range(1, name.count(".") + 1)]
    return names + parents
