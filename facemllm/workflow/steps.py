"""The steps of the workflow, in order: the one list that Kubeflow's graph, the commands and DVC's graph come from.

    python -m facemllm.workflow.steps > dvc.yaml

makes DVC's graph of the data half. A stage there depends on the tables it reads, on its section of params.yaml, and on
the rooms that hold the code behind it.
"""

from __future__ import annotations

from facemllm.annotate.step import STEP as ANNOTATE
from facemllm.core import digests
from facemllm.core.step import Step
from facemllm.evaluate.step import evaluate_step
from facemllm.ingest.step import STEP as INGEST
from facemllm.promote.step import AWAIT_APPROVAL, GATE, register_step
from facemllm.reformat.step import STEP as REFORMAT
from facemllm.serve.step import DEPLOY, RELEASE
from facemllm.settings import Settings, load
from facemllm.train.step import stage_step
from facemllm.validate.step import STEP as VALIDATE
from facemllm.version.step import STEP as VERSION

DATA = (INGEST, ANNOTATE, REFORMAT, VALIDATE, VERSION)
"""The data half, which DVC runs on its own."""
_HEAD = """\
# Made by `python -m facemllm.workflow.steps > dvc.yaml` from the steps there; edit those.
# The data half of the workflow on its own: `.venv/bin/dvc repro`, `.venv/bin/dvc exp run -S ingest.identities=60`.
# `exp run --temp` and `--queue` work in a copy of the project under .dvc/tmp/exps: give version.repository and
# version.remote as absolute paths then, or the revision is recorded in the copy and goes with it.
vars:
  - facemllm: PATH=".venv/bin:../../../../.venv/bin:../../../../../.venv/bin:$PATH" python -m facemllm
stages:
"""
_STAGES = {
    "ingest": ("data/faces", "ingest data/faces"),
    "annotate": ("data/annotated", "annotate data/faces data/annotated"),
    "reformat": ("data/conversations", "reformat data/annotated data/conversations"),
    "validate": ("data/validation", "validate data/annotated data/conversations data/validation --faces data/faces"),
    "version": ("data/revision.json", "version record data/annotated data/conversations --json > data/revision.json"),
}
"""What a stage of DVC writes, and its command."""


def steps(settings: Settings) -> dict[str, Step]:
    """All steps by name, in the order in which they run; the training stages are those of the settings.

    Raises UserError when tasks, attributes or rules of the gate are named that there are none of: before anything runs.
    """
    from facemllm.promote.gates import known_rules
    from facemllm.reformat.questions import Plan

    if settings.version.restore is None:
        Plan(settings.reformat)
    known_rules(settings)
    stages = [stage_step(settings, name) for name in settings.stages()]
    last = stages[-1].name
    found = (*DATA, *stages, evaluate_step(last), GATE, register_step(last), DEPLOY, AWAIT_APPROVAL, RELEASE)
    return {step.name: step for step in found}


def dvc_yaml() -> str:
    """The text of `dvc.yaml`."""
    settings = load("laptop")
    return _HEAD + "".join(_stage(step, settings) for step in DATA)


def _stage(step: Step, settings: Settings) -> str:
    out, run = _STAGES[step.name]
    read = [_STAGES[name][0] for name in dict.fromkeys((*step.inputs.values(), *step.after))]
    params = ["seed", *(name for name in step.sections(settings) if name in Settings.model_fields)]
    return (
        f"  {step.name}:\n"
        f"    cmd: ${{facemllm}} {run}\n"
        f"    deps: [{', '.join([*read, *_code(step)])}]\n"
        f"    params: [{', '.join(params)}]\n"
        f"    outs: [{out}]\n"
    )


def _code(step: Step) -> list[str]:
    """The rooms of the code behind a step; of `core`, which everything uses, the files themselves."""
    package = digests.PACKAGE.parent
    files = [path.relative_to(package) for path in digests.code_files(step.module)]
    rooms = {path.as_posix() if path.parts[1] == "core" else "/".join(path.parts[:2]) for path in files}
    return sorted(room for room in rooms if room not in ("facemllm/__init__.py", "facemllm/core/__init__.py"))


if __name__ == "__main__":
    print(dvc_yaml(), end="")
