"""The dataset ledger: what every source is, whose it is, and what may be done with it.

`ledger.yaml` beside this file has one row a source; a file of your own (`ingest.ledger`) is laid over it, row by row
and key by key, for what your signed agreements allow or forbid. A source that is not in it, is withdrawn, or is used
against its terms is refused with the row that says so. The rows are our reading of the licences, not legal advice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from facemllm.errors import UserError, one_line
from facemllm.settings import Settings, root
from facemllm.settings.mappings import read_yaml

Use = Literal["train", "evaluate", "serve", "third_party"]
USES: tuple[Use, ...] = ("train", "evaluate", "serve", "third_party")
MEANING: Mapping[Use, str] = {
    "train": "train a model on it",
    "evaluate": "measure a model on it",
    "serve": "put a model trained on it into production",
    "third_party": "send its pictures to a third party",
}
_OWN = Path(__file__).with_name("ledger.yaml")


class Entry(BaseModel):
    """A row of the ledger. `consent` says on what basis the people in the pictures are there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    name: str
    homepage: str
    licence: str
    terms: str
    consent: str
    uses: tuple[Use, ...]
    status: Literal["active", "restricted", "withdrawn"]
    citation: str


def entries(settings: Settings) -> dict[str, Entry]:
    """All rows by key, the user's laid over the project's. Raises UserError naming file, row and key that is wrong."""
    rows = _read(_OWN)
    if settings.ingest.ledger is not None:
        path = root() / settings.ingest.ledger
        for key, row in _read(path).items():
            rows[key] = {**rows.get(key, {}), **row}
        return _checked(path, rows)
    return _checked(_OWN, rows)


def require(settings: Settings, sources: Iterable[str], *uses: Use) -> None:
    """Refuse sources that are unknown or withdrawn, or whose terms do not allow every one of `uses`.

    Raises UserError with the row that says so.
    """
    rows = entries(settings)
    for key in sources:
        row = rows.get(key)
        if row is None:
            raise UserError(
                f"source '{key}' is not in the dataset ledger; write a row for it into the file that ingest.ledger "
                f"names (known: {', '.join(sorted(rows))})"
            )
        if row.status == "withdrawn":
            raise UserError(f"source '{key}' is withdrawn; ledger row: {row.name}, {row.licence}; {row.terms}")
        if missing := [use for use in uses if use not in row.uses]:
            raise UserError(
                f"the terms of source '{key}' do not allow to {MEANING[missing[0]]}; ledger row: {row.name}, "
                f"{row.licence}; {row.terms}; allowed: {', '.join(row.uses) or 'nothing'}. If an agreement of yours "
                "allows it, say so in the file that ingest.ledger names"
            )


def allowed(settings: Settings, sources: Iterable[str]) -> list[Use]:
    """What may be done with a table of these sources: the uses that all of them allow."""
    rows = entries(settings)
    kept = [rows[key].uses for key in sources if key in rows]
    return [use for use in USES if all(use in uses for uses in kept)]


def as_text(rows: Iterable[Entry]) -> str:
    """Rows for reading, one paragraph a source."""
    blocks = []
    for row in rows:
        uses = ", ".join(row.uses) or "nothing"
        lines = [f"{row.key}: {row.name} ({row.status}; allowed: {uses})"]
        lines += [
            f"    {name:<9}{getattr(row, name)}" for name in ("licence", "terms", "consent", "homepage", "citation")
        ]
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def sources_of_model(folder: Path) -> list[str]:
    """Sources that a model was trained on, as its `lineage.json` says. Raises UserError when it does not say."""
    try:
        return sorted(map(str, json.loads((folder / "lineage.json").read_text("utf-8"))["sources"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder}: lineage.json does not say which sources the model was trained on; train it again"
        ) from None


@lru_cache(maxsize=4)
def _parsed(path: Path, changed: int) -> dict[str, dict[str, Any]]:
    try:
        rows = read_yaml(path, path.name) or {}
    except (OSError, UserError) as error:
        raise UserError(f"{path}: cannot be read as a ledger: {one_line(error)}") from None
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise UserError(f"{path}: a ledger is a mapping of source keys to rows")
    return {str(key): row for key, row in rows.items()}


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        changed = path.stat().st_mtime_ns
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a ledger: {error.strerror}") from None
    return {key: dict(row) for key, row in _parsed(path, changed).items()}


def _checked(path: Path, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Entry]:
    found = {}
    for key, row in rows.items():
        try:
            found[key] = Entry.model_validate({**row, "key": key})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UserError(f"{path}: row '{key}': {where}: {first['msg']}") from None
    return found
