"""Component of the training stages: one task for each entry of `train.stages`."""

from kfp.dsl import Metrics, Model, Output

from components import component


@component
def train(
    profile: str,
    overrides: list,
    code: str,
    stage: str,
    conversations: str,
    metrics: Output[Metrics],
    trained: Output[Model],
    model: str = "",
) -> str:
    """Train one stage with Ray Train, from the model of the stage before it if any. Returns the model's digest."""
    from facemllm.workflow.artifacts import run_component

    before = {"model": model} if model else {}
    return run_component(stage, profile, overrides, [metrics, trained], conversations=conversations, **before)
