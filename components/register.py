"""Component of the step `register`."""

from components import component


@component
def register(profile: str, overrides: list, code: str, model: str, evaluation: str, gate: str) -> str:
    """Register the model in MLflow with the alias `candidate`. Returns the version number."""
    from facemllm.workflow.runner import run_step

    return run_step("register", profile, overrides, model=model, evaluation=evaluation, gate=gate)
