"""The steps of the workflow, in order: the one list that Kubeflow's graph, the commands and DVC's graph come from."""

from __future__ import annotations

from facemllm.annotate.step import STEP as ANNOTATE
from facemllm.core.step import Step
from facemllm.evaluate.step import evaluate_step
from facemllm.ingest.step import STEP as INGEST
from facemllm.promote.step import AWAIT_APPROVAL, GATE, register_step
from facemllm.reformat.step import STEP as REFORMAT
from facemllm.serve.step import DEPLOY, RELEASE
from facemllm.settings import Settings
from facemllm.train.step import stage_step
from facemllm.validate.step import STEP as VALIDATE
from facemllm.version.step import STEP as VERSION

DATA = (INGEST, ANNOTATE, REFORMAT, VALIDATE, VERSION)
"""The data half, which DVC runs on its own."""


def steps(settings: Settings) -> dict[str, Step]:
    """All steps by name, in the order in which they run; the training stages are those of the settings."""
    stages = [stage_step(settings, name) for name in settings.stages()]
    last = stages[-1].name
    found = (*DATA, *stages, evaluate_step(last), GATE, register_step(last), DEPLOY, AWAIT_APPROVAL, RELEASE)
    return {step.name: step for step in found}
