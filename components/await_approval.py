"""Component of the step `await_approval`."""

from kfp.dsl import Metrics, Output

from components import component


@component
def await_approval(profile: str, overrides: list, code: str, version: str, metrics: Output[Metrics]) -> str:
    """Wait `promote.wait_minutes` for a named person's decision. Returns `approved`, `rejected` or `pending`."""
    from facemllm.workflow.artifacts import run_component

    return run_component("await_approval", profile, overrides, [metrics], version=version)
