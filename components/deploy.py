"""Component of the step `deploy`."""

from components import component


@component
def deploy(profile: str, overrides: list, code: str, version: str) -> str:
    """Serve the version in staging (KServe) and ask it one question. Returns the address of the endpoint."""
    from facemllm.workflow.runner import run_step

    return run_step("deploy", profile, overrides, version=version)
