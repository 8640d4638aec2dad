"""Component of the step `version`."""

from components import component


@component
def version(profile: str, overrides: list, code: str, annotated: str, conversations: str) -> str:
    """Record both tables with DVC. Returns the revision of the data repository."""
    from facemllm.workflow.runner import run_step

    return run_step("version", profile, overrides, annotated=annotated, conversations=conversations)
