"""Component of the step `validate`."""

from components import component


@component
def validate(profile: str, overrides: list, code: str, faces: str, annotated: str, conversations: str) -> str:
    """Check the tables with Great Expectations; a critical failure stops the run. Returns the report's digest."""
    from facemllm.workflow.runner import run_step

    return run_step("validate", profile, overrides, faces=faces, annotated=annotated, conversations=conversations)
