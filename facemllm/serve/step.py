"""The steps `deploy` and `release`: a registered version in staging, an approved one in production."""

from __future__ import annotations

import json

from facemllm.core.step import Condition, Context, Outcome, Step, section


def _deploy(c: Context) -> Outcome:
    """The version in staging, proved by held-out faces."""
    from facemllm.core.servers import evaluated_file
    from facemllm.promote import registry
    from facemllm.promote.registry import model_dir
    from facemllm.serve import deploy, evaluated
    from facemllm.serve.probe import probe_of

    version = registry.find_version(c.settings, c.inputs["version"])
    folder = model_dir(c.settings, version)
    metrics = json.loads((c.store.path(version.evaluation) / "metrics.json").read_text("utf-8"))
    evaluated.write(metrics, evaluated_file(c.settings, version.digest))
    probe, parity = probe_of(c.store, version.evaluation), deploy.parity_of(c.settings, c.store, version.evaluation)
    endpoint = deploy.deploy(c.settings, folder, version.digest, str(version.version), probe, parity)
    return Outcome(version.digest, endpoint.predict_url, output=endpoint.predict_url)


def _release(c: Context) -> Outcome:
    """An approved version in production. Raises UserError for any other, and where a source's terms forbid serving."""
    from facemllm.serve.release import switch

    endpoint = switch(c.settings, c.inputs["version"], "release")
    return Outcome(endpoint.digest, endpoint.predict_url, output=endpoint.predict_url)


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
