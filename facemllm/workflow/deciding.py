"""The steps that decide and serve, from the gate to production: each calls the plain functions of its room."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from facemllm.core import digests
from facemllm.core.step import PARENT_RUN, Context, Outcome, write_json
from facemllm.errors import UserError
from facemllm.settings import Settings
from facemllm.tables import CONVERSATIONS, open_table
from facemllm.version import ledger


def gate(c: Context) -> Outcome:
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


def champion(settings: Settings) -> str:
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


def register(c: Context) -> Outcome:
    """The model as a version in the registry."""
    from facemllm.promote import registry

    metrics = json.loads((c.path("evaluation") / "metrics.json").read_text("utf-8"))
    version = registry.register(
        c.settings,
        model_dir=c.path("model"),
        model_digest=c.inputs["model"],
        evaluation=metrics,
        evaluation_digest=c.inputs["evaluation"],
        gate=_gate_of(c),
        run_id=os.environ.get(PARENT_RUN),
    )
    facts = {"name": version.name, "version": version.version, "model_digest": c.inputs["model"]}
    digest = write_json(c.out, "registered.json", facts)
    return Outcome(digest, f"{version.name} version {version.version}", output=str(version.version), facts=facts)


def _gate_of(c: Context) -> dict[str, Any]:
    """The gate's verdict with its reasons, as the gate left it in the store."""
    record = c.nested("gate", evaluation=c.inputs["evaluation"], champion=champion(c.settings))
    gate: dict[str, Any] = record["gate"]
    return gate


def still_registered(settings: Settings, record: Mapping[str, Any]) -> bool:
    """Whether a remembered version is still registered with the same bytes, and in standing."""
    from facemllm.promote import registry

    try:
        version = registry.find_version(settings, record["output"])
        return bool(version.digest == record["model_digest"] and version.gate == "passed")
    except UserError:
        return False


def deploy(c: Context) -> Outcome:
    """The version in staging, proved by one question."""
    from facemllm.promote import registry
    from facemllm.serve import deploy

    version = registry.find_version(c.settings, c.inputs["version"])
    folder = model_dir(c.settings, version)
    endpoint = deploy.deploy(c.settings, folder, version.digest, str(version.version), _probe(c, version))
    return Outcome(version.digest, endpoint.predict_url, output=endpoint.predict_url)


def await_approval(c: Context) -> Outcome:
    """What a person has decided: `approved`, `rejected` or `pending`."""
    from facemllm.promote import approvals

    state = approvals.await_decision(c.settings, c.inputs["version"], c.settings.promote.wait_minutes)
    return Outcome(digests.of_json({"version": c.inputs["version"], "state": state}), state, output=state)


def release(c: Context) -> Outcome:
    """An approved version in production. Raises UserError for any other, and where a source's terms forbid serving."""
    from facemllm.promote import approvals, registry
    from facemllm.serve import deploy

    version = approvals.require_approved(c.settings, c.inputs["version"])
    folder = model_dir(c.settings, version)
    ledger.require(c.settings, ledger.sources_of_model(folder), "serve")
    before = registry.champion(c.settings)
    put_back = before is not None and approvals.state(c.settings, before.version) == "approved"
    number = str(version.version)
    endpoint = deploy.release(c.settings, folder, version.digest, number, _probe(c, version), put_back=put_back)
    registry.set_alias(c.settings, version.version, "champion")
    return Outcome(version.digest, endpoint.predict_url, output=endpoint.predict_url)


def model_dir(settings: Settings, version: Any) -> Path:
    """Folder with a registered version's bytes, checked against its digest; fetched from MLflow if not here.

    Raises UserError when the bytes are not the registered ones.
    """
    path = settings.home / "store" / version.digest
    if not path.is_dir():
        from facemllm.promote import registry

        return registry.fetch(settings, version.version, path)
    if digests.of_tree(path) != version.digest:
        raise UserError(
            f"{path}: the model's bytes do not match the digest of version {version.version} "
            f"({version.digest[:12]}); remove that folder and run again to fetch the registered bytes"
        )
    return path


def _probe(c: Context, version: Any) -> Any:
    """One closed question about one held-out face that evaluation answered, with the face's very bytes."""
    from facemllm.serve.deploy import Probe

    evaluation = c.store.path(version.evaluation)
    metrics = json.loads((evaluation / "metrics.json").read_text("utf-8"))
    samples = json.loads((evaluation / "samples" / "samples.json").read_text("utf-8"))
    asked = [(s["image_id"], q) for s in samples for q in s["questions"] if q["metric"] != "fact_f1"]
    if not asked:
        raise UserError(
            "evaluation asked no closed question that staging could be proved by; add a task to reformat.tasks"
        )
    image_id, question = max(asked, key=lambda pair: (pair[1]["parsed"] is not None, pair[1]["metric"] != "mae"))
    conversations = open_table(c.store.path(metrics["conversations_digest"]), CONVERSATIONS)
    faces = conversations.iterate(["image_id", "images", "segmentation"], metrics["split"])
    face = next(face for face in faces if face["image_id"] == image_id)
    shown = (face["segmentation"] or {}).get("bytes") if metrics.get("maps") else None
    return Probe(face["images"][0]["bytes"], question["question"], question["raw"], question["parsed"], shown)
