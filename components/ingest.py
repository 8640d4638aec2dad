"""Component of the step `ingest`."""

from kfp.dsl import Metrics, Output

from components import component


@component
def ingest(profile: str, overrides: list, code: str, metrics: Output[Metrics]) -> str:
    """Read the configured source into a table of faces. Returns the digest of the `faces` table."""
    from facemllm.workflow.artifacts import run_component

    return run_component("ingest", profile, overrides, [metrics])
