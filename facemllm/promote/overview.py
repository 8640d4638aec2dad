"""What there is to decide and what was decided, for tables and for JSON: every version, or one with its bundle.

A part of the facts comes from MLflow (numbers, dates, aliases); what is in force comes from the decisions repository.
"""

from __future__ import annotations

from typing import Any

from facemllm.errors import UserError, one_line
from facemllm.promote import decided
from facemllm.promote.checks import rules
from facemllm.promote.decide import about, words
from facemllm.promote.registry import find_version, versions
from facemllm.promote.releases import RELEASES, in_force
from facemllm.settings import Settings
from facemllm.signing.canonical import time_text


def list_versions(settings: Settings) -> tuple[list[dict[str, Any]], list[str]]:
    """A row a version, newest first, and what MLflow shows otherwise than it is. See `facemllm promote list`."""
    known = decided.decisions(settings)
    releases = in_force(known[0]) if known else []
    production, found = (releases[-1].model if releases else None), versions(settings)
    rows, notes = [], []
    for version in found:
        now, problem = None, None
        try:
            now = about(known[0], known[1], version) if known else None
        except UserError as error:
            problem = one_line(error)
        last = next((one for one in reversed(releases) if one.model == version.digest), None)
        serves = version.digest == production and last is not None
        row: dict[str, Any] = {"version": version.version, "digest": version.digest, "registered": version.created}
        row |= {"gate": version.gate, "state": now.state if now else "pending", "words": problem or words(now)}
        row |= {"by": [one.person for one in now.approvals] if now else [], "bundle": now.bundle if now else None}
        row |= {"expires": time_text(now.expires) if now and now.expires else None}
        row |= {"missing": dict(now.missing) if now else {}, "may_sign": list(now.may_sign) if now else []}
        row |= {"production": serves, "released": time_text(last.issued) if last else None, "aliases": version.aliases}
        rows.append(row)
        if "champion" in version.aliases and not serves:
            what = f"{production[:12]} is in production" if production else "nothing was released"
            notes.append(f"MLflow's alias champion was moved to version {version.version}; by signed releases {what}")
    return rows, notes


def show(settings: Settings, version: int | str) -> dict[str, Any]:
    """All that a person needs to decide, ready for JSON: the bundle, its rules with what matters first (each with its
    `state`), what is in force, every statement, releases."""
    found = find_version(settings, version)
    known = decided.decisions(settings)
    now = about(known[0], known[1], found) if known else None
    entries = known[0].statements(found.digest, known[1]) if known else []
    statements = []
    for entry in entries:
        one = entry.statement
        row: dict[str, Any] = {"id": entry.name, "at": time_text(one.issued if one else entry.committed_at)}
        if one is not None:
            row |= {"decision": one.decision, "person": one.person, "role": one.role, "reason": one.reason}
            row |= {"expires": time_text(one.expires) if one.expires else None, "replaces": one.replaces}
        refused = entry.refused or next((r for r in (now.refused if now else ()) if r.statement == entry.name), None)
        row |= {"counts": refused is None, "why": f"{refused.check}: {one_line(refused)}" if refused else None}
        statements.append(row)
    bundle = known[0].bundle(now.bundle) if known and now else None
    return {
        "name": found.name,
        "version": found.version,
        "digest": found.digest,
        "registered": found.created,
        "state": now.state if now else "pending",
        "words": words(now),
        "bundle": bundle,
        "rules": [{**row, "state": state} for state, row in rules(bundle or {})],
        "bundle_digest": now.bundle if now else None,
        "expires": time_text(now.expires) if now and now.expires else None,
        "missing": dict(now.missing) if now else {},
        "may_sign": list(now.may_sign) if now else [],
        "statements": statements,
        "releases": [row for row in statements if row.get("decision") in RELEASES],
    }
