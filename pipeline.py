"""The workflow as one Kubeflow pipeline, and its commands: run, compile, submit, schedule, release.

python pipeline.py run                      # here, with KFP's local runner
python pipeline.py compile pipeline.yaml    # the KFP specification, for a cluster
"""

from contextlib import ExitStack
from typing import Any

import facemllm.cli  # noqa: F401  loading kfp takes seconds, in which somebody may interrupt

# isort: split
from kfp import dsl

from components import component_of
from facemllm.settings import Settings
from facemllm.workflow.steps import steps


def build(settings: Settings, finish: Any = lambda task, step: task) -> Any:
    """The pipeline. `finish(task, step)` adds what only a cluster needs: resources, volumes, secrets."""

    @dsl.pipeline(name="face-mllm", description="Faces to a served multimodal LLM: data, stages, gate, approval.")
    def face_mllm(profile: str = settings.profile, overrides: list = [], code: str = "") -> None:
        tasks: dict[str, Any] = {}
        with ExitStack() as conditions:
            for step in steps(settings).values():
                if step.when is not None:
                    passed = tasks[step.when.step].output == step.when.output
                    conditions.enter_context(dsl.If(passed, name=step.when.name))
                component, named = component_of(step.name)
                inputs = {name: tasks[source].output for name, source in step.inputs.items()}
                task = component(profile=profile, overrides=overrides, code=code, **named, **inputs)
                task.set_caching_options(step.engine_cache)
                tasks[step.name] = finish(task.after(*(tasks[name] for name in step.after)), step.name)

    return face_mllm


if __name__ == "__main__":
    from commands import main

    main(build)
