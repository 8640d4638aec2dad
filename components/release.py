"""Component of the step `release`."""

from kfp.dsl import Metrics, Output

from components import component


@component
def release(profile: str, overrides: list, code: str, version: str, metrics: Output[Metrics]) -> str:
    """Serve an approved version in production (KServe) as the champion. Returns the address of the endpoint."""
    from facemllm.workflow.artifacts import run_component

    return run_component("release", profile, overrides, [metrics], version=version)
