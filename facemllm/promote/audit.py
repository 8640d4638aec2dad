"""Who asked, decided, released and rolled back what, when, and in place of what: the decisions repository's own chain.

A statement whose signature does not hold tells nothing: of it only the commit, its time and the failed check are shown.
"""

from __future__ import annotations

import re
from typing import Any

from facemllm.errors import UserError, one_line
from facemllm.promote import decided
from facemllm.settings import Settings
from facemllm.signing.canonical import Refused, time_text
from facemllm.signing.decisions import Decisions, Entry
from facemllm.signing.policy import Policy
from facemllm.signing.standing import standing
from facemllm.version.tombstones import plain_line

Row = dict[str, Any]
"""One statement: `at`, `decision`, `person`, `role`, `model`, `version`, `reason`, `expires`, `replaces` (a digest) and
`replaces_version`, `bundle`, `key`, `id`, `commit`, `kept_at`; `refused` is the check that failed, `why` says it."""


def audit(settings: Settings, model: str | None = None) -> list[Row]:
    """Every statement in the order in which they were added, or those about a version or a digest that begins so.

    Raises Refused ("history") where the repository's history does not hold, UserError for a version nobody knows.
    """
    found = decided.decisions(settings)
    if found is None:
        return []
    decisions, policy = found
    entries = decisions.statements()
    names = {entry.model: _version(decisions, entry) for entry in entries if entry.statement}
    counted = _uncounted(decisions, policy, entries)
    rows = [_row(entry, names, counted.get(entry.name)) for entry in entries]
    if model is None:
        return rows
    wanted = _wanted(settings, model.strip(), names)
    return [row for row in rows if row["model"] in wanted]


def verify(settings: Settings) -> dict[str, Any]:
    """Read the whole history anew and check that it only ever added.

    Raises Refused naming the first commit that rewrites, drops or backdates something, or shows that a part is gone.
    """
    found = decided.decisions(settings)
    if found is None:
        return {"commits": 0, "statements": 0, "refused": 0, "head": None, "stale": None}
    decisions, _ = found
    decisions.verify_history()
    entries = decisions.statements()
    refused = sum(entry.refused is not None for entry in entries)
    facts = {"commits": len(decisions.history()), "statements": len(entries), "refused": refused}
    return {**facts, "head": decisions.head, "stale": decisions.stale}


def as_text(rows: list[Row]) -> str:
    """Rows for reading: two lines each."""
    lines = []
    for row in rows:
        if row["decision"]:
            lines.append(f"{_day(row['at'])}  {row['decision']:<8}  {row['version']}  {row['person']} ({row['role']})")
        else:
            lines.append(f"{_day(row['kept_at'])}  {'?':<8}  model {row['model'][:12]}  by nobody who is known")
        details = [f"in place of {row['replaces_version']}"] if row["replaces"] else []
        details += [f"until {row['expires'][:10]}"] if row["expires"] else []
        details += [row["reason"]] if row["reason"] else []
        if row["refused"]:
            details.insert(0, f"COUNTS FOR NOTHING ({row['refused']}): {row['why']}")
        lines += [f"{'':<18}{'; '.join(details)}"] if details else []
    return "\n".join(lines) or "nobody has asked for a decision yet"


def _row(entry: Entry, names: dict[str, str], uncounted: Refused | None) -> Row:
    statement, refused = entry.statement, entry.refused or uncounted
    row: Row = {
        "id": entry.name,
        "commit": entry.commit,
        "kept_at": time_text(entry.committed_at),
        "model": entry.model,
    }
    named = ("decision", "person", "role", "reason", "bundle", "key", "replaces")
    row |= {name: getattr(statement, name) if statement else None for name in named}
    row["at"] = time_text(statement.issued) if statement else None
    row["expires"] = time_text(statement.expires) if statement and statement.expires else None
    row["version"] = names.get(entry.model, f"model {entry.model[:12]}")
    replaced = row["replaces"]
    row["replaces_version"] = names.get(replaced, f"model {replaced[:12]}") if replaced else None
    return {**row, "refused": refused.check if refused else None, "why": one_line(refused) if refused else None}


def _version(decisions: Decisions, entry: Entry) -> str:
    """What a model is called in the bundle that was signed: name, version and digest."""
    assert entry.statement is not None
    try:
        model = decisions.bundle(entry.statement.bundle).get("model")
    except Refused:
        model = None
    about = f"{model.get('name')} {model.get('version')}" if isinstance(model, dict) else "model"
    return f"{plain_line(about)} ({entry.model[:12]})"


def _uncounted(decisions: Decisions, policy: Policy, entries: list[Entry]) -> dict[str, Refused]:
    """Statements that are validly signed and count for nothing all the same, as an approval by who asked for it."""
    found: dict[str, Refused] = {}
    for bundle in dict.fromkeys(entry.statement.bundle for entry in entries if entry.statement):
        try:
            refused = standing(decisions, policy, bundle).refused
        except Refused:
            continue
        found |= {one.statement: one for one in refused if one.statement}
    return found


def _wanted(settings: Settings, text: str, names: dict[str, str]) -> set[str]:
    """Digests of the models that are meant by a version, alias or digest prefix."""
    if re.fullmatch(r"[0-9a-f]{6,64}", text.lower()):
        return {text.lower()} | {model for model in names if model.startswith(text.lower())}
    number = text.removeprefix("@").removeprefix("v")
    if found := {model for model, name in names.items() if name.rpartition(" (")[0].rpartition(" ")[2] == number}:
        return found
    from facemllm.promote.registry import find_version

    try:
        return {find_version(settings, text).digest}
    except UserError as error:
        raise UserError(f"no signed decision is about version '{text}', and {error}") from None


def _day(time: str) -> str:
    return time[:16].replace("T", " ")
