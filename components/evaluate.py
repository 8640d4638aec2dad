"""Component of the step `evaluate`."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(profile: str, overrides: list, code: str, model: str, conversations: str) -> str:
    """Answer every question about held-out identities; metrics with intervals, and baselines.

    Returns the digest of predictions and metrics. `code` only keys the cache.
    """
    from facemllm.workflow.runner import run_step

    return run_step("evaluate", profile, overrides, model=model, conversations=conversations)
