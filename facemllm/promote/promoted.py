"""Versions, bundles and signed statements as nodes of a lineage: what is between a model and production."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from facemllm.core.servers import deployed
from facemllm.errors import UserError, one_line
from facemllm.promote import decided, registry
from facemllm.promote.graph import Node, Step, time
from facemllm.promote.records import DIGEST, Records
from facemllm.settings import Settings
from facemllm.signing.decisions import Decisions, Entry
from facemllm.signing.policy import Policy
from facemllm.signing.standing import standing

AWAY = "MLflow is away: aliases, and versions that this home has not registered, are left out"
RELEASES = ("release", "rollback")


@dataclass
class Known:
    """A version: its model, the evaluations it was registered on, and what MLflow says of it."""

    name: str
    version: str
    model: str
    evaluations: dict[str, None] = field(default_factory=dict)
    created: str | None = None
    aliases: tuple[str, ...] = ()
    gate: str = ""
    behind: Mapping[str, str] = field(default_factory=dict)


class Promoted:
    """What records, MLflow and the decisions repository know of versions. `notes` has a line for each that is away."""

    def __init__(self, settings: Settings, records: Records) -> None:
        self.settings, self.records = settings, records
        self.notes: list[str] = []
        self.versions: dict[str, Known] = {}
        self.by_model: dict[str, list[str]] = {}
        self.statements: dict[str, Entry] = {}
        self.of_model: dict[str, list[str]] = {}
        self.of_bundle: dict[str, dict[str, None]] = {}
        self._repository: tuple[Decisions, Policy] | None = None
        self.called: dict[str, str] = {}
        """Steps of results that this home does not remember, by digest."""
        self._read_decisions()
        self._read_versions()
        self.called |= {one: "evaluate" for known in self.versions.values() for one in known.evaluations}
        self._serves: dict[str, list[str]] = {}
        for stage in ("staging", "production"):
            if (model := deployed(settings, stage)) is not None:
                self._serves.setdefault(model.digest, []).append(stage)

    def __contains__(self, id: str) -> bool:
        return id in self.versions or id in self.statements or id in self.of_bundle

    def find(self, text: str) -> str | None:
        """The version of a number (`3`, `v3`) or alias."""
        name = text.removeprefix("@")
        number = name[1:] if name[:1] in "vV" else name
        for id, known in self.versions.items():
            if known.version == number or name in known.aliases:
                return id
        return None

    def describe(self, id: str) -> Node:
        """A version, statement or bundle as a node."""
        if known := self.versions.get(id):
            return self._version(id, known)
        if entry := self.statements.get(id):
            return _statement(entry)
        bundle = self._bundle(id)
        text = "what the decision stands on" if bundle else "not in the decisions repository"
        code = bundle.get("code") or {}
        facts = {"commit": code.get("commit"), "revision": (bundle.get("data") or {}).get("revision")}
        return Node(id, "bundle", id[:12], None, text, {k: v for k, v in facts.items() if v})

    def materials(self, id: str) -> Iterator[Step]:
        """What a version, statement or bundle stands on."""
        if known := self.versions.get(id):
            for one in self.of_model.get(known.model, ()):
                if (decision := _decision(self.statements[one])) not in RELEASES:
                    yield decision, one
            yield from (("gate", one) for evaluation in known.evaluations for one in self._gates(evaluation)[-1:])
            yield from (("evaluation", evaluation) for evaluation in known.evaluations)
            yield "model", known.model
            yield from self._elsewhere(known.behind)
        elif entry := self.statements.get(id):
            if entry.statement:
                yield "bundle", entry.statement.bundle
        else:
            yield from self._bundle_materials(id)

    def products(self, id: str) -> Iterator[Step]:
        """What stands on a model, evaluation, gate, bundle, statement or version."""
        if id in self.versions:
            yield from self.releases(id)
        elif entry := self.statements.get(id):
            if _decision(entry) not in RELEASES:
                yield from (("decided", one) for one in self.by_model.get(entry.model, ()))
        elif id in self.of_bundle:
            for one in self.of_bundle[id]:
                if _decision(self.statements[one]) not in RELEASES or not self.by_model.get(self.statements[one].model):
                    yield "bundle", one
        else:
            record = self.records.newest.get(id)
            evaluation = record.inputs.get("evaluation", "") if record and record.step == "gate" else id
            model = record.inputs.get("model", "") if record and record.step == "evaluate" else id
            for bundle in {
                s.bundle: None for one in self.of_model.get(model, ()) if (s := self.statements[one].statement)
            }:
                if id in (step[1] for step in self._bundle_materials(bundle)):
                    yield "bundle", bundle
            for one, known in self.versions.items():
                if id == known.model or evaluation in known.evaluations:
                    yield "registered", one

    def releases(self, id: str) -> Iterator[Step]:
        """Releases and rollbacks of a version."""
        if known := self.versions.get(id):
            for one in self.of_model.get(known.model, ()):
                if (decision := _decision(self.statements[one])) in RELEASES:
                    yield decision, one

    def _version(self, id: str, known: Known) -> Node:
        serves = self._serves.get(known.model, [])
        facts: dict[str, Any] = {"digest": known.model, "aliases": list(known.aliases), "gate": known.gate}
        details = [", ".join(known.aliases)]
        details += [f"serves in {' and '.join(serves)}"] if serves else []
        bundles = [s.bundle for one in self.of_model.get(known.model, ()) if (s := self.statements[one].statement)]
        if self._repository is not None and bundles:
            try:
                found = standing(*self._repository, bundles[-1])
                until = time(found.expires)
                details.insert(0, found.state + (f" until {until[:10]}" if until and found.state == "approved" else ""))
                facts |= {"state": found.state, "expires": until, "approved_by": [s.person for s in found.approvals]}
            except UserError as error:
                details.insert(0, one_line(error, 120))
        else:
            details.insert(0, "pending")
        facts["serves"] = serves
        text = "; ".join(part for part in details if part)
        return Node(id, "version", f"{known.name} {known.version}", known.created, text, facts)

    def _bundle_materials(self, digest: str) -> Iterator[Step]:
        bundle = self._bundle(digest)
        for name in ("evaluation", "model"):
            found = bundle.get(name)
            if isinstance(found, dict) and DIGEST.fullmatch(str(found.get("digest"))):
                yield name, str(found["digest"])
        elsewhere = list(self._elsewhere(bundle.get("lineage")))
        yield from elsewhere
        if elsewhere:  # this home has not made the model: what was signed says where it came from
            sources, code = bundle.get("sources"), bundle.get("code")
            named = [one.get("key") for one in sources if isinstance(one, dict)] if isinstance(sources, list) else []
            yield from (("source", f"source:{key}") for key in named if isinstance(key, str))
            if isinstance(code, dict) and isinstance(code.get("commit"), str):
                yield "code", f"commit:{code['commit']}"

    def _elsewhere(self, behind: Any) -> Iterator[Step]:
        """Of the results behind a model, as they were known elsewhere, those that this home does not know."""
        for step, digest in behind.items() if isinstance(behind, Mapping) else ():
            if isinstance(digest, str) and DIGEST.fullmatch(digest) and digest not in self.records.newest:
                self.called.setdefault(digest, str(step))
                yield str(step), digest

    def _gates(self, evaluation: str) -> list[str]:
        return [record.digest for record in self.records.uses.get(evaluation, ()) if record.step == "gate"]

    def _read_versions(self) -> None:
        """Of what names a version the signed bundles come first, MLflow, which anybody may have written to, last."""
        for digest in self.of_bundle:
            model = self._bundle(digest).get("model")
            if isinstance(model, dict):
                known = self._add(Known(str(model.get("name")), str(model.get("version")), str(model.get("digest"))))
                known.evaluations |= {e: None for name, e in self._bundle_materials(digest) if name == "evaluation"}
        for record in self.records.all:
            model, evaluation = record.inputs.get("model", ""), record.inputs.get("evaluation", "")
            if record.step == "register" and DIGEST.fullmatch(model):
                name = str(record.facts.get("name") or self.settings.promote.model_name)
                known = self._add(Known(name, str(record.facts.get("version")), model))
                known.created = known.created or time(record.at)
                known.evaluations |= {evaluation: None} if DIGEST.fullmatch(evaluation) else {}
        try:
            listed = registry.versions(self.settings)
        except UserError:
            self.notes.append(AWAY)
            return
        for version in listed:
            known = self._add(Known(version.name, str(version.version), version.digest))
            known.created, known.gate, known.aliases = version.created, version.gate, version.aliases
            if known.model != version.digest:
                said = f"{version.name} {version.version} is {version.digest[:12] or 'nothing'}"
                self.notes.append(f"MLflow says that {said}; it was {known.model[:12]} when it was registered")
                continue
            known.evaluations |= {version.evaluation: None} if DIGEST.fullmatch(version.evaluation) else {}
            known.behind = _mapping(version.tags.get(registry.LINEAGE))

    def _add(self, known: Known) -> Known:
        id = f"{known.name}/{known.version}"
        found = self.versions.setdefault(id, known)
        if id not in self.by_model.setdefault(found.model, []):
            self.by_model[found.model].append(id)
        return found

    def _read_decisions(self) -> None:
        try:
            self._repository = decided.decisions(self.settings)
            entries: list[Entry] = self._repository[0].statements() if self._repository else []
        except UserError as error:
            self.notes.append(f"decisions are left out: {one_line(error)}")
            return
        for entry in entries:
            self.statements[entry.name] = entry
            self.of_model.setdefault(entry.model, []).append(entry.name)
            if entry.statement:
                self.of_bundle.setdefault(entry.statement.bundle, {})[entry.name] = None

    def _bundle(self, digest: str) -> dict[str, Any]:
        return self._bundles(digest)

    @cache  # noqa: B019
    def _bundles(self, digest: str) -> dict[str, Any]:
        if self._repository is None:
            return {}
        try:
            return self._repository[0].bundle(digest)
        except UserError:
            return {}


def _decision(entry: Entry) -> str:
    return entry.statement.decision if entry.statement else "refused"


def _statement(entry: Entry) -> Node:
    if entry.statement is None:
        check = entry.refused.check if entry.refused else "unknown"
        text = f"counts for nothing ({check}): {entry.refused}"
        return Node(entry.name, "refused", entry.name[:12], time(entry.committed_at), text, {"check": check})
    found = entry.statement
    expires = time(found.expires)
    details = [f"until {expires[:10]}"] if expires else []
    details += [f"in place of {found.replaces[:12]}"] if found.replaces else []
    details += [found.reason] if found.reason else []
    facts = {"role": found.role, "key": found.key, "reason": found.reason, "person": found.person}
    facts |= {name: value for name, value in (("expires", expires), ("replaces", found.replaces)) if value}
    return Node(entry.name, found.decision, found.person, time(found.issued), "; ".join(details), facts)


def _mapping(text: str | None) -> dict[str, str]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}
