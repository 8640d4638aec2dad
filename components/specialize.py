"""Component of the step `specialize`."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def specialize(profile: str, overrides: list, code: str, conversations: str, model: str) -> str:
    """Train stage 3: all face-perception tasks (Ray Train).

    Returns the digest of the model directory. `code` only keys the cache.
    """
    from facemllm.workflow.runner import run_step

    return run_step("specialize", profile, overrides, conversations=conversations, model=model)
