"""Component of the step `validate`."""

from kfp.dsl import HTML, Metrics, Output

from components import component


@component
def validate(
    profile: str,
    overrides: list,
    code: str,
    faces: str,
    annotated: str,
    conversations: str,
    metrics: Output[Metrics],
    report: Output[HTML],
) -> str:
    """Check the tables with Great Expectations; a critical failure stops the run. Returns the report's digest."""
    from facemllm.workflow.artifacts import run_component

    return run_component(
        "validate", profile, overrides, [metrics, report], faces=faces, annotated=annotated, conversations=conversations
    )
