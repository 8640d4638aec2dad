"""Component of the step `annotate`."""

from components import component


@component
def annotate(profile: str, overrides: list, code: str, faces: str) -> str:
    """Describe every face in a caption and labels, as a Ray Data job. Returns the table's digest."""
    from facemllm.workflow.runner import run_step

    return run_step("annotate", profile, overrides, faces=faces)
