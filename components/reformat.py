"""Component of the step `reformat`."""

from components import component


@component
def reformat(profile: str, overrides: list, code: str, annotated: str) -> str:
    """Turn labelled faces into conversations, one a face, a turn a question. Returns the table's digest."""
    from facemllm.workflow.runner import run_step

    return run_step("reformat", profile, overrides, annotated=annotated)
