"""The steps `deploy` and `release`: a registered version in staging, an approved one in production."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from facemllm.core.step import Condition, Context, Outcome, Step, section
from facemllm.errors import UserError

if TYPE_CHECKING:
    from facemllm.serve.deploy import Probe


def _deploy(c: Context) -> Outcome:
    """The version in staging, proved by one question."""
    from facemllm.promote import registry
    from facemllm.promote.step import model_dir
    from facemllm.serve import deploy

    version = registry.find_version(c.settings, c.inputs["version"])
    folder = model_dir(c.settings, version)
    endpoint = deploy.deploy(c.settings, folder, version.digest, str(version.version), _probe(c, version))
    return Outcome(version.digest, endpoint.predict_url, output=endpoint.predict_url)


def _release(c: Context) -> Outcome:
    """An approved version in production. Raises UserError for any other, and where a source's terms forbid serving."""
    from facemllm.promote import approvals, registry
    from facemllm.promote.step import model_dir
    from facemllm.serve import deploy
    from facemllm.version import ledger

    version = approvals.require_approved(c.settings, c.inputs["version"])
    folder = model_dir(c.settings, version)
    ledger.require(c.settings, ledger.sources_of_model(folder), "serve")
    before = registry.champion(c.settings)
    put_back = before is not None and approvals.state(c.settings, before.version) == "approved"
    number = str(version.version)
    endpoint = deploy.release(c.settings, folder, version.digest, number, _probe(c, version), put_back=put_back)
    registry.set_alias(c.settings, version.version, "champion")
    return Outcome(version.digest, endpoint.predict_url, output=endpoint.predict_url)


def _probe(c: Context, version: Any) -> Probe:
    """One closed question about one held-out face that evaluation answered, with the face's very bytes."""
    from facemllm import tasks
    from facemllm.scoring.metrics import get
    from facemllm.serve.deploy import Probe
    from facemllm.tables import CONVERSATIONS, open_table

    evaluation = c.store.path(version.evaluation)
    metrics = json.loads((evaluation / "metrics.json").read_text("utf-8"))
    samples = json.loads((evaluation / "samples" / "samples.json").read_text("utf-8"))
    asked = [(s["image_id"], q, get(q["metric"]).answers) for s in samples for q in s["questions"]]
    asked = [one for one in asked if tasks.get(one[1]["task"]).item(one[1]["item"]).options]
    if not asked:
        silent = "evaluation asked no closed question that staging could be proved by"
        raise UserError(f"{silent}; add a task to reformat.tasks")
    image_id, question, _ = max(asked, key=lambda one: (one[1]["parsed"] is not None, one[2] != "number"))
    conversations = open_table(c.store.path(metrics["conversations_digest"]), CONVERSATIONS)
    faces = conversations.iterate(["image_id", "images", "segmentation"], metrics["split"])
    face = next(face for face in faces if face["image_id"] == image_id)
    segmentation = (face["segmentation"] or {}).get("bytes") if metrics.get("maps") else None
    return Probe(face["images"][0]["bytes"], question["question"], question["raw"], question["parsed"], segmentation)


DEPLOY = Step(
    name="deploy",
    module="facemllm.serve.deploy",
    sections=section("serve"),
    inputs={"version": "register"},
    work=_deploy,
    keeps=False,
)
RELEASE = Step(
    name="release",
    module="facemllm.serve.deploy",
    sections=section("serve"),
    inputs={"version": "register"},
    work=_release,
    when=Condition("approved", "await_approval", "approved"),
    keeps=False,
)
