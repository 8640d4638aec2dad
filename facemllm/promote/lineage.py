"""What a served answer, a version or any result was made from, and what was made from a result, picture or person.

`lineage(settings, "champion")` walks up: version, decisions, bundle, evaluation, stages, tables, sources with their
licences, commits. `lineage(settings, IMAGE, "down")` walks from a picture to the tables that hold it and on to models,
approvals and releases. It reads what the store remembers of each step, what tables and models say of themselves and the
signed decisions; MLflow is asked for versions and aliases only, so everything else is shown when it is away.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Literal

from pyarrow import ArrowInvalid

from facemllm.errors import UserError
from facemllm.promote import holding
from facemllm.promote.graph import Graph, Node, Step, time, walk
from facemllm.promote.holding import Held, Kind
from facemllm.promote.promoted import AWAY, Promoted
from facemllm.promote.records import DIGEST, Record, Records
from facemllm.settings import Settings
from facemllm.tables import Table, subject_id
from facemllm.version import ledger

Direction = Literal["up", "down", "both"]
PREFIX = re.compile(r"[0-9a-f]{6,64}")
_COMPARED = "champion"  # the input that a gate only compares with: nothing is made from it
_LONGEST = 200


def lineage(settings: Settings, id: str, direction: Direction | None = None) -> Graph:
    """The graph around a version, alias, digest (six digits of it), image_id, subject_id (or SOURCE:NAME), or source.

    Without a direction: up, and down from pictures, persons and sources. Raises UserError if nothing has this name, or
    several things have.
    """
    found = _Lineage(settings)
    roots = found.resolve(id.strip()[:_LONGEST])
    way = direction or ("down" if roots[0].partition(":")[0] in ("image", "subject", "source") else "up")
    graph = Graph(roots, way)
    if way != "down":
        walk(graph, roots, found.describe, found.materials, up=True)
        walk(graph, roots, found.describe, found.promoted.releases, up=False)
    if way != "up":
        walk(graph, roots, found.describe, found.products, up=False)
    graph.notes += found.promoted.notes + found.records.damaged
    return graph


class _Lineage:
    """Names, materials and products of everything, found out as the walk comes to it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.records = Records(settings.home)
        self.who: tuple[Kind, str] | None = None
        self._held: dict[str, Held | None] = {}

    @cached_property
    def promoted(self) -> Promoted:
        """Versions and decisions; asked for once it is known that something has the name."""
        return Promoted(self.settings, self.records)

    @cached_property
    def rows(self) -> dict[str, ledger.Entry]:
        """The ledger of sources."""
        return ledger.entries(self.settings)

    def resolve(self, text: str) -> list[str]:
        """The nodes of a name; a registered model stands for its versions."""
        lower = text.lower()
        if PREFIX.fullmatch(lower):
            if digest := self._digest(lower):
                return self.promoted.by_model.get(digest) or [digest]
            if who := holding.find(self.records, lower):
                return self._of(*who)
        if version := self.promoted.find(text):
            return [version]
        if text.removeprefix("source:") in self.rows:
            return [f"source:{text.removeprefix('source:')}"]
        source, colon, name = text.partition(":")
        if colon and source in self.rows and name:
            return self._of("subject", subject_id(source, name))
        known = [known.version for known in self.promoted.versions.values()]
        known += sorted(alias for known in self.promoted.versions.values() for alias in known.aliases)
        there = f"; versions and aliases: {', '.join(known[:12])}" if known else "; no version is registered"
        away = f"; {AWAY}" if AWAY in self.promoted.notes else ""
        what = "version, alias, digest, picture, person or source"
        raise UserError(f"no {what} here is called '{text}' (home {self.settings.home}){there}{away}")

    def describe(self, id: str) -> Node:
        """A node of anything."""
        kind, colon, name = id.partition(":")
        if id in self.promoted:
            return self.promoted.describe(id)
        if not colon:
            return self._result(id)
        if kind == "source":
            row = self.rows.get(name)
            details = (
                [row.licence, "may " + (", ".join(row.uses) or "nothing")] if row else ["not in the dataset ledger"]
            )
            details += [row.status] if row and row.status != "active" else []
            facts = {"licence": row.licence, "allowed": list(row.uses), "status": row.status} if row else {}
            return Node(id, "source", name, None, "; ".join(details), facts)
        if kind == "commit":
            return Node(id, "commit", name[:12], None, "", {"commit": name})
        return self._person(id, name)

    def materials(self, id: str) -> Iterator[Step]:
        """What something was made from."""
        if id in self.promoted:
            yield from self.promoted.materials(id)
            return
        kind, colon, _ = id.partition(":")
        if colon:
            if self.who and kind in holding.COLUMNS and (source := self._about.get("source")):
                yield "source", f"source:{source}"
            return
        record = self.records.newest.get(id)
        inputs = {name: value for name, value in (record.materials if record else {}).items() if name != _COMPARED}
        parents = [one for one in self.records.manifest(id).get("parents", ()) if DIGEST.fullmatch(str(one))]
        yield from inputs.items()
        yield from (("parent", one) for one in parents if one not in inputs.values())
        if not any(holding.is_table(self.records, one) for one in (*inputs.values(), *parents)):
            yield from (("source", f"source:{key}") for key in self._sources(id))
        if record and (commit := record.facts.get("commit")):
            yield "code", f"commit:{commit}"

    def products(self, id: str) -> Iterator[Step]:
        """What was made from something; from a picture or person only what its rows went into."""
        kind, colon, name = id.partition(":")
        if kind in holding.COLUMNS and colon:
            yield from (("row", table) for table in self._first if self._holds(table))
        elif kind == "source" and colon:
            yield from (("source", one) for one in holding.first_tables(self.records) if name in self._sources(one))
        elif not colon:
            yield from self.promoted.products(id)
            for record in self.records.uses.get(id, ()):
                role = next((n for n, value in record.materials.items() if value == id and n != _COMPARED), None)
                if role and record.step != "register" and self._went_into(id, record):
                    yield role, record.digest

    def _went_into(self, table: str, record: Record) -> bool:
        """Whether the rows that are asked about went from a table into a result; True where nobody can tell."""
        if self.who is None or not holding.is_table(self.records, table):
            return True
        if holding.is_table(self.records, record.digest):
            return self._holds(record.digest)
        held = self._held.get(table)
        if held is None or not held.splits:
            return True
        if record.step in self.settings.stages() or (self.records.folder(record.digest) / "lineage.json").is_file():
            return "train" in held.splits
        return record.step != "evaluate" or bool(held.splits - {"train"})

    def _holds(self, table: str) -> bool:
        assert self.who is not None
        if table not in self._held:
            self._held[table] = holding.held(self.records, table, *self.who)
        return self._held[table] is not None

    @cached_property
    def _first(self) -> list[str]:
        """Tables that hold the rows that are asked about, or did before they were forgotten, and got them from none."""
        forgotten = {table for report in self._reports for table in report.get("tables", {})}
        newest = self.records.newest
        gone = [
            one for one in sorted(forgotten) if not (one in newest and forgotten & {*newest[one].materials.values()})
        ]
        return list(dict.fromkeys([*holding.first_tables(self.records), *gone]))

    @cached_property
    def _reports(self) -> list[dict[str, Any]]:
        """Reports on having forgotten the picture or person that is asked about."""
        if self.who is None:
            return []
        kind, id = self.who
        return [report for report in self.records.reports if id in report.get("keys", {}).get(kind, ())]

    def _of(self, kind: Kind, id: str) -> list[str]:
        self.who = (kind, id)
        return [f"{kind}:{id}"]

    def _digest(self, prefix: str) -> str | None:
        """The one digest that begins so; None if none does."""
        known = {*self.records.newest, *self.records.uses, *self.records.forgotten}
        known |= {*self.promoted.statements, *self.promoted.of_bundle, *self.promoted.by_model}
        found = sorted(digest for digest in known if digest.startswith(prefix) and DIGEST.fullmatch(digest))
        if len(found) > 1:
            some = ", ".join(digest[:16] for digest in found[:4])
            raise UserError(f"{len(found)} digests begin with {prefix} ({some}); give more")
        return found[0] if found else None

    def _result(self, digest: str) -> Node:
        record, manifest = self.records.newest.get(digest), self.records.manifest(digest)
        facts = dict(record.facts) if record else {}
        details = [str(facts.get("figure") or "")]
        if rows := manifest.get("rows"):
            details = details if details[0] else [f"{rows:,} rows"]
            facts["rows"] = rows
        facts |= {"about": manifest["about"]} if manifest.get("about") else {}
        if report := self.records.forgotten.get(digest):
            details.append(_forgotten(report))
            facts["forgotten"] = str(report.get("id"))
        elif record is None:
            details.append("not remembered in this home")
        elif digest not in self.records.here:
            details.append("no longer in the store")
        if (held := self._held.get(digest)) and self.who:
            facts |= {"holds": held.rows, "splits": sorted(held.splits)}
            details.append(f"holds it ({', '.join(sorted(held.splits))})" if held.splits else "holds it")
        if champion := (record.inputs.get(_COMPARED) if record else ""):
            facts[_COMPARED] = champion
            details.append(f"against {champion[:12]}")
        text, at = "; ".join(part for part in details if part), time(record.at if record else None)
        if record and record.step == "version":  # a revision of the data, not a version of the model
            return Node(digest, "revision", str(facts.get("output"))[:12], at, "of the data repository", facts)
        kind = record.step if record else self.promoted.called.get(digest, "result")
        return Node(digest, kind, digest[:12], at, text, facts)

    def _person(self, id: str, name: str) -> Node:
        details = [f"{self._about['images']} pictures"] if self.who and self.who[0] == "subject" and self._about else []
        details += (
            [f"of subject {self._about['subject'][:12]}"]
            if id.startswith("image:") and self._about.get("subject")
            else []
        )
        details += [_forgotten(report) for report in self._reports]
        details += [] if self._about or self._reports else ["in no table here"]
        at = str(self._reports[-1]["at"]) if self._reports else None
        return Node(id, id.partition(":")[0], name[:12], at, "; ".join(details), dict(self._about))

    @cached_property
    def _about(self) -> dict[str, Any]:
        assert self.who is not None
        return holding.about(self.records, (one for one in self._first if self._holds(one)), *self.who)

    def _sources(self, table: str) -> list[str]:
        """Sources whose pictures a table of faces holds."""
        manifest = self.records.manifest(table)
        if not str(manifest.get("schema", "")).startswith("faces/"):
            return []
        try:
            return Table(self.records.folder(table), manifest).sources
        except (OSError, KeyError, ArrowInvalid):
            return []


def _forgotten(report: Mapping[str, Any]) -> str:
    """What was forgotten, when, and why, in a line."""
    kind, counts = report.get("kind", "picture"), report.get("keys", {})
    pictures = len(counts.get("image", ()))
    what = f"a person ({pictures} pictures)" if kind == "subject" else "a picture"
    return f"deleted {report['at'][:10]} to forget {what}: {report.get('reason', '')} (report {report.get('id')})"
