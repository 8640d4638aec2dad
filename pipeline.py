"""The workflow as one Kubeflow pipeline, and its commands: run, compile, submit, schedule, release.

python pipeline.py run                      # here, with KFP's local runner
python pipeline.py compile pipeline.yaml    # the KFP specification, for a cluster
"""

from typing import Any

from kfp import dsl

from components.align import align
from components.annotate import annotate
from components.await_approval import await_approval
from components.deploy import deploy
from components.evaluate import evaluate
from components.gate import gate
from components.ingest import ingest
from components.instruct import instruct
from components.reformat import reformat
from components.register import register
from components.release import release
from components.specialize import specialize
from components.validate import validate
from components.version import version
from facemllm.settings import Settings


def build(settings: Settings, finish: Any = lambda task, step: task) -> Any:
    """The pipeline. `finish(task, step)` adds what only a cluster needs: resources, volumes, secrets.

    Steps that read or change the world (`ingest`, `version`, and from `gate` on) are never answered from KFP's cache:
    `facemllm` remembers them itself, and looks whether what it remembers still stands.
    """

    @dsl.pipeline(name="face-mllm", description="Faces to a served multimodal LLM: data, three stages, gate, approval.")
    def face_mllm(profile: str = settings.profile, overrides: list = [], code: str = "") -> None:
        def step(component: Any, cached: bool = True, **inputs: Any) -> Any:
            task = component(profile=profile, overrides=overrides, code=code, **inputs).set_caching_options(cached)
            return finish(task, component.name.replace("-", "_"))

        faces = step(ingest, cached=False).output
        annotated = step(annotate, faces=faces).output
        conversations = step(reformat, annotated=annotated).output
        checked = step(validate, faces=faces, annotated=annotated, conversations=conversations)
        recorded = step(version, cached=False, annotated=annotated, conversations=conversations).after(checked)
        aligned = step(align, conversations=conversations).after(recorded)
        instructed = step(instruct, conversations=conversations, model=aligned.output)
        model = step(specialize, conversations=conversations, model=instructed.output).output
        evaluation = step(evaluate, model=model, conversations=conversations).output
        verdict = step(gate, cached=False, evaluation=evaluation)
        with dsl.If(verdict.output == "passed", name="gate-passed"):
            registered = step(register, cached=False, model=model, evaluation=evaluation, gate=verdict.output).output
            staged = step(deploy, cached=False, version=registered)
            decision = step(await_approval, cached=False, version=registered).after(staged)
            with dsl.If(decision.output == "approved", name="approved"):
                step(release, cached=False, version=registered)

    return face_mllm


if __name__ == "__main__":
    from commands import main

    main(build)
