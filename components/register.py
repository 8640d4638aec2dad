"""Component of the step `register`."""

from kfp.dsl import Metrics, Model, Output

from components import component


@component
def register(
    profile: str,
    overrides: list,
    code: str,
    model: str,
    evaluation: str,
    gate: str,
    metrics: Output[Metrics],
    registered: Output[Model],
) -> str:
    """Register the model in MLflow with the alias `candidate`. Returns the version number."""
    from facemllm.workflow.artifacts import run_component

    return run_component(
        "register", profile, overrides, [metrics, registered], model=model, evaluation=evaluation, gate=gate
    )
