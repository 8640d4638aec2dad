"""Component of the step `instruct`."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def instruct(profile: str, overrides: list, code: str, conversations: str, model: str) -> str:
    """Train stage 2: question answering from annotated attributes (Ray Train).

    Returns the digest of the model directory. `code` only keys the cache.
    """
    from facemllm.workflow.runner import run_step

    return run_step("instruct", profile, overrides, conversations=conversations, model=model)
