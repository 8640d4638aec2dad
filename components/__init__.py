"""KFP components, one file a step (the training stages share `train`): a docstring and one call into `facemllm`.

Each takes the profile, the overrides of its settings, and `code`, the package's digest, which only keys KFP's cache.
"""

from __future__ import annotations

import copy
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from kfp import dsl

IMAGE = "face-mllm-python:0.1.0"
component = partial(dsl.component, base_image=IMAGE, install_kfp_package=False)


def component_of(step: str) -> tuple[Any, dict[str, str]]:
    """The component that runs a step, under the step's name, and the arguments that say which step it is."""
    if (Path(__file__).parent / f"{step}.py").is_file():
        return getattr(import_module(f"components.{step}"), step), {}
    stage = copy.deepcopy(import_module("components.train").train)
    stage.component_spec.name = stage.name = step.replace("_", "-")
    return stage, {"stage": step}
