"""`facemllm gc`: results and unfinished work that nothing names any more leave the home.

A result stays as long as a run folder, a run or version in MLflow, a signed decision or a server names it, or something
that is named was made from it. What is young stays in any case: a run that goes on may be about to use it. Who wants
the room of a run deletes the run first, in MLflow and its folder.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from facemllm.core.files import locked, read_json
from facemllm.core.servers import deployed
from facemllm.core.store import Store
from facemllm.errors import UserError
from facemllm.settings import Settings

DAY_S = 86400.0
_DIGEST = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
_PAGE = 1000
PLACES = {"result": "store", "work": "work"}
"""Where under the home each kind of folder lies."""


@dataclass(frozen=True)
class Unnamed:
    """A folder that nothing names: the `kind` (result or work), its digest or key, the step, its size and age."""

    kind: str
    name: str
    step: str
    bytes: int
    days: float


def named(settings: Settings) -> set[str]:
    """Digests that runs, MLflow, signed decisions and servers name.

    Raises UserError where MLflow or the decisions cannot be read: what they name would count as rubbish.
    """
    from facemllm.promote import decided

    texts = [file.read_text("utf-8") for file in sorted(settings.runs.glob("*/summary.json"))]
    texts += _in_mlflow(settings)
    if known := decided.decisions(settings):
        decisions = known[0]
        texts += [entry.model for entry in decisions.statements()]
        texts += [json.dumps(decisions.bundle(digest)) for digest in decisions.bundles()]
    texts += [one.digest for stage in ("staging", "production") if (one := deployed(settings, stage))]
    return {digest for text in texts for digest in _DIGEST.findall(text)}


def _in_mlflow(settings: Settings) -> Iterator[str]:
    """The tags of all runs and model versions: the inputs and outputs of steps, models and their evaluations."""
    from mlflow.utils import get_results_from_paginated_fn

    from facemllm.tracking.client import session

    with session(settings) as client:

        def experiments(count: int, page: str | None) -> object:
            return client.search_experiments(max_results=count, page_token=page)

        ids = [one.experiment_id for one in get_results_from_paginated_fn(experiments, _PAGE)]

        def runs(count: int, page: str | None) -> object:
            return client.search_runs(ids, max_results=count, page_token=page)

        def versions(count: int, page: str | None) -> object:
            return client.search_model_versions(max_results=count, page_token=page)

        for run in get_results_from_paginated_fn(runs, _PAGE):
            yield " ".join(run.data.tags.values())
        for version in get_results_from_paginated_fn(versions, _PAGE):
            yield " ".join(version.tags.values())


def behind(store: Store, digests: set[str]) -> set[str]:
    """These digests, and those of everything that they were made from, as far as it is remembered."""
    records, found, todo = store.records(), set(), list(digests)
    while todo:
        if (digest := todo.pop()) not in found:
            found.add(digest)
            todo += _DIGEST.findall(json.dumps(records.get(digest, {}).get("inputs", {})))
    return found


def unnamed(settings: Settings, kept: set[str], days: float) -> list[Unnamed]:
    """Results that are not kept, and unfinished work that nobody is at, both older than so many days; the largest
    first. Nothing is written."""
    store, found = Store(settings.home), []
    keys = _keys(store)
    for kind, place in PLACES.items():
        for folder in sorted(path for path in (settings.home / place).glob("*") if path.is_dir()):
            age = _age(folder, keys.get(folder.name, ()))
            if age < days or folder.name in kept or _held(store, folder.name):
                continue
            size = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())
            step = next((str(read_json(key).get("step", "")) for key in keys.get(folder.name, ())), "")
            found.append(Unnamed(kind, folder.name, step, size, age))
    return sorted(found, key=lambda one: (-one.bytes, one.name))


def remove(settings: Settings, found: list[Unnamed], days: float) -> int:
    """Remove what `unnamed` found, unless it was used or begun again meanwhile; the bytes that are free now.

    The records of a result go before it, so that no run recalls half of one.
    """
    store, freed = Store(settings.home), 0
    for one in found:
        folder = settings.home / PLACES[one.kind] / one.name
        with suppress(UserError), locked(store.lock(one.name), "a run is at it"):
            keys = _keys(store).get(one.name, []) if one.kind == "result" else []
            if not folder.is_dir() or _age(folder, keys) < days:
                continue
            for key in keys:
                key.unlink(missing_ok=True)
            gone = settings.home / "work" / f"{one.name}.gone"
            gone.parent.mkdir(exist_ok=True)
            folder.rename(gone)
            shutil.rmtree(gone)
            freed += one.bytes
    return freed


def _held(store: Store, name: str) -> bool:
    """Whether a run is at the work of this key."""
    if not store.lock(name).exists():
        return False
    try:
        with locked(store.lock(name), "a run is at it"):
            return False
    except UserError:
        return True


def _keys(store: Store) -> dict[str, list[Path]]:
    """Files of records by the digest that they remember."""
    found: dict[str, list[Path]] = {}
    for file in sorted((store.home / "keys").glob("*.json")):
        found.setdefault(str(read_json(file).get("digest", "")), []).append(file)
    return found


def _age(folder: Path, keys: Iterable[Path]) -> float:
    """Days since anything in a folder was written, or a record of it was made or recalled."""
    newest = max(path.lstat().st_mtime for path in (folder, *folder.rglob("*"), *keys))
    return (time.time() - newest) / DAY_S


def render(found: list[Unnamed], facts: Mapping[str, object]) -> str:
    """What there is, a line each, and what became of it."""
    lines = [
        f"{one.kind:<8}{one.name[:12]:<14}{one.step:<14}{one.days:>6.0f} days  {_size(one.bytes)}" for one in found
    ]
    total = _size(sum(one.bytes for one in found))
    if not found:
        return "everything here is named by something, or young"
    freed = f"removed, {_size(int(str(facts['freed'])))} are free now"
    done = freed if facts["removed"] else "nothing was removed; --yes removes them"
    return "\n".join([*lines, f"{len(found)} folders, {total}; {done}"])


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
