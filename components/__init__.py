"""KFP components, one file a step (the training stages share `train`) and `finish`: a docstring and one call into
`facemllm`.

Each takes the profile, the overrides of its settings, and `code`, the package's digest, which only keys KFP's cache;
its artifacts are what it shows in KFP's pages.
"""

from __future__ import annotations

import copy
from functools import partial
from importlib import import_module
from typing import Any

from kfp import dsl

from facemllm.settings.train import STEP_NAMES

IMAGE = "face-mllm-python:0.1.0"
OUTPUT = "Output"
"""What KFP calls the value that a component returns, among its artifacts."""
component = partial(dsl.component, base_image=IMAGE, install_kfp_package=False)


def component_of(step: str) -> tuple[Any, dict[str, str]]:
    """The component that runs a step, under the step's name, and the arguments that say which step it is."""
    if step in STEP_NAMES:
        return getattr(import_module(f"components.{step}"), step), {}
    stage = copy.deepcopy(import_module("components.train").train)
    stage.component_spec.name = stage.name = step.replace("_", "-")
    return stage, {"stage": step}
