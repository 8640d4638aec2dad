"""What the pages show, gathered from the decisions repository and the policy: plain data, no HTML.

A bundle never changes, so what it says is read once. What is in force about it is asked of `facemllm.signing` and kept
until a statement about its model comes in, the policy changes, or an approval expires.
"""

from __future__ import annotations

import shlex
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from facemllm.core import digests
from facemllm.core.servers import mlflow
from facemllm.errors import one_line
from facemllm.report.web import plain
from facemllm.review import facts as reading
from facemllm.review import samples as faces
from facemllm.review.facts import Digest, Facts
from facemllm.review.fields import is_digest
from facemllm.review.views import CHOICES, FILES, STATES, Event, OwnKey, Queue, RequestPage, Row
from facemllm.settings import Settings
from facemllm.signing import keys, local
from facemllm.signing.canonical import utc_now
from facemllm.signing.decisions import Decisions, Entry
from facemllm.signing.policy import Policy, read_policy
from facemllm.signing.standing import Standing, ends, standing
from facemllm.signing.statements import Refused

PAGE = 50
"""Requests on a page of the queue."""
_OPEN = ("requested", "expired")  # states in which a signature is waited for
_WHOLE = 16  # bundles kept whole in memory; of the others their row


@dataclass(frozen=True)
class Said:
    """What a bundle says in a row of the queue, and its figures by task; `problem` where it cannot be read."""

    name: str = ""
    version: str = ""
    model: str = ""
    passed: bool | None = None
    failed: int = 0
    loosened: int = 0
    near: int = 0
    worse: int | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""


class Pages:
    """The pages' data, from the repository and the policy that the settings name. Safe to use from several threads."""

    def __init__(self, settings: Settings, read_only: bool = False) -> None:
        self.settings, self.read_only = settings, read_only
        self._lock = threading.RLock()
        self._policy: tuple[str, Policy] | None = None
        self._decisions: Decisions | None = None
        self._said: dict[str, Said] = {}
        self._whole: dict[str, Facts] = {}
        self._standing: dict[str, tuple[tuple[str, ...], datetime | None, Standing]] = {}

    def queue(self, state: str = "waiting", page: int = 1, now: datetime | None = None) -> Queue:
        """A page of the requests in a state (a key of `STATES`), oldest first."""
        now = now or utc_now()
        with self._lock:
            decisions, policy = self.current()
            found = [(bundle, self._in_force(decisions, policy, bundle, now)) for bundle in decisions.bundles()]
            counts = Counter(_state(one) for _, one in found)
            chosen = [(bundle, one) for bundle, one in found if _state(one) in STATES[state]]
            oldest = datetime.max.replace(tzinfo=now.tzinfo)
            chosen.sort(key=lambda pair: pair[1].requests[0].issued if pair[1] and pair[1].requests else oldest)
            pages = max(1, -(-len(chosen) // PAGE))
            page = min(max(page, 1), pages)
            rows = [self._row(decisions, *pair) for pair in chosen[(page - 1) * PAGE : page * PAGE]]
            each = {name: sum(counts[one] for one in states) for name, states in STATES.items()}
            return Queue(tuple(rows), each, state, page, pages, len(chosen), self._warnings(decisions, now))

    def request(self, bundle: str, now: datetime | None = None) -> RequestPage:
        """One request. Raises Refused where the repository does not hold the bundle, or not with these bytes."""
        now = now or utc_now()
        with self._lock:
            decisions, policy = self.current()
            raw = decisions.bundle(bundle)
            facts = self._read(bundle, raw)
            in_force = standing(decisions, policy, bundle, now)
            entries = decisions.statements(in_force.model)
            previous = decisions.previous(in_force.model)
            asked = in_force.requests[0] if in_force.requests else None
            void = {one.statement: one for one in in_force.refused if one.statement}
            events = tuple(_event(entry, bundle, void.get(entry.id)) for entry in reversed(entries))
            files = tuple((n, what) for n, what in FILES.items() if n == "bundle.json" or _named(raw, n))
            warnings = list(self._warnings(decisions, now))
            if facts.model != in_force.model:
                warnings.append("this bundle is about another model than its statements; sign nothing")
            own = () if self.read_only else self._own_keys(policy, now)
            return RequestPage(
                bundle=bundle,
                facts=facts,
                state=in_force.state,
                requester=plain(in_force.requester or ""),
                asked=asked.issued if asked else None,
                reason=plain(in_force.requests[-1].reason) if in_force.requests else "",
                approvals=in_force.approvals,
                missing={role: count for role, count in in_force.missing.items() if count},
                may_sign=in_force.may_sign,
                history=events,
                earlier=self._earlier(decisions, bundle),
                newer=self._newer(decisions, bundle, facts.model),
                samples=faces.read(raw),
                digests=_digests(bundle, facts),
                files=files,
                card=_card(decisions, bundle, raw),
                keys=own,
                choices=CHOICES,
                commands=_commands(facts, in_force),
                previous=previous,
                seen=self._fingerprint(bundle, in_force, previous),
                mlflow=self._mlflow(facts),
                warnings=tuple(warnings),
            )

    def file(self, bundle: str, name: str) -> bytes:
        """A file of `FILES`. Raises Refused where the bundle has none of these bytes."""
        with self._lock:
            return self.current()[0].bundle_file(bundle, name)

    def picture(self, bundle: str, name: str) -> bytes | None:
        """The bytes of a sample's picture, by its name in the bundle; None for any other name."""
        with self._lock:
            decisions = self.current()[0]
            known = set(faces.pictures(decisions.bundle(bundle)))
            return decisions.bundle_file(bundle, name) if name in known else None

    def current(self) -> tuple[Decisions, Policy]:
        """The repository with what others appended meanwhile, and the policy as its file is now."""
        with self._lock:
            path = self.settings.policy_file
            digest = digests.of_bytes(_bytes(path))
            if self._policy is None or self._policy[0] != digest or self._decisions is None:
                policy = read_policy(path) if self.read_only else local.policy(self.settings)
                self._policy = digests.of_bytes(_bytes(path)), policy
                self._decisions = Decisions.open(self.settings, policy)
                self._standing.clear()
            else:
                self._decisions.refresh()
            return self._decisions, self._policy[1]

    def forget(self) -> None:
        """Read everything that can change anew at the next page."""
        with self._lock:
            self._decisions = None

    @property
    def mlflow(self) -> str:
        """Address of MLflow's pages."""
        uri = self.settings.tracking.uri or mlflow(self.settings).url
        return uri if uri.startswith(("http://", "https://")) else ""

    def _in_force(self, decisions: Decisions, policy: Policy, bundle: str, now: datetime) -> Standing | None:
        """What is in force about a bundle; None where it cannot be told."""
        model = self._say(decisions, bundle).model
        known = decisions.previous(model) if model else ()
        kept = self._standing.get(bundle)
        if kept is None or kept[0] != known or (kept[1] is not None and kept[1] <= now):
            try:
                found = standing(decisions, policy, bundle, now)
            except Refused:
                return None
            held = [ends(one, policy.rule) for one in (*found.requests, *found.approvals)]
            early = any(one.check == "not_yet_valid" for one in found.refused)
            kept = known, now if early else min(held, default=None), found
            self._standing[bundle] = kept
        return kept[2]

    def _say(self, decisions: Decisions, bundle: str) -> Said:
        if bundle not in self._said:
            try:
                found = reading.read(decisions.bundle(bundle))
            except Refused as error:
                return Said(problem=plain(one_line(error)))
            self._said[bundle] = Said(
                name=found.name,
                version=found.version,
                model=found.model,
                passed=found.passed,
                failed=found.failed,
                loosened=len(found.loosened),
                near=found.near,
                worse=found.worse if found.champion else None,
                figures={task.name: task.value for task in found.tasks if task.value is not None},
            )
        return self._said[bundle]

    def _read(self, bundle: str, raw: Mapping[str, Any]) -> Facts:
        if bundle not in self._whole:
            while len(self._whole) >= _WHOLE:
                del self._whole[next(iter(self._whole))]
            self._whole[bundle] = reading.read(raw)
        return self._whole[bundle]

    def _row(self, decisions: Decisions, bundle: str, in_force: Standing | None) -> Row:
        said = self._say(decisions, bundle)
        first = in_force.requests[0] if in_force and in_force.requests else None
        missing = in_force.missing.items() if in_force and in_force.state in _OPEN else ()
        return Row(
            bundle=bundle,
            name=said.name,
            version=said.version,
            model=said.model,
            state=_state(in_force),
            asked=first.issued if first else None,
            by=plain(first.person) if first else "",
            missing=", ".join(f"{count} × {plain(role)}" for role, count in missing if count),
            passed=said.passed,
            failed=said.failed,
            loosened=said.loosened,
            near=said.near,
            worse=said.worse,
            problem=said.problem,
        )

    def _earlier(self, decisions: Decisions, bundle: str) -> dict[str, list[tuple[str, float]]]:
        """Every task's figure over the versions of the same model, by their number, up to this one."""
        ours = self._say(decisions, bundle)
        last: dict[str, Said] = {}
        for other in decisions.bundles():
            said = self._say(decisions, other)
            if said.name == ours.name and _number(said.version) <= _number(ours.version):
                last[said.version] = said
        last[ours.version] = ours
        line = sorted(last.values(), key=lambda said: _number(said.version))[-20:]
        tasks = ours.figures
        return {task: [(one.version, one.figures[task]) for one in line if task in one.figures] for task in tasks}

    def _newer(self, decisions: Decisions, bundle: str, model: str) -> tuple[str, ...]:
        order = decisions.bundles()
        later = order[order.index(bundle) + 1 :] if bundle in order else []
        return tuple(other for other in later if self._say(decisions, other).model == model)[-3:]

    def _own_keys(self, policy: Policy, now: datetime) -> tuple[OwnKey, ...]:
        folder = local.keys_folder(self.settings)
        roles = set(policy.roles_for("approve"))
        found = []
        for name in keys.private_keys(folder):
            key = policy.keys.get(name)
            if key is not None and key.valid_at(now) and (own := [role for role in key.roles if role in roles]):
                found.append(OwnKey(key.id, plain(key.person), tuple(own), keys.encrypted(folder, name)))
        return tuple(found)

    def _fingerprint(self, bundle: str, in_force: Standing, previous: Sequence[str]) -> str:
        assert self._policy is not None
        about = [bundle, in_force.model, in_force.state, sorted(previous), self._policy[0]]
        return digests.of_json(about)

    def _mlflow(self, facts: Facts) -> str:
        if not (self.mlflow and facts.name and facts.version):
            return ""
        return f"{self.mlflow}/#/models/{quote(facts.name, safe='')}/versions/{quote(facts.version, safe='')}"

    def _warnings(self, decisions: Decisions, now: datetime) -> tuple[str, ...]:
        found = [decisions.stale] if decisions.stale else []
        try:
            decisions.check(now)
        except Refused as error:
            found.append(one_line(error))
        return tuple(map(plain, found))


def _state(in_force: Standing | None) -> str:
    return in_force.state if in_force else "pending"


def _event(entry: Entry, bundle: str, void: Refused | None) -> Event:
    """A statement, and why it counts for nothing: it does not verify, or is `void` beside the others."""
    said, refused = entry.statement, entry.refused or void
    return Event(
        id=plain(entry.name),
        decision=said.decision if said else "",
        person=plain(said.person) if said else "",
        role=plain(said.role) if said else "",
        reason=plain(said.reason) if said else "",
        issued=said.issued if said else entry.committed_at,
        expires=said.expires if said else None,
        key=said.key if said else "",
        commit=entry.commit,
        ours=said is None or said.bundle == bundle,
        refused=plain(one_line(refused)) if refused else "",
        check=refused.check if refused else "",
    )


def _digests(bundle: str, facts: Facts) -> tuple[Digest, ...]:
    """All that has a digest, each once by its name."""
    every = (Digest("bundle", bundle), *facts.digests, *facts.lineage)
    return tuple({one.anchor: one for one in every}.values())


def _commands(facts: Facts, in_force: Standing) -> tuple[str, ...]:
    """The commands that decide where the key is."""
    version = facts.version if facts.version.isdigit() else "VERSION"
    by = shlex.quote(in_force.may_sign[0]) if len(in_force.may_sign) == 1 else '"..."'
    ways = ("revoke",) if in_force.state == "approved" else ("approve", "reject") if facts.passed else ("reject",)
    return tuple(f'facemllm promote {way} {version} --by {by} --reason "..."' for way in ways)


def _named(raw: Mapping[str, Any], name: str) -> bool:
    return is_digest(raw.get({"card.md": "card", "sbom.json": "sbom"}.get(name, "")))


def _card(decisions: Decisions, bundle: str, raw: Mapping[str, Any]) -> str:
    if not _named(raw, "card.md"):
        return ""
    try:
        return plain(decisions.bundle_file(bundle, "card.md").decode("utf-8", "replace"), 100_000)
    except Refused as error:
        return plain(one_line(error))


def _number(version: str) -> int:
    return int(version) if version.isascii() and version.isdigit() and len(version) < 16 else 0


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
