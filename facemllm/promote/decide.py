"""Asking for a decision about a registered version, and taking one: signed statements about its bundle.

What a version is comes from MLflow, which anybody may have written to: nothing is signed unless the bundle in the
decisions repository says the same of it. What is in force comes from the repository and the policy alone; MLflow's
version tags `facemllm.approval` and `facemllm.statement` mirror it for whoever looks there, and are never read back.

    facemllm promote approve 3 --reason "figures hold, card read"
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Literal, get_args

from facemllm.core import progress
from facemllm.errors import UserError, one_line
from facemllm.promote import decided, notices
from facemllm.promote.registry import Version, find_version, set_tags
from facemllm.settings import Settings
from facemllm.signing import local
from facemllm.signing.canonical import Refused, time_text, utc_now
from facemllm.signing.decisions import Decisions
from facemllm.signing.keys import Passphrase, Signer
from facemllm.signing.policy import PIPELINE, Policy
from facemllm.signing.standing import Standing, require_counts, standing
from facemllm.signing.statements import LONGEST_REASON, Draft, Statement, sign, verify

log = logging.getLogger(__name__)

Verdict = Literal["approve", "reject", "revoke"]
APPROVAL, STATEMENT = "facemllm.approval", "facemllm.statement"
POLL_S = 5.0
_OPEN = ("pending", "requested", "expired")


@dataclass(frozen=True)
class Who:
    """Who signs here: the person (None: the only one with a fitting key, else git's user.name), key and role, and where
    a passphrase comes from."""

    person: str | None = None
    key: str | None = None
    role: str | None = None
    passphrase: Passphrase | None = None


def request(settings: Settings, version: Version | int | str, who: Who | None = None, note: str = "") -> Statement:
    """Collect the bundle of a version and ask for a decision about it; `who=None` asks as the pipeline.

    A request for the same bundle that is in force is not made twice. Raises UserError when the version does not pass
    its gate, or the policy lets nobody here ask.
    """
    from facemllm.promote import bundle as bundles

    found = _version(settings, version)
    policy, decisions = _opened(settings)
    bundle = bundles.collect(settings, found)
    gate = bundle.facts["gate"]
    if not gate["passed"]:
        why = "; ".join(map(str, gate.get("reasons") or ())) or "run the pipeline again"
        raise UserError(f"{_name(found)} does not pass its gate: {why}; nobody can decide on it")
    decisions.append_bundle(bundle.files)
    _sign_model(settings, found, decisions)
    if asked := _asked(decisions, policy, bundle.digest):
        return asked
    signer: Signer
    if who is None:
        signer, role = local.pipeline_signer(settings), PIPELINE
    else:
        signer, role = local.person_signer(settings, "request", who.person, who.key, who.role, who.passphrase)
    draft = Draft("request", bundle.digest, found.digest, checked_reason(note), role, decisions.previous(found.digest))
    made = decisions.append(sign(draft, signer))
    notices.notify(settings, "requested", notices.facts_of(made, found.version))
    mirror(settings, found, f"requested by {made.person}", made)
    return made


def request_unless_asked(settings: Settings, version: Version | int | str) -> Statement | None:
    """Ask as the pipeline, unless there is a request about this version's evaluation, or the policy has people ask."""
    found = _version(settings, version)
    policy, decisions = _opened(settings)
    if (now := about(decisions, policy, found)) is not None and now.state != "expired":
        return now.requests[-1] if now.requests else None
    if PIPELINE not in policy.rule.request_by:
        return None
    return request(settings, found)


def decide(settings: Settings, version: Version | int | str, verdict: Verdict, reason: str, who: Who) -> Statement:
    """Approve, reject or revoke a version: sign the statement about the bundle that was last asked about.

    Raises UserError when nobody asked, MLflow and the bundle do not tell of the same model, or no key here may sign;
    Refused when the statement would count for nothing.
    """
    assert verdict in get_args(Verdict)
    why = checked_reason(reason)
    if not why:
        raise UserError('a decision needs a reason: --reason "..."')
    found = _version(settings, version)
    signer, role = local.person_signer(settings, verdict, who.person, who.key, who.role, who.passphrase)
    policy, decisions = _opened(settings, check=verdict == "approve")  # after the key, which may be the policy's first
    now = about(decisions, policy, found)
    if now is None:
        raise UserError(f"nobody asked for a decision on {_name(found)}: `facemllm promote request {found.version}`")
    if verdict == "approve" and not decisions.bundle(now.bundle).get("gate", {}).get("passed"):
        raise UserError(f"{_name(found)} did not pass its gate; nobody can approve it")
    draft = Draft(verdict, now.bundle, found.digest, why, role, decisions.previous(found.digest))
    return take(settings, decisions, policy, draft, signer, found)


def take(
    settings: Settings, decisions: Decisions, policy: Policy, draft: Draft, signer: Signer, version: Version | int | str
) -> Statement:
    """Sign a decision as drafted, add it, send notice of it and mirror it in MLflow, which may be away.

    An approval holds as long as the policy lets it. Raises Refused when the statement would count for nothing.
    """
    issued = utc_now()
    expires = issued + timedelta(days=policy.rule.valid_days) if draft.decision == "approve" else None
    envelope = sign(replace(draft, issued=issued, expires=expires), signer)
    require_counts(decisions, policy, verify(envelope, policy), issued)
    made = decisions.append(envelope)  # which reads on to what is there now
    number = version.version if isinstance(version, Version) else version
    notices.notify(settings, "decided", notices.facts_of(made, number))
    mirror(settings, version, words(standing(decisions, policy, draft.bundle)), made)
    return made


def about(decisions: Decisions, policy: Policy, version: Version) -> Standing | None:
    """What is in force about a version's evaluation; None where nobody asked.

    Raises Refused ("other_model", "other_bundle") where MLflow's version is not the one that the bundle is about.
    """
    entries = decisions.statements(version.digest, policy)
    asked = [e.statement for e in entries if e.statement is not None and e.statement.decision == "request"]
    for one in reversed(asked):
        bundle = decisions.bundle(one.bundle)
        if bundle.get("evaluation", {}).get("digest") != version.evaluation:
            continue
        named = bundle.get("model", {})
        if (named.get("name"), named.get("version")) != (version.name, version.version):
            said = f"{named.get('name')} version {named.get('version')}"
            what = f"MLflow says that {version.name} version {version.version} is model {version.digest[:12]}"
            raise Refused("other_model", f"{what}, which was registered as {said}; somebody changed MLflow")
        return standing(decisions, policy, one.bundle)
    return None


def state(settings: Settings, version: Version | int | str) -> str:
    """`approved`, `rejected`, `revoked`, `expired`, `requested`, or `pending` when nobody asked."""
    known = decided.decisions(settings)
    found = about(known[0], known[1], _version(settings, version)) if known else None
    return found.state if found else "pending"


def await_decision(settings: Settings, version: int | str, wait_minutes: float) -> str:
    """Wait at most `wait_minutes` for a decision, looking every few seconds; 0 looks once. Returns the state then.

    `revoked` counts as rejected, all that is not decided yet as pending. Raises UserError if the version is unknown, or
    the decisions cannot be read when the time is over.
    """
    found = _version(settings, version)
    current = _plain(state(settings, found))
    started, wait_s = time.monotonic(), wait_minutes * 60
    with progress.bar("waiting for a decision", max(1, round(wait_s))) as bar:
        while current == "pending" and (spent := time.monotonic() - started) < wait_s:
            bar.update(round(spent), f"a person decides: facemllm review, or promote approve|reject {version}")
            time.sleep(min(POLL_S, wait_s - spent))
            try:
                current = _plain(state(settings, found))
            except UserError:
                if time.monotonic() - started >= wait_s:
                    raise
    return current


def words(now: Standing | None) -> str:
    """What is in force, in a few words: for MLflow's tag and for tables."""
    if now is None:
        return "pending"
    if now.state == "approved" and now.expires:
        by = ", ".join(one.person for one in now.approvals)
        return f"approved by {by} until {time_text(now.expires)[:10]}"
    if now.against is not None:
        return f"{now.state} by {now.against.person}: {now.against.reason}"
    lacks = " and ".join(f"{count} {role}" for role, count in now.missing.items())
    return f"{now.state}; still to sign: {lacks}" if lacks else now.state


def mirror(settings: Settings, version: Version | int | str, text: str, statement: Statement) -> None:
    """Tell MLflow; that it is away, or calls other bytes by that number, is a warning: nothing reads it there."""
    try:
        found = version if isinstance(version, Version) else find_version(settings, version)
        if found.digest != statement.model:
            raise UserError(f"there {_name(found)} is another model")
        set_tags(settings, found, {APPROVAL: text[:5000], STATEMENT: statement.id})
    except UserError as error:
        log.warning("MLflow does not show the decision: %s", one_line(error))


def _plain(found: str) -> str:
    if found in _OPEN:
        return "pending"
    return "rejected" if found == "revoked" else found


def _opened(settings: Settings, check: bool = True) -> tuple[Policy, Decisions]:
    policy = local.policy(settings)
    decisions = Decisions.open(settings, policy)
    if check:
        decisions.check()
    return policy, decisions


def _asked(decisions: Decisions, policy: Policy, bundle: str) -> Statement | None:
    """The request for a bundle that is in force, unless what it led to has expired."""
    now = standing(decisions, policy, bundle)
    return now.requests[-1] if now.requests and now.state != "expired" and now.against is None else None


def _sign_model(settings: Settings, version: Version, decisions: Decisions) -> None:
    """The OpenSSF signature of the model's directory, by the pipeline's key where that lies here."""
    from facemllm.promote.registry import model_dir
    from facemllm.signing.model_signature import sign_model

    if decisions.signature(version.digest) is not None:
        return
    try:
        key = local.pipeline_signer(settings).key_id
    except UserError:
        return
    private = local.keys_folder(settings) / f"{key}.pem"
    decisions.append_signature(version.digest, sign_model(model_dir(settings, version), private))


def _version(settings: Settings, version: Version | int | str) -> Version:
    found = version if isinstance(version, Version) else find_version(settings, version)
    if not found.digest:
        raise UserError(f"{found.name} version {found.version} has no digest; it was not registered by this workflow")
    return found


def checked_reason(text: str) -> str:
    """A reason in one line. Raises UserError when it is longer than a statement holds."""
    why = " ".join(text.split())
    if len(why) > LONGEST_REASON:
        raise UserError(f"the reason is {len(why)} characters long; keep it below {LONGEST_REASON}")
    return why


def _name(version: Version) -> str:
    return f"{version.name} version {version.version} ({version.digest[:12]})"
