"""The steps `deploy` and `release`: a registered version in staging, an approved one in production."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from facemllm.core.step import Condition, Context, Outcome, Step, section
from facemllm.core.store import Store
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
    endpoint = deploy.deploy(
        c.settings, folder, version.digest, str(version.version), probe_of(c.store, version.evaluation)
    )
    return Outcome(version.digest, endpoint.predict_url, output=endpoint.predict_url)


def _release(c: Context) -> Outcome:
    """An approved version in production. Raises UserError for any other, and where a source's terms forbid serving."""
    from facemllm.serve.release import switch

    endpoint = switch(c.settings, c.inputs["version"], "release")
    return Outcome(endpoint.digest, endpoint.predict_url, output=endpoint.predict_url)


def probe_of(store: Store, evaluation: str) -> Probe:
    """One closed question about one held-out face that evaluation answered, with the face's very bytes."""
    from facemllm import tasks
    from facemllm.scoring.metrics import get
    from facemllm.serve.deploy import Probe
    from facemllm.tables import CONVERSATIONS, open_table

    folder = store.path(evaluation)
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    samples = json.loads((folder / "samples" / "samples.json").read_text("utf-8"))
    asked = [(s["image_id"], q, get(q["metric"]).answers) for s in samples for q in s["questions"]]
    asked = [one for one in asked if tasks.get(one[1]["task"]).item(one[1]["item"]).options]
    if not asked:
        silent = "evaluation asked no closed question that staging could be proved by"
        raise UserError(f"{silent}; add a task to reformat.tasks")
    image_id, question, _ = max(asked, key=lambda one: (one[1]["parsed"] is not None, one[2] != "number"))
    conversations = open_table(store.path(metrics["conversations_digest"]), CONVERSATIONS)
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
    module="facemllm.serve.release",
    sections=section("serve"),
    inputs={"version": "register"},
    work=_release,
    when=Condition("approved", "await_approval", "approved"),
    keeps=False,
)
