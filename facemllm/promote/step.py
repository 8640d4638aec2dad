"""The steps `gate`, `register` and `await_approval`: may a model be served, by rules, then by people."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from facemllm.core import digests
from facemllm.core.step import PARENT_RUN, Condition, Context, Outcome, Step, section, write_json
from facemllm.errors import UserError
from facemllm.settings import Settings


def _gate(c: Context) -> Outcome:
    """The verdict on an evaluation: `passed`, or `refused`, which also takes a registered model's standing away."""
    from facemllm.promote import gates, registry

    evaluation, champion = c.inputs["evaluation"], c.inputs["champion"]
    judged = gates.verdict(c.settings, evaluation, champion=champion, answered=partial(_champion_evaluation, c))
    decision = judged.decision
    if not decision.passed:
        registry.withdraw(c.settings, judged.origin.model, decision.reasons)
    gate = {"passed": decision.passed, "reasons": list(decision.reasons)}
    result = {**gate, "checks": decision.checks, "loosened": decision.loosened, "evaluation": evaluation}
    digest = write_json(c.out, "gate.json", result)
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
    if not (c.settings.home / "store" / digest).is_dir():
        registry.model_dir(c.settings, registry.of_digest(c.settings, digest))
    made = c.nested("evaluate", model=digest, conversations=metrics["conversations_digest"])
    return c.store.path(str(made["output"]))


def _register(c: Context) -> Outcome:
    """The model as a version in the registry. The gate judges again here: no stored record of it is believed."""
    from facemllm.promote import gates, registry

    model, evaluation, champion = c.inputs["model"], c.inputs["evaluation"], _champion(c.settings)
    against = replace(c, inputs={**c.inputs, "champion": champion})
    answered = partial(_champion_evaluation, against)
    judged = gates.verdict(c.settings, evaluation, model=model, champion=champion, answered=answered)
    decision = judged.decision
    version = registry.register(
        c.settings,
        model_dir=c.path("model"),
        model_digest=model,
        evaluation=judged.metrics,
        evaluation_digest=evaluation,
        gate={"passed": decision.passed, "reasons": list(decision.reasons)},
        run_id=os.environ.get(PARENT_RUN),
    )
    facts = {"name": version.name, "version": version.version, "model_digest": model}
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
    """What people have decided: `approved`, `rejected` or `pending`; asked for first, where nobody has yet."""
    from facemllm.promote import decide

    decide.request_unless_asked(c.settings, c.inputs["version"])
    state = decide.await_decision(c.settings, c.inputs["version"], c.settings.promote.wait_minutes)
    return Outcome(digests.of_json({"version": c.inputs["version"], "state": state}), state, output=state)


def _judged_by(settings: Settings) -> dict[str, Any]:
    """What a verdict depends on beside its inputs."""
    from facemllm.promote import gates

    return {"promote": gates.depends(settings)}


GATE = Step(
    name="gate",
    module="facemllm.promote.gates",
    sections=_judged_by,
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
    module="facemllm.promote.decide",
    sections=section("promote"),
    inputs={"version": "register"},
    work=_await_approval,
    after=("deploy",),
    keeps=False,
)
