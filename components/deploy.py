"""Component of the step `deploy`."""

from kfp.dsl import Metrics, Output

from components import component


@component
def deploy(profile: str, overrides: list, code: str, version: str, metrics: Output[Metrics]) -> str:
    """Serve the version in staging (KServe) and ask it one question. Returns the address of the endpoint."""
    from facemllm.workflow.artifacts import run_component

    return run_component("deploy", profile, overrides, [metrics], version=version)
