"""Component of the step `align`."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def align(profile: str, overrides: list, code: str, conversations: str) -> str:
    """Train stage 1: put images into the language model's word space (Ray Train).

    Returns the digest of the model directory. `code` only keys the cache.
    """
    from facemllm.workflow.runner import run_step

    return run_step("align", profile, overrides, conversations=conversations)
