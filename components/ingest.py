"""Component of the step `ingest`."""

from components import component


@component
def ingest(profile: str, overrides: list, code: str) -> str:
    """Read the configured source into a table of faces. Returns the digest of the `faces` table."""
    from facemllm.workflow.runner import run_step

    return run_step("ingest", profile, overrides)
