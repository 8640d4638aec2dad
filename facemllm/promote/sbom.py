"""The bill of materials of a model as CycloneDX 1.6 JSON: its files, its data with their licences, its figures
(`modelCard`), and the Python packages that run it. It follows from its arguments and what is installed: no time in it.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from facemllm.core import digests
from facemllm.version.ledger import Entry

SPEC = "http://cyclonedx.org/schema/bom-1.6.schema.json"
PACKAGE = "facemllm"
_MODEL = "model"


def sbom(
    *,
    name: str,
    version: str,
    digest: str,
    files: Mapping[str, str],
    sources: Sequence[Entry],
    tables: Mapping[str, str],
    metrics: Mapping[str, Any],
    origin: str,
    architecture: str | None = None,
    packages: Mapping[str, tuple[str, str | None]] | None = None,
) -> dict[str, Any]:
    """The document. `digest` and `files` (SHA-256 by name) are the model's, `tables` the digests of what it was trained
    and measured on, `metrics` its metrics.json, `origin` what training started from, in words, `architecture`
    transformers' class of the model, None if unknown; `packages` has version and licence by name (None: those installed
    that the package needs)."""
    used = installed() if packages is None else packages
    libraries = [_library(*entry) for entry in sorted(used.items())]
    data = [_source(entry) for entry in sorted(sources, key=lambda entry: entry.key)]
    data += [_table(role, of) for role, of in sorted(tables.items())]
    parts = [
        {"type": "file", "bom-ref": f"file:{path}", "name": path, "hashes": [{"alg": "SHA-256", "content": sha}]}
        for path, sha in sorted(files.items())
    ]
    refs = [each["bom-ref"] for each in data]
    model = {
        "type": "machine-learning-model",
        "bom-ref": _MODEL,
        "name": name,
        "version": version,
        "description": f"Multimodal language model that answers questions about a face; trained from {origin}",
        "properties": [{"name": "facemllm:digest", "value": digest}],
        "components": parts,
        "modelCard": _model_card(metrics, refs, architecture),
    }
    body: dict[str, Any] = {
        "$schema": SPEC,
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": model},
        "components": [*data, *libraries],
        "dependencies": [{"ref": _MODEL, "dependsOn": sorted({*refs, *(each["bom-ref"] for each in libraries)})}],
    }
    return {**body, "serialNumber": f"urn:uuid:{uuid.UUID(digests.of_json(body)[:32], version=4)}"}


def installed(root: str = PACKAGE) -> dict[str, tuple[str, str | None]]:
    """Version and licence of every installed package that `root` needs, directly or not; itself included."""
    found: dict[str, tuple[str, str | None]] = {}
    todo: list[tuple[str, frozenset[str]]] = [(root, frozenset())]
    seen = set(todo)
    while todo:
        name, extras = todo.pop()
        try:
            about = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        found[canonicalize_name(name)] = about.version, _licence(about)
        for needed in _needed(about, extras):
            if needed not in seen:
                seen.add(needed)
                todo.append(needed)
    return found


def _needed(about: metadata.Distribution, extras: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    for line in about.requires or ():
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*extras, "")):
            yield canonicalize_name(requirement.name), frozenset(requirement.extras)


def _licence(about: metadata.Distribution) -> str | None:
    """As the package states it, in one line; a text of a licence itself is left out."""
    stated = about.metadata.json.get("license_expression") or about.metadata.json.get("license") or ""
    if isinstance(stated, str) and stated and len(stated) <= 100 and "\n" not in stated.strip():
        return stated.strip()
    kinds = [line.rpartition(" :: ")[2] for line in about.metadata.get_all("Classifier") or () if "License ::" in line]
    return "; ".join(kinds) or None


def _library(name: str, about: tuple[str, str | None]) -> dict[str, Any]:
    version, licence = about
    place = f"pkg:pypi/{name}@{version.replace('+', '%2B')}"
    licences = {"licenses": [{"license": {"name": licence}}]} if licence else {}
    return {"type": "library", "bom-ref": place, "name": name, "version": version, "purl": place, **licences}


def _source(entry: Entry) -> dict[str, Any]:
    allowed = ", ".join(entry.uses) or "nothing"
    return {
        "type": "data",
        "bom-ref": f"source:{entry.key}",
        "name": entry.name,
        "licenses": [{"license": {"name": entry.licence}}],
        "data": [{"type": "dataset", "name": entry.key, "description": f"{entry.terms}; people: {entry.consent}"}],
        "properties": [
            {"name": "facemllm:allowed", "value": allowed},
            {"name": "facemllm:status", "value": entry.status},
        ],
    }


def _table(role: str, digest: str) -> dict[str, Any]:
    return {
        "type": "data",
        "bom-ref": f"table:{role}",
        "name": role,
        "version": digest,
        "data": [{"type": "dataset", "name": role}],
    }


def _model_card(metrics: Mapping[str, Any], refs: Sequence[str], architecture: str | None) -> dict[str, Any]:
    figures = {**metrics["tasks"], **({"closed_mean": metrics["closed_mean"]} if metrics.get("closed_mean") else {})}
    measured = []
    for task, head in figures.items():
        for item, figure in {"": head, **(head.get("items") or {})}.items():
            if figure.get("value") is not None:
                entry = {"type": figure.get("metric") or head.get("metric") or "", "value": repr(figure["value"])}
                entry["slice"] = f"{metrics['split']}: {task}{f'.{item}' if item else ''}"
                if figure.get("low") is not None and figure.get("high") is not None:
                    ends = {"lowerBound": repr(figure["low"]), "upperBound": repr(figure["high"])}
                    entry |= {"confidenceInterval": ends}
                measured.append(entry)
    return {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": "image-text-to-text",
            "architectureFamily": "transformer",
            **({"modelArchitecture": architecture} if architecture else {}),
            "datasets": [{"ref": ref} for ref in refs],
            "inputs": [{"format": "image"}, {"format": "text"}],
            "outputs": [{"format": "text"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": measured},
        "considerations": {
            "useCases": ["descriptions and visible attributes of a face, to be checked by a person"],
            "technicalLimitations": ["one face an image; small, turned, covered or badly lit faces do worse"],
            "ethicalConsiderations": [
                {
                    "name": "identifying or tracking people, decisions about people",
                    "mitigationStrategy": "not a use of this model; the pipeline has no task that identifies anyone",
                }
            ],
            "fairnessAssessments": _groups(metrics),
        },
    }


def _groups(metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    """The largest gap of every task and kind of group, as measured."""
    found = []
    for task, kinds in (metrics.get("fairness") or {}).items():
        for kind, entry in kinds.items():
            if gap := entry.get("largest"):
                harm = f"{task} differs by {gap['value']!r} between {gap['a']} and {gap['b']}, p {gap['p_holm']!r}"
                found.append({"groupAtRisk": f"{kind}: {gap['a']}, {gap['b']}", "harms": harm})
    return found
