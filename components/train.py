"""Component of the training stages: one task for each entry of `train.stages`."""

from components import component


@component
def train(profile: str, overrides: list, code: str, stage: str, conversations: str, model: str = "") -> str:
    """Train one stage with Ray Train, from the model of the stage before it if any. Returns the model's digest."""
    from facemllm.workflow.runner import run_step

    before = {"model": model} if model else {}
    return run_step(stage, profile, overrides, conversations=conversations, **before)
