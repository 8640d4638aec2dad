"""Component of the step `evaluate`."""

from kfp.dsl import HTML, Metrics, Output

from components import component


@component
def evaluate(
    profile: str,
    overrides: list,
    code: str,
    model: str,
    conversations: str,
    metrics: Output[Metrics],
    report: Output[HTML],
) -> str:
    """Answer every question about held-out identities; metrics and baselines. Returns the digest of both."""
    from facemllm.workflow.artifacts import run_component

    return run_component("evaluate", profile, overrides, [metrics, report], model=model, conversations=conversations)
