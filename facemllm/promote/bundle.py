"""What a decision stands on: `bundle.json`, with the model card, the bill of materials and sample faces beside it.

Nothing in it is typed by hand, and there is no time in it: the same facts give the same bytes. The digest of
`bundle.json`, which holds those of the other files, is what people sign.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from facemllm.core import cost, digests
from facemllm.core.files import read_json
from facemllm.core.store import Store
from facemllm.promote import gates, samples
from facemllm.promote.evidence import verified
from facemllm.promote.registry import Version, find_version
from facemllm.promote.registry import champion as registered_champion
from facemllm.promote.sbom import sbom
from facemllm.report import card as model_card
from facemllm.scoring import figures
from facemllm.scoring.metrics import CLOSED_MEAN
from facemllm.settings import Settings, plain
from facemllm.signing.canonical import canonical as canonical_json
from facemllm.version import ledger

SCHEMA = 1
BUNDLE, CARD, SBOM = "bundle.json", "card.md", "sbom.json"
_LARGEST = 2**53 - 1
_FIGURE = ("metric", "unit", "value", "low", "high", "n", "unreadable", "higher_is_better", "baselines")
_ELSEWHERE = {"profile", "storage", "tracking", "services", "cluster"}
"""Settings that say where a run keeps its things and decide nothing of the model."""


@dataclass(frozen=True)
class Bundle:
    """The files of a bundle by name (`bundle.json`, `card.md`, `sbom.json`, `samples/...`)."""

    files: Mapping[str, bytes]
    facts: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of `bundle.json`: what is signed."""
        return digests.of_bytes(self.files[BUNDLE])


def collect(settings: Settings, version: Version | int | str, champion: Version | None = None) -> Bundle:
    """The bundle of a registered version, against `champion`, the version in production (None: the registry's).

    The gate judges again, from bytes whose digests are taken anew. Raises UserError when the version is unknown or
    what it stands on is gone or was changed.
    """
    from facemllm.promote.registry import model_dir

    found = version if isinstance(version, Version) else find_version(settings, version)
    rival = champion or registered_champion(settings)
    if not (settings.home / "store" / found.digest).is_dir():
        model_dir(settings, found)
    return of_version(settings, found, rival if rival is not None and rival.digest != found.digest else None)


def of_version(settings: Settings, version: Version, champion: Version | None) -> Bundle:
    """`collect`, of versions that are known and a model that lies in the store."""
    store = Store(settings.home)

    def answered(metrics: Mapping[str, Any]) -> Path | None:
        return None if champion is None else evaluation_of(store, champion.digest, metrics["conversations_digest"])

    judged = gates.verdict(
        settings,
        version.evaluation,
        model=version.digest,
        champion=champion.digest if champion else "",
        answered=answered,
    )
    metrics, behind = judged.metrics, store.behind(version.digest)
    made = behind.get(str(store.records().get(version.digest, {}).get("step")), {})
    lineage = {step: str(record["digest"]) for step, record in behind.items()}
    lineage |= {"evaluate": version.evaluation, "conversations": metrics["conversations_digest"]}
    rows = ledger.entries(settings)
    sources = [rows[key] for key in judged.origin.sources if key in rows]
    costs = {step: cost.priced(body, settings.cost.price_per_hour) for step, body in judged.origin.costs.items()}
    conversations, folder = store.path(metrics["conversations_digest"]), answered(metrics)
    faces, pictures = _samples(settings, conversations, judged, version.evaluation, folder)
    decision, commit = judged.decision, str(made.get("commit") or "")
    files = {name: dict(listed) for name, listed in judged.files.items()}
    place = store.path(version.digest)
    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "model": {
            "name": version.name,
            "version": version.version,
            "digest": version.digest,
            "files": files["model"],
            "bytes": sum((place / name).stat().st_size for name in files["model"]),
        },
        "evaluation": {
            "digest": version.evaluation,
            "files": files["evaluation"],
            "split": metrics["split"],
            "people": metrics["n_subjects"],
            "pictures": metrics["n_images"],
        },
        "gate": {"passed": decision.passed, "reasons": decision.reasons, "checks": decision.checks},
        "loosened": decision.loosened,
        "gaps": [
            {name: gap.get(name) for name in ("task", "kind", "a", "b", "value", "low", "high", "p_holm")}
            for gap in figures.shown_gaps(metrics)
        ],
        "tasks": _tasks(metrics, judged.champion),
        "data": {
            "faces": lineage.get("ingest"),
            "conversations": metrics["conversations_digest"],
            "revision": _revision(store, metrics["conversations_digest"]),
        },
        "sources": [
            {
                "key": row.key,
                "name": row.name,
                "licence": row.licence,
                "uses": list(row.uses),
                "status": row.status,
                "terms": row.terms,
                "consent": row.consent,
            }
            for row in sources
        ],
        "code": {
            "commit": commit.partition("+")[0] or None,
            "dirty": commit.endswith("+changes"),
            "package": f"facemllm {metadata.version('facemllm')}",
            "steps": {step: record["code"] for step, record in behind.items() if record.get("code")},
        },
        "image": settings.cluster.image,
        "settings": {"profile": settings.profile, "changed": changed(settings)},
        "cost": {"steps": costs, **_total(costs)},
        "champion": None if champion is None else _champion(champion, decision, folder),
        "samples": faces,
        "lineage": lineage,
    }
    card = model_card.card(
        settings,
        version.digest,
        metrics,
        lineage,
        judged.origin.sources,
        judged.origin.costs,
        decision={**facts["gate"], "loosened": decision.loosened, "champion": facts["champion"]},
        code=facts["code"],
    ).encode()
    bill = sbom(
        name=version.name,
        version=str(version.version),
        digest=version.digest,
        files=files["model"],
        sources=sources,
        tables={name: digest for name, digest in facts["data"].items() if digest and name != "revision"},
        metrics=metrics,
        origin=settings.model.origin,
        architecture=next(iter(read_json(place / "config.json").get("architectures") or ()), None),
    )
    beside = {CARD: card, SBOM: canonical(bill), **pictures}
    facts |= {"card": digests.of_bytes(card), "sbom": digests.of_bytes(beside[SBOM])}
    return Bundle({BUNDLE: canonical(facts), **beside}, plainly(facts))


def canonical(value: Any) -> bytes:
    """Canonical JSON (RFC 8785) of `plainly` the value."""
    return canonical_json(plainly(value))


def plainly(value: Any) -> Any:
    """A value as JSON has it. Whole numbers beyond 2**53, which not every reader keeps, become text."""
    if isinstance(value, Mapping):
        return {str(key): plainly(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plainly(each) for each in value]
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    return str(int(value)) if whole and abs(value) > _LARGEST else value


def changed(settings: Settings) -> dict[str, dict[str, Any]]:
    """Settings that decide something of the result and are not those of `params.yaml`, by name: `value`, `default`."""
    usual, ours = (one.model_dump(exclude=_ELSEWHERE, mode="json") for one in (plain(), settings))
    return dict(_differing(usual, ours, ""))


def _differing(usual: Mapping[str, Any], ours: Mapping[str, Any], above: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in dict.fromkeys([*usual, *ours]):
        default, value = usual.get(name), ours.get(name)
        if isinstance(default, Mapping) and isinstance(value, Mapping):
            yield from _differing(default, value, f"{above}{name}.")
        elif default != value:
            yield f"{above}{name}", {"value": value, "default": default}


def evaluation_of(store: Store, model: str, conversations: str) -> Path | None:
    """Folder of the newest evaluation of a model on these conversations that the store remembers and still holds."""
    wanted = {"model": model, "conversations": conversations}
    for digest, record in reversed(store.records().items()):
        if record.get("step") == "evaluate" and record.get("inputs") == wanted:
            folder = store.home / "store" / digest
            if folder.is_dir():
                return folder
    return None


def _samples(
    settings: Settings, conversations: Path, judged: gates.Verdict, evaluation: str, champion: Path | None
) -> tuple[dict[str, Any], dict[str, bytes]]:
    split, place = str(judged.metrics["split"]), Store(settings.home).path(evaluation)
    with verified(place, evaluation) as mine:
        if champion is None:
            return samples.collect(settings, conversations, split, mine.path, None)
        with verified(champion, champion.name) as theirs:
            return samples.collect(settings, conversations, split, mine.path, theirs.path)


def _tasks(metrics: Mapping[str, Any], champion: Mapping[str, Any] | None) -> dict[str, Any]:
    found = {}
    heads = {**metrics["tasks"], **({CLOSED_MEAN: metrics[CLOSED_MEAN]} if metrics.get(CLOSED_MEAN) else {})}
    for name, entry in heads.items():
        rival = None
        if champion is not None:
            other = champion.get(name) if name == CLOSED_MEAN else champion["tasks"].get(name)
            rival = {end: (other or {}).get(end) for end in ("value", "low", "high")}
        found[name] = {field: entry.get(field) for field in _FIGURE} | {"champion": rival}
    return found


def _champion(champion: Version, decision: gates.Decision, folder: Path | None) -> dict[str, Any]:
    """The version in production, and every task whose figure is worse than its own, shown or not."""
    worse = [
        {"task": each["key"], **{name: each[name] for name in ("value", "low", "high", "limit", "passed")}}
        for each in decision.checks
        if each["kind"] == "champion" and (each["value"] or 0) > 0
    ]
    evaluation = folder.name if folder is not None else None
    facts = {"version": champion.version, "digest": champion.digest, "evaluation": evaluation}
    return {**facts, "worse": sorted(worse, key=lambda each: str(each["task"]))}


def _revision(store: Store, conversations: str) -> str | None:
    """The data repository's revision that holds these conversations."""
    for record in store.records().values():
        if record.get("step") == "version" and record.get("inputs", {}).get("conversations") == conversations:
            return str(record.get("output"))
    return None


def _total(costs: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Seconds and price of all steps together; None where a step's is unknown."""
    found = {}
    for name in ("seconds", "price"):
        each = [body.get(name) for body in costs.values()]
        known = [value for value in each if value is not None]
        found[name] = round(sum(known), 4) if each and len(known) == len(each) else None
    return found
