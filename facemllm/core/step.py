"""What a step is: its code, what its result depends on, where its inputs come from, and what it has at hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from facemllm.core import digests
from facemllm.core.store import Store
from facemllm.errors import UserError
from facemllm.settings import Settings

PARENT_RUN = "FACEMLLM_PARENT_RUN"  # MLflow run of the pipeline run, handed on by the local runner
CLUSTER_RUN = "FACEMLLM_RUN"  # name of the pipeline run on a cluster, where no process spans the steps


@dataclass
class Context:
    """What a running step has at hand: settings, input values by name, folders, and its MLflow run (or None).

    `nested(step, **inputs)` runs another step on its behalf, or recalls it, and gives its record.
    """

    settings: Settings
    store: Store
    inputs: Mapping[str, str]
    work: Path
    out: Path
    nested: Callable[..., Mapping[str, Any]]
    run: Any = None

    def path(self, name: str) -> Path:
        """Folder of an input that is a digest in the store."""
        return self.store.path(self.inputs[name])

    def model(self) -> Path:
        """Folder of the input `model`. Raises UserError when its bytes are no longer those of its digest."""
        path = self.path("model")
        if digests.of_tree(path, fresh=True) != self.inputs["model"]:
            changed = "the model's bytes have changed since it was made"
            raise UserError(f"{path}: {changed}; remove that folder and run again")
        return path


@dataclass
class Outcome:
    """What a step gives: its output value (a digest unless `output` says otherwise), a telling figure, facts."""

    digest: str
    figure: str
    output: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_table(cls, manifest: Mapping[str, Any], what: str) -> Outcome:
        """A table that was written, by its manifest."""
        refused = manifest.get("quarantined", 0)
        return cls(manifest["digest"], f"{manifest['rows']:,} {what}" + (f", {refused} quarantined" if refused else ""))


@dataclass(frozen=True)
class Condition:
    """A step and all after it run only if `step` gave the output `output`; `name` is what the graph calls it."""

    name: str
    step: str
    output: str


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step: its code, the settings it depends on, which steps its inputs come from, what it does.

    `module` is where the code behind it begins, `inputs` names the step that each input is the output of, `after` those
    it waits for besides. `keeps` is false for the steps that act on the world (deploy, await_approval, release): they
    run every time. `world` names inputs read from the world when the step starts; `still` says whether a remembered
    result still stands in it. `engine_cache` is whether Kubeflow's own cache may answer: never where files, servers or
    people outside the store have a part in the result.
    """

    name: str
    module: str
    sections: Callable[[Settings], Any]
    inputs: Mapping[str, str]
    work: Callable[[Context], Outcome]
    after: tuple[str, ...] = ()
    when: Condition | None = None
    keeps: bool = True
    engine_cache: bool = False
    world: Mapping[str, Callable[[Settings], str]] = field(default_factory=dict)
    still: Callable[[Settings, Mapping[str, Any]], bool] | None = None


def section(*names: str, **excluded: set[str]) -> Callable[[Settings], Any]:
    """The settings a step depends on: whole sections, less the keys that decide nothing of its result."""
    return lambda s: {name: getattr(s, name).model_dump(exclude=excluded.get(name)) for name in names}


def step_key(step: Step, settings: Settings, inputs: Mapping[str, str]) -> str:
    """Name of this piece of work: step, code, the settings it depends on, inputs, and what it reads of the world."""
    return key_of(step, depends(step, settings), inputs)


def key_of(step: Step, depends_on: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The same, of what `depends` has found."""
    return digests.of_json({"step": step.name, **depends_on, "inputs": dict(inputs)})


def depends(step: Step, settings: Settings) -> dict[str, Any]:
    """What a step's result depends on beside its inputs: the digest of its `code`, and values of `settings`."""
    # what is held out is asked by the task of its own, and cut out of captions as that task reads them
    asked = (*settings.reformat.tasks, *(["zero_shot", "caption"] if settings.reformat.held_out else []))
    every = settings.version.restore is not None  # a restored revision may ask other tasks
    code = digests.of_code(step.module, None if every else asked)
    return {"code": code, "settings": {"seed": settings.seed, "step": step.sections(settings)}}


def write_json(folder: Path, name: str, value: Any) -> str:
    """Write a value into a folder as readable JSON; the folder's digest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")
    return digests.of_tree(folder)
