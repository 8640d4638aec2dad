"""Component of the step `annotate`."""

from kfp.dsl import Metrics, Output

from components import component


@component
def annotate(profile: str, overrides: list, code: str, faces: str, metrics: Output[Metrics]) -> str:
    """Describe every face in a caption and labels, as a Ray Data job. Returns the table's digest."""
    from facemllm.workflow.artifacts import run_component

    return run_component("annotate", profile, overrides, [metrics], faces=faces)
