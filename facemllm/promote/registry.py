"""Registered models: versions in MLflow's registry whose bytes are named by a SHA-256.

A version's bytes (what `save_pretrained` wrote) lie in a LoggedModel of MLflow, beside an `MLmodel` file, which tells
MLflow what goes in and out, and is no part of them. The digest of the folder is the version's tag `facemllm.digest`:
registering the same bytes again finds the same version, and `fetch` hands out no others. Only models that passed the
gate are registered; when it later refuses the same bytes, the version is marked so.

Version tags: `facemllm.digest`, `.gate` (passed | refused), `.gate_reasons`, `.evaluation` (digest of the evaluation in
the store), `.tasks` (its headline figures), `.lineage` (digests behind the model), `.run` (the pipeline's MLflow run);
`decide` adds its own. Aliases: `candidate` is the version registered last; `champion` mirrors the newest signed release
(`releases`), and is read by nobody here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facemllm.core.files import partial_folder, settle
from facemllm.core.store import Store
from facemllm.errors import UserError
from facemllm.promote import artifacts
from facemllm.report import card as model_card
from facemllm.scoring import figures
from facemllm.settings import Settings
from facemllm.signing import manifest
from facemllm.signing.canonical import HEX, Refused, time_text
from facemllm.tracking import runs as tracking
from facemllm.tracking.client import points_of, send, session
from facemllm.version import ledger
from facemllm.version.tombstones import plain_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

CANDIDATE = "candidate"
CHAMPION = "champion"
DIGEST = "facemllm.digest"
GATE = "facemllm.gate"
LINEAGE = "facemllm.lineage"


@dataclass(frozen=True)
class Version:
    """A registered version: `digest` names its bytes, `evaluation` its evaluation in the store."""

    name: str
    version: int
    digest: str
    gate: str
    evaluation: str
    source: str
    run_id: str
    created: str
    description: str
    aliases: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)


def register(
    settings: Settings,
    model_dir: Path,
    model_digest: str,
    evaluation: Mapping[str, Any],
    evaluation_digest: str,
    gate: Mapping[str, Any],
    run_id: str | None = None,
) -> Version:
    """Register a model that passed its gate, and point `candidate` to it. The same bytes give the same version.

    `evaluation` is `metrics.json`, `gate` holds `passed` and perhaps `reasons`, `run_id` is the pipeline's MLflow run.
    What a killed call left half done is completed. Raises UserError if the gate refused, or the folder's bytes do not
    have `model_digest`.
    """
    with session(settings) as client:
        found = _of_digest(settings, client, model_digest)
        if not gate["passed"]:
            reasons = list(gate.get("reasons") or ())
            withdraw(settings, model_digest, reasons)
            why = f": {'; '.join(reasons)}" if reasons else ""
            raise UserError(f"the gate refused model {model_digest[:12]}{why}; only a model that passes is registered")
        if manifest.of(model_dir).digest != model_digest:
            raise UserError(f"{model_dir}: bytes do not match the model's digest {model_digest[:12]}; make it again")
        made = Store(settings.home).behind(model_digest)
        lineage = {step: str(record["digest"]) for step, record in made.items()}
        sources = ledger.sources_of_model(model_dir)
        tags = {
            DIGEST: model_digest,
            GATE: "passed",
            "facemllm.gate_reasons": json.dumps(list(gate.get("reasons") or ())),
            "facemllm.evaluation": evaluation_digest,
            "facemllm.tasks": json.dumps(_headline(evaluation)),
            LINEAGE: json.dumps(lineage),
            "facemllm.sources": json.dumps(sources),
            "facemllm.run": run_id or "",
        }
        if found is None:
            description = model_card.short(settings, model_digest, evaluation, sources)
            model_id = _stored(settings, client, model_dir, model_digest, run_id)
            found = _create(settings, client, model_id, tags, description)
        else:
            for name in (n for n, value in tags.items() if found.tags.get(n) != value and n != "facemllm.run"):
                client.set_model_version_tag(found.name, str(found.version), name, tags[name])
        client.set_registered_model_alias(found.name, CANDIDATE, str(found.version))
        if run_id is not None:
            cost = {step: record["cost"] for step, record in made.items() if record.get("cost")}
            text = model_card.card(settings, model_digest, evaluation, lineage, sources, cost)
            client.log_text(run_id, text, "model_card.md")
            points = points_of(figures.task_metrics(evaluation.get("tasks", {}), items=False), 0)
            send(client, run_id, points, model_id=_model_id(found))
    return find_version(settings, found.version)


def find_version(settings: Settings, version: int | str) -> Version:
    """A version by number (`3`, `v3`) or alias (`candidate`). Raises UserError naming what there is."""
    text = str(version).strip().removeprefix("@")
    number = text.removeprefix("v").removeprefix("V")
    name = settings.promote.model_name
    from mlflow.exceptions import MlflowException

    with session(settings) as client:
        try:
            if number.isascii() and number.isdigit():
                return _version(client.get_model_version(name, number))
            return _version(client.get_model_version_by_alias(name, text))
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
        known = versions(settings)
    ways = [*(str(v.version) for v in known[:8]), *sorted(alias for v in known for alias in v.aliases)]
    hint = f"there are {', '.join(ways)}" if ways else "none is registered yet; run the pipeline first"
    raise UserError(f"{name} has no version '{text}': {hint}")


def versions(settings: Settings) -> list[Version]:
    """All versions of the model, newest first."""
    with session(settings) as client:
        return sorted(_all(settings, client), key=lambda v: -v.version)


def champion(settings: Settings) -> Version | None:
    """The version that the newest signed release put into production, as its bundle names it; None before the first.

    MLflow is not asked: its alias and tags decide nothing. Raises UserError if the decisions cannot be read.
    """
    from facemllm.promote import decided, releases

    known = decided.decisions(settings)
    in_force = releases.in_force(known[0]) if known else []
    if known is None or not in_force:
        return None
    last = in_force[-1]
    bundle = known[0].bundle(last.bundle)
    model, evaluation, at = bundle["model"], str(bundle["evaluation"]["digest"]), time_text(last.issued)
    return Version(str(model["name"]), int(model["version"]), last.model, "passed", evaluation, "", "", at, "")


def of_digest(settings: Settings, digest: str) -> Version:
    """The first version with these bytes. Raises UserError where MLflow knows none."""
    with session(settings) as client:
        found = _of_digest(settings, client, digest)
    if found is None:
        raise UserError(
            f"MLflow has no version of model {digest[:12]} any more: it was deleted, or its tag {DIGEST} was changed; "
            "restore it there, or choose another version"
        )
    return found


def set_tags(settings: Settings, version: Version, tags: Mapping[str, str]) -> None:
    """Set tags of a version. Raises UserError if MLflow cannot be reached."""
    with session(settings) as client:
        for name, value in tags.items():
            client.set_model_version_tag(version.name, str(version.version), name, value)


def set_alias(settings: Settings, version: int | str, alias: str) -> Version:
    """Point an alias to a version, away from the one it pointed to. Returns the version as it is now."""
    found = find_version(settings, version)
    with session(settings) as client:
        client.set_registered_model_alias(found.name, alias, str(found.version))
    return find_version(settings, found.version)


def fetch(settings: Settings, version: int | str, out: Path) -> Path:
    """Download a version's bytes to the folder `out`, unless they are there already, and return it.

    Raises UserError, leaving nothing behind, if what the server holds is not what was registered.
    """
    found = find_version(settings, version)
    if out.is_dir() and manifest.of(out).digest == found.digest:
        return out
    partial = partial_folder(out)
    try:
        with session(settings) as client:
            folder = artifacts.download(settings, client, _model_id(found), partial)
        if manifest.of(folder).digest != found.digest:
            raise UserError(
                f"{found.name} version {found.version}: the bytes that MLflow holds are not those registered "
                f"({found.digest[:12]}); do not use them: restore MLflow's artifacts, or delete that version there and "
                "run the pipeline again"
            )
        settle(folder, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def model_dir(settings: Settings, version: Version) -> Path:
    """Folder with a registered version's bytes, checked against its digest; fetched from MLflow if not here.

    Raises Refused when the bytes are not the registered ones, or it holds what no model may.
    """
    path = settings.home / "store" / version.digest
    if not path.is_dir():
        return fetch(settings, version.version, path)
    if manifest.of(path).digest != version.digest:
        raise Refused(
            "digest",
            f"{path}: the model's bytes do not match the digest of version {version.version} "
            f"({version.digest[:12]}); remove that folder and run again to fetch the registered bytes",
        )
    return path


def withdraw(settings: Settings, digest: str, reasons: Sequence[str]) -> None:
    """Take away a registered model's standing, because its gate refused it. Nothing happens if it is not registered."""
    with session(settings) as client:
        found = _of_digest(settings, client, digest)
        if found is None:
            return
        tags = {"facemllm.gate_reasons": json.dumps(list(reasons)), GATE: "refused"}
        for name, value in tags.items():
            client.set_model_version_tag(found.name, str(found.version), name, value)
        if CANDIDATE in found.aliases:
            client.delete_registered_model_alias(found.name, CANDIDATE)


def _stored(settings: Settings, client: MlflowClient, folder: Path, digest: str, run_id: str | None) -> str:
    """Id of a LoggedModel with these bytes: one that a killed call left, if it can be completed, else a new one."""
    experiment = tracking.experiment_id(settings, client)
    used = {version.source for version in _all(settings, client)}
    for left in client.search_logged_models([experiment], f"tags.`{DIGEST}` = '{digest}'"):
        if f"models:/{left.model_id}" in used:
            continue
        if str(left.status) != "READY":
            artifacts.upload(client, left.model_id, folder)
        partial = partial_folder(settings.home / "work" / f"check-{left.model_id}")
        try:
            whole = manifest.of(artifacts.download(settings, client, left.model_id, partial)).digest == digest
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        if whole:
            client.finalize_logged_model(left.model_id, "READY")
            return str(left.model_id)
        client.delete_logged_model(left.model_id)
    name = settings.promote.model_name
    made = client.create_logged_model(experiment, name, run_id, tags={DIGEST: digest}, model_type="face-mllm")
    artifacts.upload(client, made.model_id, folder)
    client.finalize_logged_model(made.model_id, "READY")
    return str(made.model_id)


def _create(settings: Settings, client: MlflowClient, model_id: str, tags: Mapping[str, str], about: str) -> Version:
    """Make the version, with all its tags at once. Of two made for the same bytes at the same time the first stays."""
    from mlflow.exceptions import MlflowException

    name = settings.promote.model_name
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    run_id, source = tags["facemllm.run"] or None, f"models:/{model_id}"
    made = client.create_model_version(
        name, source, run_id, dict(tags), description=about, model_id=model_id, await_creation_for=0
    )
    first = _of_digest(settings, client, tags[DIGEST])
    if first is not None and first.version < int(made.version):
        client.delete_model_version(name, made.version)
        return first
    return _version(made)


def _of_digest(settings: Settings, client: MlflowClient, digest: str) -> Version | None:
    """The first version with these bytes."""
    found = [version for version in _all(settings, client) if version.digest == digest]
    return min(found, key=lambda version: version.version, default=None)


def _all(settings: Settings, client: MlflowClient) -> Iterator[Version]:
    from mlflow.utils import get_results_from_paginated_fn

    name = settings.promote.model_name
    models = client.search_registered_models(f"name = '{name}'")
    aliases: dict[int, list[str]] = {}
    for alias, number in (models[0].aliases if models else {}).items():
        aliases.setdefault(int(number), []).append(alias)

    def search(count: int, page: str | None) -> Any:
        return client.search_model_versions(f"name = '{name}'", count, page_token=page)

    for stored in get_results_from_paginated_fn(search, 1000):
        # a search leaves the aliases of its versions out
        yield _version(stored, tuple(sorted(aliases.get(int(stored.version), ()))))


def _version(stored: Any, aliases: tuple[str, ...] | None = None) -> Version:
    tags = {name: plain_line(value) for name, value in stored.tags.items()}  # whoever wrote to MLflow chose them
    return Version(
        name=stored.name,
        version=int(stored.version),
        digest=_digest(tags.get(DIGEST, "")),
        gate=tags.get(GATE, ""),
        evaluation=_digest(tags.get("facemllm.evaluation", "")),
        source=stored.source,
        run_id=stored.run_id or "",
        created=datetime.fromtimestamp(stored.creation_timestamp / 1000, UTC).isoformat(timespec="seconds"),
        description=plain_line(stored.description or ""),
        aliases=tuple(map(plain_line, sorted(stored.aliases or ()))) if aliases is None else aliases,
        tags=tags,
    )


def _digest(tag: str) -> str:
    """A digest that MLflow gives; empty for what is none, since it names a folder of the store."""
    return tag if HEX.fullmatch(tag) else ""


def _model_id(version: Version) -> str:
    """Id of the LoggedModel behind a version. Raises UserError for a version that something else registered."""
    if not version.source.startswith("models:/m-"):
        raise UserError(f"{version.name} version {version.version} was not registered by `facemllm`; register it again")
    return version.source.removeprefix("models:/")


def _headline(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("metric", "value", "low", "high", "n", "unreadable", "baselines", "higher_is_better")
    tasks = evaluation.get("tasks", {})
    return {task: {name: part[name] for name in kept if name in part} for task, part in tasks.items()}
