"""A stand-in for what runs the specification of Kubeflow Pipelines on a cluster: KFP's driver and launcher, and Argo.

Each task is a pod: the command that was compiled, with an executor input in place of `{{$}}`, run to its end by a
function of the caller's, and again as often as its retry policy says. A task starts as soon as those before it have
ended well, as many at once as there are, and the exit task however they ended. Pauses before a retry, limits, volumes
and the storage of artifacts are not stood in for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Body = dict[str, Any]
Tell = Callable[[str, str, str], object]
"""Hears the name of a task, its new state, and what went wrong."""


class Failed(Exception):
    """A pod that ended badly: the last line of its log."""


@dataclass(frozen=True)
class Pod:
    """A task's pod: a folder of its own, its words, the variables that have a value, and the rest of its platform
    specification."""

    folder: Path
    words: list[str]
    environment: dict[str, str]
    platform: Body


def executor_input(component: Body, parameters: Mapping[str, Any], out: str) -> Body:
    """What KFP's launcher gives a task: its values, and where below `out` its outputs are to be written."""
    outputs = component.get("outputDefinitions", {})
    artifacts = {
        key: {"artifacts": [{"name": key, "type": one["artifactType"], "uri": f"{out}/{key}", "metadata": {}}]}
        for key, one in outputs.get("artifacts", {}).items()
    }
    written = {key: {"outputFile": f"{out}/{key}"} for key in outputs.get("parameters", {})}
    places = {"parameters": written, "artifacts": artifacts, "outputFile": f"{out}/executor_output.json"}
    return {"inputs": {"parameterValues": dict(parameters)}, "outputs": places}


class Workflow:
    """One run of a specification; `specification` is its two documents as KFP's API is sent them. `start` runs a pod to
    its end and raises Failed; outputs of tasks are written below `folder`."""

    def __init__(self, specification: Body, folder: Path, start: Callable[[Pod], object], tell: Tell) -> None:
        self._spec = specification["pipeline_spec"]
        self._platform = specification["platform_spec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        self._folder, self._start, self._tell = folder, start, tell

    def run(self, parameters: Mapping[str, Any]) -> bool:
        """Whether all tasks of the run ended well."""
        return self._graph(self._spec["root"]["dag"], parameters)

    def _graph(self, dag: Body, given: Mapping[str, Any]) -> bool:
        todo, ended, values = dict(dag["tasks"]), dict[str, bool](), dict[str, Any]()
        with ThreadPoolExecutor() as pool:
            running: dict[Future[bool], str] = {}
            while todo or running:
                for name in [one for one in todo if {*todo[one].get("dependentTasks", ())} <= {*ended}]:
                    task = todo.pop(name)
                    well = all(ended[one] for one in task.get("dependentTasks", ()))
                    if well or task.get("triggerPolicy", {}).get("strategy") == "ALL_UPSTREAM_TASKS_COMPLETED":
                        running[pool.submit(self._task, name, task, given, values, well)] = name
                    else:
                        ended[name] = False
                for one in wait(running, return_when=FIRST_COMPLETED).done:
                    ended[running.pop(one)] = one.result()
        return all(ended.values())

    def _task(self, name: str, task: Body, given: Mapping[str, Any], values: Body, well: bool) -> bool:
        """Whether a task, a graph or a pod, ended well. What a pod returns is put into `values`."""

        def value(source: Body) -> Any:
            if "runtimeValue" in source:
                return source["runtimeValue"]["constant"]
            if "taskOutputParameter" in source:
                return values[source["taskOutputParameter"]["producerTask"]]
            if "taskFinalStatus" in source:
                state = "SUCCEEDED" if well else "FAILED"
                return {"state": state, "pipelineJobResourceName": "", "pipelineTaskName": ""}
            return given[source["componentInputParameter"]]

        component = self._spec["components"][task["componentRef"]["name"]]
        inputs = {key: value(one) for key, one in task.get("inputs", {}).get("parameters", {}).items()}
        if condition := task.get("triggerPolicy", {}).get("condition"):
            asked = re.fullmatch(r"inputs\.parameter_values\['(.+)'\] == '(.*)'", condition)
            assert asked, condition
            if inputs[asked[1]] != asked[2]:
                self._tell(name, "SKIPPED", "")
                return True
        self._tell(name, "RUNNING", "")
        if "dag" in component:
            ended, said = self._graph(component["dag"], inputs), ""
        else:
            try:
                tries = 1 + task.get("retryPolicy", {}).get("maxRetryCount", 0)
                values[name], ended, said = self._pod(name, component, inputs, tries), True, ""
            except Failed as error:
                ended, said = False, str(error)
        self._tell(name, "SUCCEEDED" if ended else "FAILED", said)
        return ended

    def _pod(self, name: str, component: Body, inputs: Mapping[str, Any], tries: int) -> Any:
        """Run a task's pod until it ends well; the value that it returns."""
        container = self._spec["deploymentSpec"]["executors"][component["executorLabel"]]["container"]
        (out := self._folder / f"{name}-{tries}").mkdir(parents=True)
        executor_json = json.dumps(executor_input(component, inputs, str(out)))
        words = [executor_json if word == "{{$}}" else word for word in [*container["command"], *container["args"]]]
        environment = {one["name"]: one["value"] for one in container.get("env", ())}
        try:
            self._start(Pod(out, words, environment, self._platform[component["executorLabel"]]))
        except Failed:
            if tries == 1:
                raise
            return self._pod(name, component, inputs, tries - 1)
        return json.loads((out / "executor_output.json").read_text("utf-8"))["parameterValues"]["Output"]
