"""Releasing an approved version to production, and rolling back to a former one.

What production answers with is always recorded before its first answer: the signed release comes first, then the
server, its proof, and its trial with a part of the requests. A crash in between leaves a recorded release of a model
that does not serve (`facemllm services status` says so; release it again) while the former one goes on, never a model
that serves unrecorded. A model that fails its proof or its trial is taken down, the former one keeps every request, and
that it was rolled back to is recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from facemllm.core.servers import deployed
from facemllm.core.store import Store
from facemllm.errors import UserError, one_line
from facemllm.promote import notices, registry, releases
from facemllm.promote.registry import model_dir
from facemllm.serve import deploy
from facemllm.serve.probe import probes_of
from facemllm.serve.target import Target
from facemllm.serve.targets import target_of
from facemllm.settings import Settings
from facemllm.signing import local
from facemllm.signing.authorization import authorize
from facemllm.signing.canonical import Refused
from facemllm.signing.decisions import Decisions
from facemllm.signing.statements import Decision, Statement
from facemllm.version import ledger

log = logging.getLogger(__name__)


def switch(
    settings: Settings,
    version: int | str,
    decision: Decision,
    reason: str = "",
    parity: Callable[[str], object] | None = None,
    still: Callable[[], object] | None = None,
) -> deploy.Endpoint:
    """Put an approved version into production (`release` or `rollback`) and prove it.

    `parity`, given a server's address, raises UserError where its answers are not those of evaluation; `still`, called
    once no other release can come between, where this one is not wanted any more. Raises Refused
    with the check that failed, UserError when a release is under way or another one was first, or when the model fails
    its proof or its trial; the former model serves on then, if it is still approved.
    """
    made: list[Statement] = []
    target = target_of(settings)
    try:
        with target.held():
            if still is not None:
                still()
            return _switch(settings, target, version, decision, reason, made, parity)
    finally:
        for one in made:
            name = "released" if one.decision == "release" else "rolled_back"
            notices.notify(settings, name, notices.facts_of(one))


def former(settings: Settings) -> registry.Version:
    """The version that a rollback goes back to. Raises UserError where none was released before the one in force."""
    found = releases.former(releases.in_force(Decisions.open(settings)))
    if found is None:
        raise UserError("no version was released before this one; name one: `facemllm promote rollback --to VERSION`")
    return registry.of_digest(settings, found.model)


def problem(settings: Settings) -> str:
    """What production's server and the signed releases disagree about, in one line; empty if nothing."""
    released, serving = releases.newest(settings), deployed(settings, "production")
    if serving is None or (released is not None and released.model == serving.digest):
        return ""
    if released is None:
        return f"production was started with model {serving.digest[:12]}, which no signed release names"
    return (
        f"production was last started with model {serving.digest[:12]}, and the newest signed release is "
        f"{released.model[:12]}: `python pipeline.py release VERSION` or `facemllm promote rollback` settles it"
    )


def _switch(
    settings: Settings,
    target: Target,
    version: int | str,
    decision: Decision,
    reason: str,
    made: list[Statement],
    parity: Callable[[str], object] | None,
) -> deploy.Endpoint:
    found = registry.find_version(settings, version)
    if not found.digest:
        raise UserError(
            f"MLflow names no digest of {found.name} version {found.version}: somebody changed its tags there"
        )
    policy = local.policy(settings)
    decisions = Decisions.open(settings, policy)
    grounds = authorize(found.digest, decisions, policy)
    if decisions.stale:
        log.warning("%s", decisions.stale)
    bundle = decisions.bundle(grounds.bundle)
    _same_version(found, bundle)
    folder = model_dir(settings, found)
    ledger.require(settings, ledger.sources_of_model(folder), "serve")
    store, evaluation = Store(settings.home), str(bundle["evaluation"]["digest"])
    probes = probes_of(store, evaluation, settings.serve.canary.min_requests)
    parity = parity or deploy.parity_of(settings, store, evaluation)
    before = releases.in_force(decisions)
    serving = target.serving()

    def put_back(why: str) -> None:
        if serving is None or serving.digest not in {one.model for one in before}:
            raise Refused("other_model", "it was never released")
        ground = authorize(serving.digest, decisions, policy)
        why = f"version {found.version} failed: {why}"
        made.append(releases.record(settings, decisions, "rollback", ground.bundle, serving.digest, why))
        _mirror(settings, serving.digest)

    if not before or before[-1].model != found.digest:
        made.append(releases.record(settings, decisions, decision, grounds.bundle, found.digest, reason))
    number, back = str(found.version), put_back if before else None
    endpoint = deploy.release(
        settings,
        folder,
        found.digest,
        number,
        probes[0],
        put_back=back,
        questions=probes,
        parity=parity,
        target=target,
    )
    _mirror(settings, found.digest)
    return endpoint


def _same_version(version: registry.Version, bundle: Mapping[str, Any]) -> None:
    """Raises Refused where MLflow's version is not the one that people decided on."""
    named = bundle.get("model", {})
    if (named.get("name"), named.get("version")) != (version.name, version.version):
        said = f"was decided on as {named.get('name')} version {named.get('version')}"
        what = f"MLflow says that version {version.version} is model {version.digest[:12]}, which {said}"
        raise Refused("other_model", f"{what}; release that version, and find out who changed MLflow")


def _mirror(settings: Settings, digest: str) -> None:
    """Point MLflow's alias to what is in production; that MLflow is away is a warning, since nothing reads it there."""
    try:
        registry.set_alias(settings, registry.of_digest(settings, digest).version, registry.CHAMPION)
    except UserError as error:
        log.warning("MLflow's alias %s was not moved: %s", registry.CHAMPION, one_line(error))
