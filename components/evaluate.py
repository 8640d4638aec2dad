"""Component of the step `evaluate`."""

from components import component


@component
def evaluate(profile: str, overrides: list, code: str, model: str, conversations: str) -> str:
    """Answer every question about held-out identities; metrics and baselines. Returns the digest of both."""
    from facemllm.workflow.runner import run_step

    return run_step("evaluate", profile, overrides, model=model, conversations=conversations)
