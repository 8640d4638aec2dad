"""Component of the step `await_approval`."""

from components import component


@component
def await_approval(profile: str, overrides: list, code: str, version: str) -> str:
    """Wait `promote.wait_minutes` for a named person's decision. Returns `approved`, `rejected` or `pending`."""
    from facemllm.workflow.runner import run_step

    return run_step("await_approval", profile, overrides, version=version)
