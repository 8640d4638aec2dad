"""Component of the step `release`."""

from components import component


@component
def release(profile: str, overrides: list, code: str, version: str) -> str:
    """Serve an approved version in production (KServe) as the champion. Returns the address of the endpoint."""
    from facemllm.workflow.runner import run_step

    return run_step("release", profile, overrides, version=version)
