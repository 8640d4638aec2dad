"""Component of the step `annotate`."""

from components import component


@component
def annotate(profile: str, overrides: list, code: str, faces: str) -> str:
    """Describe every face: a caption and attribute labels from the configured annotator, as a Ray Data job.

    Returns the digest of the annotated `faces` table.
    """
    from facemllm.workflow.runner import run_step

    return run_step("annotate", profile, overrides, faces=faces)
