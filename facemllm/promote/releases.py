"""Which model is in production, and which were before: by the signed releases in the decisions repository.

Releases and rollbacks stand in the order in which the repository got them. One that says it replaces what had been
replaced already lost a race, and counts for nothing: of two at once the first wins. MLflow's alias `champion` mirrors
what is found here, and is never read.
"""

from __future__ import annotations

from collections.abc import Iterable

from facemllm.errors import UserError
from facemllm.promote import decided
from facemllm.settings import Settings
from facemllm.signing import local
from facemllm.signing.decisions import Decisions
from facemllm.signing.policy import RELEASER
from facemllm.signing.statements import Decision, Draft, Statement, sign

RELEASES = ("release", "rollback")


def in_force(decisions: Decisions) -> list[Statement]:
    """The releases and rollbacks that count, oldest first; the last one says what is in production."""
    found: list[Statement] = []
    current: str | None = None
    former: set[str | None] = set()
    for entry in decisions.statements():
        one = entry.statement
        if one is None or one.decision not in RELEASES or (one.replaces != current and one.replaces in former):
            continue
        found.append(one)
        former = (former | {current}) - {one.model}
        current = one.model
    return found


def newest(settings: Settings) -> Statement | None:
    """The release in force: what is in production, and since when. None before the first.

    Raises Refused where the repository's history does not hold, UserError where it cannot be read.
    """
    known = decided.decisions(settings)
    found = in_force(known[0]) if known else []
    return found[-1] if found else None


def former(releases: Iterable[Statement]) -> Statement | None:
    """The release that a rollback goes back to: the one below the newest, rolled back ones left out; None if there is
    none."""
    kept: list[Statement] = []
    for one in releases:
        if one.decision == "rollback" and one.model in (models := [before.model for before in kept]):
            del kept[models.index(one.model) + 1 :]
        elif not kept or kept[-1].model != one.model:
            kept.append(one)
    return kept[-2] if len(kept) > 1 else None


def record(
    settings: Settings, decisions: Decisions, decision: Decision, bundle: str, model: str, reason: str
) -> Statement:
    """Sign and append a release or rollback, in place of what is in production now.

    Raises UserError, naming the winner, if another release reached the repository first: then nothing is to be served.
    """
    decisions.refresh()
    before = in_force(decisions)
    replaces = before[-1].model if before else None
    draft = Draft(decision, bundle, model, reason, RELEASER, decisions.previous(model), replaces=replaces)
    made = decisions.append(sign(draft, local.pipeline_signer(settings, RELEASER)))  # and reads on
    after = in_force(decisions)
    if made.id not in {one.id for one in after}:
        won = after[min(len(before), len(after) - 1)]
        raise UserError(
            f"another release was first: {won.words}, of model {won.model[:12]}; nothing was changed here, "
            "look at `facemllm promote list` and release again if that is still wanted"
        )
    return made
