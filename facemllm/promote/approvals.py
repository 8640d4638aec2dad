"""The decision of a named person about a registered version, without which nothing goes to production.

A decision is bound to the digest of the version's bytes: `facemllm.decision` (JSON) on the version in MLflow is the one
in force, and one that names another digest counts as none. Every request and decision is also kept under a tag of its
own, `facemllm.history.<time>-<random>`, written first and never again, so nothing is lost when a decision changes.

    facemllm promote approve 3 --by "Ada Lovelace" --reason "figures hold, card read"
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from facemllm.core import progress
from facemllm.errors import UserError
from facemllm.promote.registry import DECISION, LINEAGE, Version, find_version, versions
from facemllm.settings import Settings, root
from facemllm.tracking.client import session
from facemllm.version.tombstones import plain_line

log = logging.getLogger(__name__)

State = Literal["approved", "rejected", "pending"]
APPROVED: State = "approved"
REJECTED: State = "rejected"
PENDING: State = "pending"

REQUEST = "facemllm.request"
HISTORY = "facemllm.history."
POLL_S = 5.0
LONGEST = 2000  # characters of a reason

ROLES = {
    *("admin", "administrator", "anonymous", "approver", "auto", "bot", "ci", "daemon", "default", "jenkins", "me"),
    *("none", "nobody", "null", "operator", "owner", "pipeline", "root", "service", "somebody", "someone", "system"),
    *("test", "tester", "unknown", "user", "you", "your name", "github actions", "gitlab ci", "ubuntu", "runner"),
}
GROUPS = {"automation", "bot", "committee", "developers", "maintainers", "pipeline", "team"}
HINT = 'give the name of the person who decides: --by "Ada Lovelace"'


@dataclass(frozen=True)
class Decision:
    """What a person decided about the bytes named `digest`, and on which evaluation. `at` is UTC, ISO 8601."""

    decision: State
    by: str
    reason: str
    digest: str
    name: str
    version: int
    evaluation: str
    at: str


def request(settings: Settings, version: int | str, by: str, note: str = "") -> Mapping[str, Any]:
    """Ask for a decision on a version; `by` may be a pipeline. Raises UserError unless the version passed its gate."""
    found = _decidable(settings, version)
    asked: dict[str, Any] = {"event": "request", "by": plain_line(by) or "pipeline", "note": plain_line(note)}
    asked |= {"digest": found.digest, "version": found.version, "at": _now()}
    _keep(settings, found, REQUEST, asked)
    return asked


def decide(settings: Settings, version: int | str, verdict: State, by: str | None, reason: str) -> Decision:
    """Approve a version for production, or reject it, also one decided on before. `by=None` takes Git's `user.name`.

    Raises UserError if the version is unknown or did not pass its gate, the reason is empty, or `by` is no person.
    """
    name = person(by)
    why = plain_line(reason)
    if not why:
        raise UserError('a decision needs a reason: --reason "..."')
    if len(why) > LONGEST:
        raise UserError(f"the reason is {len(why)} characters long; keep it below {LONGEST}")
    found = _decidable(settings, version)
    decided = Decision(verdict, name, why, found.digest, found.name, found.version, found.evaluation, _now())
    _keep(settings, found, DECISION, {"event": "decision", **asdict(decided)})
    return decided


def state(settings: Settings, version: int | str) -> State:
    """`approved`, `rejected`, or `pending` when no decision is in force."""
    decided, _ = read_decision(find_version(settings, version))
    return decided.decision if decided else PENDING


def history(version: Version) -> list[dict[str, Any]]:
    """Every request and decision about a version, oldest first."""
    entries = sorted((name, text) for name, text in version.tags.items() if name.startswith(HISTORY))
    return [_parsed(text) or {"event": "unreadable", "tag": name} for name, text in entries]


def list_versions(settings: Settings) -> list[dict[str, Any]]:
    """A row a version, newest first: version, digest, gate, state, who decided and when, aliases."""
    rows = []
    for version in versions(settings):
        decided = _in_force(version)
        row: dict[str, Any] = {"version": version.version, "digest": version.digest, "gate": version.gate}
        row |= {"state": decided.decision if decided else PENDING}
        row |= {"by": decided and decided.by, "at": decided and decided.at}
        row |= {"requested": REQUEST in version.tags, "aliases": ", ".join(version.aliases), "created": version.created}
        rows.append(row)
    return rows


def show(settings: Settings, version: int | str) -> dict[str, Any]:
    """All that a person needs to decide, ready for JSON: figures, gate, lineage, decision in force and history."""
    found = find_version(settings, version)
    decided, problem = read_decision(found)
    named = ("name", "version", "digest", "created", "aliases", "description", "evaluation", "run_id")
    return {
        **{name: getattr(found, name) for name in named},
        "gate": {"verdict": found.gate, "reasons": _parsed(found.tags.get("facemllm.gate_reasons")) or []},
        "tasks": _parsed(found.tags.get("facemllm.tasks")) or {},
        "lineage": _parsed(found.tags.get(LINEAGE)) or {},
        "state": decided.decision if decided else PENDING,
        "decision": asdict(decided) if decided else None,
        "problem": problem,
        "history": history(found),
    }


def require_approved(settings: Settings, version: int | str) -> Version:
    """The version, if a person approved its bytes and its gate still stands. Raises UserError saying what to do."""
    found = find_version(settings, version)
    what = f"{found.name} version {found.version} ({found.digest[:12]})"
    decided, problem = read_decision(found)
    way = f'`facemllm promote approve {found.version} --by "..." --reason "..."`'
    if decided is None:
        why = f" ({problem})" if problem else ""
        raise UserError(f"{what} is not approved{why}; a person decides with {way}")
    if decided.decision != APPROVED:
        raise UserError(
            f"{what} was rejected by {decided.by} on {decided.at[:10]}: {decided.reason}; "
            f"it stays out of production unless a person changes that with {way}"
        )
    if found.gate != "passed":
        raise UserError(f"{what} is approved, but its gate says '{found.gate}'; run the pipeline again")
    return found


def await_decision(settings: Settings, version: int | str, wait_minutes: float) -> State:
    """Wait at most `wait_minutes` for a decision, looking every few seconds; 0 looks once. Returns the state then.

    Raises UserError if the version is unknown, or MLflow is still away when the time is over.
    """
    current = state(settings, version)
    started, wait_s = time.monotonic(), wait_minutes * 60
    with progress.bar("waiting for a decision", max(1, round(wait_s))) as bar:
        while current == PENDING and (spent := time.monotonic() - started) < wait_s:
            bar.update(round(spent), f"a person decides: facemllm promote approve|reject {version}")
            time.sleep(min(POLL_S, wait_s - spent))
            try:
                current = state(settings, version)
            except UserError:
                if time.monotonic() - started >= wait_s:
                    raise
    return current


def person(by: str | None) -> str:
    """The name of a person, in one line; None takes Git's `user.name`. Raises UserError for a role or nothing."""
    name = plain_line(by if by is not None else _git_name())
    if not name:
        raise UserError(f"nobody is named as the one who decides; {HINT}")
    # of an address, what stands before the @
    words = re.findall(r"[^\W\d_]+", name.lower().partition("@")[0])
    if not words or " ".join(words) in ROLES or GROUPS.intersection(words) or len(name) > 200:
        raise UserError(f"'{name[:60]}' does not name a person; {HINT}")
    return name


def read_decision(version: Version) -> tuple[Decision | None, str | None]:
    """The decision in force on a version, or None and, if one is stored that does not count, why."""
    if DECISION not in version.tags:
        return None, None
    stored = _parsed(version.tags[DECISION])
    try:
        decided = Decision(**{name: stored[name] for name in Decision.__dataclass_fields__}) if stored else None
    except (KeyError, TypeError):
        decided = None
    if decided is None or decided.decision not in (APPROVED, REJECTED):
        return None, "the stored decision is unreadable"
    if not version.digest or decided.digest != version.digest:
        return None, f"the stored decision of {decided.by} is about other bytes, {str(decided.digest)[:12]}"
    if decided.evaluation != version.evaluation:
        return None, f"the stored decision of {decided.by} was taken on another evaluation"
    return decided, None


def _in_force(version: Version) -> Decision | None:
    decided, problem = read_decision(version)
    if problem:
        log.warning("%s version %s counts as undecided: %s", version.name, version.version, problem)
    return decided


def _decidable(settings: Settings, version: int | str) -> Version:
    found = find_version(settings, version)
    if not found.digest:
        raise UserError(f"{found.name} version {found.version} has no digest; it was not registered by this workflow")
    if found.gate != "passed":
        reasons = _parsed(found.tags.get("facemllm.gate_reasons")) or []
        why = f": {'; '.join(map(str, reasons))}" if reasons else ""
        raise UserError(f"{found.name} version {found.version} did not pass its gate{why}; nobody can decide on it")
    return found


def _keep(settings: Settings, version: Version, tag: str, entry: Mapping[str, Any]) -> None:
    text = json.dumps(entry, ensure_ascii=False)
    # the clock orders the entries, the random part keeps two of the same moment apart
    own = f"{HISTORY}{time.time_ns() // 1000:017d}-{secrets.token_hex(4)}"
    with session(settings) as client:
        client.set_model_version_tag(version.name, str(version.version), own, text)
        client.set_model_version_tag(version.name, str(version.version), tag, text)


def _parsed(text: str | None) -> Any:
    try:
        return json.loads(text or "null")
    except ValueError:
        return None


def _git_name() -> str:
    try:
        command = ["git", "-C", str(root()), "config", "user.name"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
