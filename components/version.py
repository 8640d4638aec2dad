"""Component of the step `version`."""

from kfp.dsl import Metrics, Output

from components import component


@component
def version(
    profile: str, overrides: list, code: str, annotated: str, conversations: str, metrics: Output[Metrics]
) -> str:
    """Record both tables with DVC. Returns the revision of the data repository."""
    from facemllm.workflow.artifacts import run_component

    return run_component("version", profile, overrides, [metrics], annotated=annotated, conversations=conversations)
