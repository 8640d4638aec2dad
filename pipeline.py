"""The workflow as one Kubeflow pipeline, and its commands: run, compile, submit, schedule, status, retry, release.

python pipeline.py run                      # here, with KFP's local runner
python pipeline.py compile pipeline.yaml    # the KFP specification, for a cluster
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import facemllm.cli  # noqa: F401  loading kfp takes seconds, in which somebody may interrupt

# isort: split
from kfp import dsl

from cluster.specification import Graphs
from components import OUTPUT, component_of
from components.finish import finish as last
from facemllm.settings import Settings
from facemllm.workflow.pods import FINISH, RELEASE
from facemllm.workflow.steps import steps

Finish = Callable[[Any, str], Any]
"""What a task gets that only a cluster needs, by the name of its step: resources, volumes, secrets."""


def build(settings: Settings) -> Any:
    """The pipeline for KFP's local runner: profile, overrides and the code's digest are parameters of its run."""

    @dsl.pipeline(name="face-mllm", description="Faces to a served multimodal LLM: data, stages, gate, approval.")
    def face_mllm(profile: str = settings.profile, overrides: list = [], code: str = "") -> None:
        _graph(settings, {"profile": profile, "overrides": overrides, "code": code})

    return face_mllm


def on_cluster(settings: Settings, overrides: list[str], finish: Finish) -> Any:
    """The pipeline as it runs on a cluster, up to the request for approval: no pod waits for a person. Settings are
    fixed in it, for what its pods ask for was made of them; the code is what the image holds."""

    @dsl.pipeline(name="face-mllm", description="Faces to a registered multimodal LLM, and a request for its approval.")
    def face_mllm() -> None:
        given = {"profile": settings.profile, "overrides": overrides}
        with dsl.ExitHandler(finish(last(**given), FINISH), name="run"):
            _graph(settings, {**given, "code": ""}, finish, without={RELEASE})

    return face_mllm


def release_on_cluster(settings: Settings, overrides: list[str], finish: Finish) -> Any:
    """The pipeline of the step `release` alone, for a version that people have approved: its one parameter."""

    @dsl.pipeline(name="face-mllm-release", description="Puts an approved version of the model into production.")
    def face_mllm_release(version: str) -> None:
        component, named = component_of(RELEASE)
        given = {"profile": settings.profile, "overrides": overrides, "code": ""}
        finish(component(**given, **named, version=version), RELEASE)

    return face_mllm_release


def _graph(
    settings: Settings,
    given: dict[str, Any],
    finish: Finish = lambda task, step: task,
    without: set[str] = set(),
) -> None:
    tasks: dict[str, Any] = {}
    with ExitStack() as conditions:
        for step in steps(settings).values():
            if step.name in without:
                continue
            if step.when is not None:
                passed = tasks[step.when.step].outputs[OUTPUT] == step.when.output
                conditions.enter_context(dsl.If(passed, name=step.when.name))
            component, named = component_of(step.name)
            inputs = {name: tasks[source].outputs[OUTPUT] for name, source in step.inputs.items()}
            task = component(**given, **named, **inputs)
            task.set_caching_options(step.engine_cache)
            tasks[step.name] = finish(task.after(*(tasks[name] for name in step.after)), step.name)


GRAPHS = Graphs(build, on_cluster, release_on_cluster)

if __name__ == "__main__":
    from commands import main

    main(GRAPHS)
