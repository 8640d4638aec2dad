"""The signed decisions of this project for whoever only reads: nothing is made where there is none yet."""

from __future__ import annotations

from facemllm.settings import Settings
from facemllm.signing.decisions import Decisions
from facemllm.signing.policy import Policy, read_policy


def decisions(settings: Settings) -> tuple[Decisions, Policy] | None:
    """The decisions repository and the policy; None on a machine where nobody has asked for a decision yet.

    Raises UserError where the settings name what cannot be read, Refused for a history that does not hold.
    """
    policy_file = settings.policy_file
    if settings.promote.policy is None and not policy_file.exists():
        return None
    made = (settings.signing / "decisions").exists() or settings.checkpoint.exists()
    if settings.promote.decisions is None and not made:
        return None
    policy = read_policy(policy_file)
    return Decisions.open(settings, policy), policy
