"""The chain behind anything: version, decision, evaluation, checkpoint per stage, MLflow run, tables, sources, commit.

`lineage(settings, "3")` starts at a registered version, an alias, or a digest (its first digits). It follows what the
store remembers of each step (inputs by digest) and what tables say of themselves; MLflow is asked for versions and
commits only, so a digest is explained, with less, when MLflow is away. A result reached twice is explained once.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from facemllm.core.files import read_json
from facemllm.core.store import Store
from facemllm.errors import UserError
from facemllm.promote.approvals import history, read_decision
from facemllm.promote.registry import LINEAGE, Version, find_version, versions
from facemllm.settings import Settings
from facemllm.tables import Table
from facemllm.tracking.client import connect, guard, uri
from facemllm.version import ledger

Link = dict[str, Any]
"""One link: `depth`, `kind` (version, decision, a step's name, run, commit, source, ...), `id`, `facts`."""

DIGEST = re.compile(r"[0-9a-f]{64}")
PREFIX = re.compile(r"[0-9a-f]{6,64}")
FACTS = ("figure", "seconds", "cost", "gate", "resumed_from", "output")
"""What a record of the store says of a result, and a link repeats."""
PRINTED = {"figure": "", "gate": "gate ", "aliases": "", "by": "by ", "at": "", "reason": "", "problem": ""}
PRINTED |= {"licence": "", "status": "", "revision": "revision ", "note": ""}
"""Facts of a link that `show` prints, each after a word; the others are for `--json`."""
AWAY = "MLflow is away; versions, decisions and commits are left out"


def lineage(settings: Settings, id: str) -> list[Link]:
    """Every link behind a version number, an alias or a digest prefix, in the order of a depth-first walk.

    Links are ready for JSON; `depth` says how they hang together. Raises UserError if nothing has this name.
    """
    walk = _Walk(settings)
    text = id.strip().lower()
    digest = walk.resolve(text) if PREFIX.fullmatch(text) else None
    if digest is None:
        try:
            version = find_version(settings, id)
        except UserError as error:
            if not PREFIX.fullmatch(text):
                raise
            raise UserError(f"no result begins with {text} in {settings.home}, and {error}") from None
        walk.version(version)
    else:
        for version in walk.versions_of(digest):
            walk.add(0, "registered as", f"{version.name} version {version.version}", _standing(version))
        walk.result(digest, 0)
    if walk.away:
        walk.add(0, "note", AWAY)
    return walk.links


def show(links: Sequence[Link]) -> None:
    """Print the chain as a tree on standard output, a line a result: cut at a terminal's width, whole elsewhere."""
    trunk = Tree(Text("lineage"), hide_root=True)
    open_at = [trunk]
    for link in links:
        if link["kind"] in ("run", "commit"):  # how the result above came about: at the end of its line
            assert isinstance(open_at[-1].label, Text)
            open_at[-1].label.append(f"  {link['kind']} {link['id'][:8]}", "dim")
            continue
        text = Text.assemble((link["kind"], "bold"), " ", (_short(link["id"]), "cyan"))
        facts = {name: fact for name in PRINTED if isinstance(fact := link["facts"].get(name), str)}
        text.append("".join(f"  {PRINTED[name]}{_short(fact)}" for name, fact in facts.items()))
        del open_at[link["depth"] + 1 :]
        open_at.append(open_at[-1].add(text))
    Console(width=None if sys.stdout.isatty() else 400).print(trunk, no_wrap=True, overflow="ellipsis")


class _Walk:
    """The links found so far, what the store remembers, and whether MLflow turned out to be away."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.links: list[Link] = []
        self.visited: set[str] = set()
        self.records = Store(settings.home).records()
        self.client: Any = None
        self.away = False

    def add(self, depth: int, kind: str, id: str, facts: Mapping[str, Any] | None = None) -> None:
        kept = {name: value for name, value in (facts or {}).items() if value not in (None, "", [], {})}
        self.links.append({"depth": depth, "kind": kind, "id": id, "facts": kept})

    def resolve(self, prefix: str) -> str | None:
        """The one digest that begins so, among results, their inputs and the store's folders; None if none does."""
        known = set(self.records) | {p.name for p in (self.settings.home / "store").glob(f"{prefix}*")}
        known |= {str(v) for record in self.records.values() for v in record.get("inputs", {}).values()}
        found = sorted(d for d in known if d.startswith(prefix) and DIGEST.fullmatch(d))
        if len(found) > 1:
            some = ", ".join(digest[:12] for digest in found[:4])
            raise UserError(f"{len(found)} digests begin with {prefix} ({some}); give more")
        return found[0] if found else None

    def versions_of(self, digest: str) -> list[Version]:
        """Registered versions of a model digest; none when MLflow is away."""
        try:
            return [version for version in versions(self.settings) if version.digest == digest]
        except UserError:
            self.away = True
            return []

    def version(self, version: Version) -> None:
        """A registered version: its standing, the decision on it, its evaluation, and the model behind both."""
        self.add(0, "version", f"{version.name} version {version.version}", _standing(version))
        decided, problem = read_decision(version)
        if decided is None:
            self.add(1, "decision", "pending", {"problem": problem})
        else:
            earlier = sum(entry.get("event") == "decision" for entry in history(version)) - 1
            facts = {"by": decided.by, "at": decided.at, "reason": decided.reason, "earlier decisions": earlier or None}
            self.add(1, "decision", decided.decision, facts)
        if version.evaluation:
            self.result(version.evaluation, 1, "evaluate")
        self.result(version.digest, 1, "model")
        for name, digest in json.loads(version.tags.get(LINEAGE) or "{}").items():
            # what was known at registration, for a home that no longer holds it, or never did
            if DIGEST.fullmatch(digest) and digest not in self.visited:
                self.result(digest, 1, name)

    def result(self, digest: str, depth: int, kind: str = "result") -> None:
        """A result of a step: how it came about, then everything it was made from."""
        record = self.records.get(digest, {})
        kind = record.get("step") or kind
        if digest in self.visited:
            self.add(depth, kind, digest, {"note": "see above"})
            return
        self.visited.add(digest)
        folder = self.settings.home / "store" / digest
        gone = {} if folder.is_dir() else Store(self.settings.home).forgotten(digest)
        manifest = gone.get("manifest") or read_json(folder / "manifest.json")
        facts = {name: record.get(name) for name in FACTS if record.get(name) != digest}
        facts |= {"rows": manifest.get("rows"), "about": manifest.get("about"), "revision": self._revision(digest)}
        if gone:
            facts["note"] = f"deleted {gone['at'][:10]} to forget a picture"
        elif not record and not manifest:
            facts["note"] = "not remembered in this home"
        self.add(depth, kind, digest, facts)
        self._origin(record, depth + 1)
        inputs = {name: str(value) for name, value in record.get("inputs", {}).items()}
        parents = {f"parent {parent[:12]}": parent for parent in manifest.get("parents", ())}
        for name, value in {**inputs, **{k: v for k, v in parents.items() if v not in inputs.values()}}.items():
            if DIGEST.fullmatch(value):
                self.result(value, depth + 1, name)
            elif value:
                self.add(depth + 1, name, value)
        if not inputs and not parents:
            for source, terms in _sources(self.settings, folder, manifest):
                self.add(depth + 1, "source", source, terms)

    def _origin(self, record: Mapping[str, Any], depth: int) -> None:
        """The MLflow run that made a result, and the commit of the code."""
        run_id, commit = record.get("run_id"), record.get("commit")
        if run_id:
            tags = self._run_tags(run_id)
            self.add(depth, "run", run_id, {"name": tags.get("facemllm.run"), "profile": tags.get("facemllm.profile")})
            commit = commit or tags.get("facemllm.commit")
        if commit:
            self.add(depth, "commit", commit)

    def _run_tags(self, run_id: str) -> Mapping[str, str]:
        if self.away:
            return {}
        try:
            self.client = self.client or connect(self.settings)  # once: each asks the server whether it is there
            with guard(uri(self.settings)):
                return dict(self.client.get_run(run_id).data.tags)
        except UserError:
            self.away = self.client is None
            return {}

    def _revision(self, digest: str) -> str | None:
        """The data repository's revision that holds a table, when a `version` step recorded it."""
        for record in self.records.values():
            if record.get("step") == "version" and digest in record.get("inputs", {}).values():
                return str(record.get("output"))
        return None


def _standing(version: Version) -> dict[str, Any]:
    standing = {"digest": version.digest, "gate": version.gate, "aliases": ", ".join(version.aliases)}
    return {**standing, "created": version.created}


def _sources(settings: Settings, folder: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Sources whose pictures a table of faces holds, with what the ledger says of each."""
    if not str(manifest.get("schema", "")).startswith("faces/"):
        return
    rows = ledger.entries(settings)
    try:
        for key in Table(folder, manifest).sources:
            if row := rows.get(key):
                yield key, {"licence": row.licence, "status": row.status, "allowed": ", ".join(row.uses)}
            else:
                yield key, {"note": "not in the dataset ledger"}
    except (OSError, KeyError):
        return


def _short(text: str) -> str:
    return text[:12] if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", text) else text
