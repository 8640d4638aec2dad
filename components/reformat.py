"""Component of the step `reformat`."""

from kfp.dsl import Metrics, Output

from components import component


@component
def reformat(profile: str, overrides: list, code: str, annotated: str, metrics: Output[Metrics]) -> str:
    """Turn labelled faces into conversations, one a face, a turn a question. Returns the table's digest."""
    from facemllm.workflow.artifacts import run_component

    return run_component("reformat", profile, overrides, [metrics], annotated=annotated)
