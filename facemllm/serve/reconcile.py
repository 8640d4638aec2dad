"""What is approved and does not serve is released: what a webhook that got lost, or a release that was killed, left.

Nothing is decided here. A model is released that people approved after its last release, or the one that the newest
signed release names where another one serves. One that failed its trial has a release, and a rollback behind it: it
waits for a new approval. So however often, and by however many at once, this is called, a model is released once.
"""

from __future__ import annotations

from dataclasses import dataclass

from facemllm.errors import UserError
from facemllm.promote import registry, releases
from facemllm.serve import release
from facemllm.serve.deploy import Endpoint
from facemllm.serve.targets import target_of
from facemllm.settings import Settings
from facemllm.signing import local
from facemllm.signing.authorization import authorize
from facemllm.signing.canonical import Refused
from facemllm.signing.decisions import Decisions
from facemllm.signing.statements import Statement


@dataclass(frozen=True)
class Due:
    """A model that should serve and does not, and why."""

    digest: str
    why: str


def due(settings: Settings) -> Due | None:
    """The model that is to be released now; None where all is as it was decided. Raises UserError where decisions,
    policy or the cluster cannot be read."""
    policy = local.policy(settings)
    decisions = Decisions.open(settings, policy)
    entries = [entry.statement for entry in decisions.statements()]
    in_force = releases.in_force(decisions)
    approved: list[tuple[Statement, ...]] = []
    for model in dict.fromkeys(one.model for one in entries if one is not None and one.decision == "approve"):
        try:
            approved.append(authorize(model, decisions, policy).approvals)
        except Refused as refused:
            if refused.check in ("history", "clock"):
                raise
    last = {one.model: one.issued for one in in_force}
    new = [max(every, key=lambda one: one.issued) for every in approved if every]
    new = [one for one in new if one.model not in last or last[one.model] < one.issued]
    if new:
        newest = max(new, key=lambda one: one.issued)
        return Due(newest.model, f"approved by {newest.person} and not released since")
    if not in_force or in_force[-1].model not in {every[0].model for every in approved if every}:
        return None
    serving = target_of(settings).serving()
    if serving is not None and serving.digest == in_force[-1].model:
        return None
    other = f"model {serving.digest[:12]}" if serving else "nothing"
    return Due(in_force[-1].model, f"released, and {other} serves")


def reconcile(settings: Settings) -> tuple[Due | None, Endpoint | None]:
    """Release what is `due`, as `release.switch` does; None twice where nothing is. Raises UserError as that."""
    found = due(settings)
    if found is None:
        return None, None

    def still() -> None:
        if due(settings) != found:
            raise UserError(f"model {found.digest[:12]} was released by somebody else meanwhile; nothing was done")

    version = registry.of_digest(settings, found.digest).version
    return found, release.switch(settings, version, "release", f"reconciled: {found.why}", still=still)
