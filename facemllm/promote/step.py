"""The steps `gate`, `register` and `await_approval`: may a model be served, by rules, then by people."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from facemllm.core import digests
from facemllm.core.step import PARENT_RUN, Condition, Context, Outcome, Step, section, write_json
from facemllm.errors import UserError
from facemllm.settings import Settings


def _gate(c: Context) -> Outcome:
    """The verdict on an evaluation: `passed`, or `refused`, which also takes a registered model's standing away."""
    from facemllm.promote import gates, registry

    candidate = c.path("evaluation")
    metrics = json.loads((candidate / "metrics.json").read_text("utf-8"))
    conversations = c.store.path(metrics["conversations_digest"])
    decision = gates.decide(c.settings, conversations, candidate, _champion_evaluation(c, metrics))
    if not decision.passed:
        registry.withdraw(c.settings, metrics["model_digest"], decision.reasons)
    gate = {"passed": decision.passed, "reasons": list(decision.reasons)}
    digest = write_json(c.out, "gate.json", {**gate, "checks": decision.checks, "evaluation": c.inputs["evaluation"]})
    verdict = "passed" if decision.passed else "refused"
    figure = verdict if decision.passed else f"refused: {decision.reasons[0]}"
    return Outcome(digest, figure, output=verdict, facts={"gate": gate})


def _champion(settings: Settings) -> str:
    """Digest of the model in production; empty if there is none."""
    from facemllm.promote import registry

    champion = registry.champion(settings)
    return champion.digest if champion else ""


def _champion_evaluation(c: Context, metrics: Mapping[str, Any]) -> Path | None:
    """The champion's predictions on the candidate's own items: recalled, or made now with the champion's bytes."""
    from facemllm.promote import registry

    digest = c.inputs["champion"]
    if not digest or digest == metrics["model_digest"]:
        return None
    model_dir(c.settings, registry.find_version(c.settings, "champion"))
    made = c.nested("evaluate", model=digest, conversations=metrics["conversations_digest"])
    return c.store.path(str(made["output"]))


def _register(c: Context) -> Outcome:
    """The model as a version in the registry."""
    from facemllm.promote import registry

    metrics = json.loads((c.path("evaluation") / "metrics.json").read_text("utf-8"))
    gate: Mapping[str, Any] = c.nested("gate", evaluation=c.inputs["evaluation"], champion=_champion(c.settings))
    version = registry.register(
        c.settings,
        model_dir=c.path("model"),
        model_digest=c.inputs["model"],
        evaluation=metrics,
        evaluation_digest=c.inputs["evaluation"],
        gate=gate["gate"],
        run_id=os.environ.get(PARENT_RUN),
    )
    facts = {"name": version.name, "version": version.version, "model_digest": c.inputs["model"]}
    digest = write_json(c.out, "registered.json", facts)
    return Outcome(digest, f"{version.name} version {version.version}", output=str(version.version), facts=facts)


def _still_registered(settings: Settings, record: Mapping[str, Any]) -> bool:
    """Whether a remembered version is still registered with the same bytes, and in standing."""
    from facemllm.promote import registry

    try:
        version = registry.find_version(settings, record["output"])
        return bool(version.digest == record["model_digest"] and version.gate == "passed")
    except UserError:
        return False


def _await_approval(c: Context) -> Outcome:
    """What a person has decided: `approved`, `rejected` or `pending`."""
    from facemllm.promote import approvals

    state = approvals.await_decision(c.settings, c.inputs["version"], c.settings.promote.wait_minutes)
    return Outcome(digests.of_json({"version": c.inputs["version"], "state": state}), state, output=state)


def model_dir(settings: Settings, version: Any) -> Path:
    """Folder with a registered version's bytes, checked against its digest; fetched from MLflow if not here.

    Raises UserError when the bytes are not the registered ones.
    """
    path = settings.home / "store" / version.digest
    if not path.is_dir():
        from facemllm.promote import registry

        return registry.fetch(settings, version.version, path)
    if digests.of_tree(path, fresh=True) != version.digest:
        raise UserError(
            f"{path}: the model's bytes do not match the digest of version {version.version} "
            f"({version.digest[:12]}); remove that folder and run again to fetch the registered bytes"
        )
    return path


GATE = Step(
    name="gate",
    module="facemllm.promote.gates",
    sections=section("promote", promote={"wait_minutes", "policy", "decisions", "rule", "notify"}),
    inputs={"evaluation": "evaluate"},
    work=_gate,
    world={"champion": _champion},
    still=lambda settings, record: record["output"] == "passed",  # the registry hears of a refusal every time
)


def register_step(last_stage: str) -> Step:
    """The step `register`, of the model that the last training stage gives."""
    return Step(
        name="register",
        module="facemllm.promote.registry",
        sections=lambda s: {"model_name": s.promote.model_name, "tracking": s.tracking.model_dump()},
        inputs={"model": last_stage, "evaluation": "evaluate", "gate": "gate"},
        work=_register,
        when=Condition("gate-passed", "gate", "passed"),
        still=_still_registered,
    )


AWAIT_APPROVAL = Step(
    name="await_approval",
    module="facemllm.promote.approvals",
    sections=section("promote"),
    inputs={"version": "register"},
    work=_await_approval,
    after=("deploy",),
    keeps=False,
)
