"""Which models have seen rows that are forgotten, what was decided about them, and where they serve.

The chain is walked over what the store remembers of each step and what model folders say of themselves. A model that
was only measured on a picture has not learnt from it, and is told apart from one that was trained on it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from facemllm.core.files import read_json
from facemllm.errors import UserError
from facemllm.settings import Settings

LINEAGE = "lineage.json"


def affected(settings: Settings, tables: Mapping[str, set[str]]) -> list[dict[str, Any]]:
    """Models made from, or measured on, the tables; `tables` maps a digest to the splits of the rows in question.

    A dictionary a model: `digest`, `stage`, `saw` ("training", or "evaluation" when it was only measured on the rows).
    """
    made = list(_makings(settings))
    models: dict[str, dict[str, Any]] = {}
    grown = True
    while grown:
        grown = False
        for digest, stage, inputs in made:
            taught = "train" in tables.get(inputs.get("conversations", ""), ())
            if digest not in models and (taught or inputs.get("model") in models):
                models[digest] = {"digest": digest, "stage": stage, "saw": "training"}
                grown = True
    for record in _records(settings):
        inputs = record.get("inputs") or {}
        model = inputs.get("model", "")
        if record.get("step") == "evaluate" and inputs.get("conversations") in tables and model not in models:
            stage = next((stage for digest, stage, _ in made if digest == model), "")
            models[model] = {"digest": model, "stage": stage, "saw": "evaluation"}
    return sorted(models.values(), key=lambda model: (model["saw"] == "evaluation", model["stage"], model["digest"]))


def registered(settings: Settings, models: list[dict[str, Any]], tables: Mapping[str, set[str]]) -> dict[str, Any]:
    """Versions in the registry that are such models, with decision, aliases and where they serve.

    `asked` is false when MLflow is away; then `versions` are those that this home remembers, with no decision.
    """
    from facemllm.promote import decide, decided, registry

    saw = {model["digest"]: model["saw"] for model in models}
    taught = {digest for digest, splits in tables.items() if "train" in splits}
    try:
        known, decisions = registry.versions(settings), decided.decisions(settings)
    except UserError:
        return {"asked": False, "versions": _remembered(settings, saw)}
    found = []
    for version in reversed(known):
        behind = set(json.loads(version.tags.get("facemllm.lineage") or "{}").values())
        how = saw.get(version.digest) or ("training" if behind & taught else None)
        if how is None:
            continue
        standing = None
        with suppress(UserError):  # MLflow and the decisions disagree about it: it counts as pending
            standing = decide.about(*decisions, version) if decisions else None
        entry = {"name": version.name, "version": version.version, "digest": version.digest, "saw": how}
        said = standing and (standing.against or next(reversed(standing.approvals), None))
        entry |= {"decision": standing.state if standing else "pending"}
        entry |= {"by": said and said.person, "at": said and said.issued.isoformat(timespec="seconds")}
        found.append({**entry, "aliases": list(version.aliases), "serves": _serving(settings, version.digest)})
    return {"asked": True, "versions": found}


def _remembered(settings: Settings, saw: Mapping[str, str]) -> list[dict[str, Any]]:
    found = []
    for record in _records(settings):
        digest = str(record.get("model_digest"))
        if record.get("step") == "register" and digest in saw:
            entry = {"name": record.get("name"), "version": record.get("version"), "digest": digest, "saw": saw[digest]}
            entry |= {"decision": "unknown", "by": None, "at": None, "aliases": []}
            found.append({**entry, "serves": _serving(settings, digest)})
    return sorted(found, key=lambda entry: str(entry["version"]))


def _serving(settings: Settings, digest: str) -> list[str]:
    from facemllm.core.servers import deployed

    stages = {stage: deployed(settings, stage) for stage in ("staging", "production")}
    return [stage for stage, model in stages.items() if model is not None and model.digest == digest]


def _makings(settings: Settings) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """Digest, stage and inputs of every model that the store remembers or holds."""
    for record in _records(settings):
        if record.get("step") in settings.stages():
            yield str(record["digest"]), str(record["step"]), record.get("inputs") or {}
    for path in sorted((settings.home / "store").glob(f"*/{LINEAGE}")):
        lineage = read_json(path)
        yield path.parent.name, str(lineage.get("stage", "")), lineage.get("inputs") or {}


def _records(settings: Settings) -> Iterator[dict[str, Any]]:
    for path in sorted((settings.home / "keys").glob("*.json")):
        if "digest" in (record := read_json(path)):
            yield record
