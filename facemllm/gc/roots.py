"""What the results of a home are kept for: everything that names one, and what those were made from.

Roots: the settings of every profile with this home, MLflow's runs and versions, the decisions repository, revisions of
the data, run folders, servers, and steps at work. What cannot be read could name anything, so it is a UserError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from facemllm.core.claims import NAME, claims
from facemllm.core.step import step_key
from facemllm.core.store import Store
from facemllm.errors import UserError, one_line
from facemllm.promote import decided
from facemllm.promote.records import DIGEST, Records
from facemllm.settings import PROFILES, Settings, load, root
from facemllm.tracking.client import session, uri
from facemllm.version.repository import Repository
from facemllm.workflow.steps import steps

_HEX = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
_TELLS = ("validate", "version", "evaluate", "gate", "register")
"""Steps whose results tell of their inputs: kept with them."""
_COMPARED = "champion"  # an input that a gate only compares with


@dataclass
class Roots:
    """What is kept: `named` says of each digest who names it, as (kind, words); `work` the same of unfinished work, by
    the name of its folder. `notes` has a line for what could not be asked and need not be."""

    named: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    work: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def name(self, digests: Iterable[str], kind: str, words: str) -> None:
        """Keep these results, which something names."""
        for digest in digests:
            by = self.named.setdefault(digest, [])
            if (kind, words) not in by:
                by.append((kind, words))

    def counts(self, here: Iterable[str]) -> dict[str, int]:
        """How many of these results are kept by each kind of root, by the first that names them."""
        counted: dict[str, int] = {}
        for digest in here:
            if by := self.named.get(digest):
                counted[by[0][0]] = counted.get(by[0][0], 0) + 1
        return counted


def sharing(profile: str, overrides: Sequence[str]) -> list[Settings]:
    """The settings of a profile, then those of all others that have the same home; overrides are of all, where they
    fit."""
    first = load(profile, overrides)
    found = [first]
    for file in sorted((root() / PROFILES).glob("*.yaml")):
        if file.stem != profile:
            found.append(_fitting(file.stem, overrides))
    return [one for one in found if one.home == first.home]


def _fitting(profile: str, overrides: Sequence[str]) -> Settings:
    """A profile under those of the overrides that it has a use for: the home is among them, on a cluster."""
    try:
        return load(profile, overrides)
    except UserError:
        kept: list[str] = []
        for one in overrides:
            with suppress(UserError):
                load(profile, [*kept, one])
                kept.append(one)
        return load(profile, kept)


def roots(profiles: Sequence[Settings], records: Records) -> Roots:
    """What is kept of a home, `profiles` being the settings that have it, those that were asked for first.

    Raises UserError, in one line, where something that may name results cannot be read.
    """
    if records.damaged:
        raise UserError(f"{records.damaged[0]}; what it names is unknown: remove that file, or restore it")
    found, asked = Roots(), set()
    for claim in claims(records.home):
        found.name(claim.inputs, "step at work", str(claim))
        found.work[claim.name] = str(claim)
    for settings in profiles:
        _of_settings(found, settings, must=settings is profiles[0])
        sources: dict[Any, Callable[[Roots, Settings, Records], None]] = {
            ("mlflow", uri(settings)): _of_mlflow,
            ("decisions", str(settings.decisions), str(settings.policy_file)): _of_decisions,
            ("data", str(Repository.of(settings).path)): _of_revisions,
            ("runs", str(settings.runs)): _of_run_folders,
            ("servers",): _of_servers,
        }
        for place, read in sources.items():
            if place not in asked:
                asked.add(place)
                read(found, settings, records)
    _add_lineage(found, records)
    return found


def _of_settings(found: Roots, settings: Settings, must: bool) -> None:
    """What a run of these settings would recall, and the unfinished work that it would go on from."""
    store, outputs, words = Store(settings.home), dict[str, str](), f"profile {settings.profile}"
    try:
        for step in steps(settings).values():
            if not step.keeps or step.world or not set(step.inputs.values()) <= set(outputs):
                continue
            key = step_key(step, settings, {name: outputs[source] for name, source in step.inputs.items()})
            if record := store.recall(key):
                outputs[step.name] = str(record["output"])
                found.name([str(record["digest"])], "settings", words)
            else:
                found.work[key[:NAME]] = words
    except UserError as error:
        if must:
            raise
        found.notes.append(f"{words} cannot run here, so it keeps nothing beyond its runs: {one_line(error, 160)}")


def _of_mlflow(found: Roots, settings: Settings, records: Records) -> None:
    """Results in the tags of runs and versions that are not deleted there."""
    made = {str(record.facts["run_id"]) for record in records.all if record.facts.get("run_id")}
    if settings.tracking.uri is None and not (settings.home / "mlflow" / "mlflow.db").is_file():
        if made:
            raise UserError(
                f"results here were made in MLflow runs, and {settings.home} has no MLflow of its own: set tracking.uri"
            )
        return
    from mlflow.entities import ViewType
    from mlflow.utils import get_results_from_paginated_fn as pages

    known = set()
    with session(settings) as client:
        experiments = pages(lambda n, page: client.search_experiments(ViewType.ALL, n, page_token=page), 1000)
        ids = [one.experiment_id for one in experiments]
        every = (
            run
            for start in range(0, len(ids), 50)
            for run in pages(
                lambda n, page, some=ids[start : start + 50]: client.search_runs(
                    some, "", ViewType.ALL, n, page_token=page
                ),
                1000,
            )
        )
        for run in every:
            known.add(run.info.run_id)
            if run.info.lifecycle_stage != "deleted":
                found.name(_in_tags(run.data.tags), "MLflow run", str(run.info.run_name))
        for version in pages(lambda n, page: client.search_model_versions("", n, page_token=page), 1000):
            found.name(_in_tags(version.tags), "version", f"{version.name} {version.version}")
    if made and not made & known:
        raise UserError(
            f"MLflow at {uri(settings)} knows none of the {len(made)} runs that made these results; set tracking.uri "
            "to the server that does"
        )


def _in_tags(tags: Any) -> Iterator[str]:
    for name, value in tags.items():
        if name.startswith("facemllm."):
            yield from _HEX.findall(str(value))


def _of_decisions(found: Roots, settings: Settings, _: Records) -> None:
    """Everything in bundles, and models that statements are about, whatever was decided."""
    known = decided.decisions(settings)
    if known is None:
        if settings.promote.decisions is not None or (settings.signing / "decisions").exists():
            raise UserError(f"there are decisions at {settings.decisions}, and no policy file {settings.policy_file}")
        return
    decisions = known[0]
    if decisions.stale:
        raise UserError(decisions.stale)
    for digest in decisions.bundles():
        found.name(_HEX.findall(json.dumps(decisions.bundle(digest))), "decision", f"bundle {digest[:12]}")
    for entry in decisions.statements():
        replaced = entry.statement.replaces if entry.statement else None
        models = [entry.model, *([replaced] if replaced else [])]
        found.name(models, "decision", entry.statement.words if entry.statement else f"statement {entry.name[:12]}")


def _of_revisions(found: Roots, settings: Settings, _: Records) -> None:
    """The tables of every revision of the data."""
    repository = Repository.of(settings)
    for sha in repository.revisions():
        revision = repository.revision(sha)
        found.name([revision.faces, revision.conversations], "revision", sha[:12])


def _of_run_folders(found: Roots, settings: Settings, _: Records) -> None:
    """What the summaries of runs show, which `compare` reads."""
    for path in sorted(settings.runs.glob("*/summary.json")):
        found.name(_HEX.findall(_text(path)), "run folder", path.parent.name)


def _of_servers(found: Roots, settings: Settings, _: Records) -> None:
    """What a server serves, was started with, or would be started with again."""
    folder = settings.home / "services"
    for path in sorted([*folder.glob("*.model"), *folder.glob("*.json")]):
        found.name(_HEX.findall(_text(path)), "server", path.stem)


def _text(path: Path) -> str:
    try:
        text = path.read_text("utf-8")
        json.loads(text)
        return text
    except FileNotFoundError:  # a server that was stopped meanwhile
        return ""
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read, so what it names is unknown: {one_line(error, 120)}") from None


def _add_lineage(found: Roots, records: Records) -> None:
    """Keep what kept results were made from, and what was found out about them (evaluations, gates, checks)."""
    every = [*records.all, *(record for made in records.uses.values() for record in made)]
    made_from: dict[str, set[str]] = {}
    for record in every:
        inputs = {value for name, value in record.materials.items() if name != _COMPARED}
        made_from.setdefault(record.digest, set()).update(inputs)
    todo = list(found.named)
    while todo:
        while todo:
            digest = todo.pop()
            parents = {str(one) for one in records.manifest(digest).get("parents", ())}
            for one in made_from.get(digest, set()) | parents:
                if DIGEST.fullmatch(one):
                    todo += [one] if one not in found.named else []
                    found.name([one], "lineage", f"{digest[:12]} was made from it")
        for record in every:
            inputs = {value for name, value in record.materials.items() if name != _COMPARED}
            if record.step in _TELLS and record.digest not in found.named and inputs and inputs <= set(found.named):
                found.name([record.digest], "lineage", f"{record.step} of {sorted(inputs)[0][:12]}")
                todo.append(record.digest)
