"""Component of the step `deploy`."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def deploy(profile: str, overrides: list, code: str, version: str) -> str:
    """Serve the version in staging (KServe) and ask it one question.

    Returns the address of the endpoint. `code` only keys the cache.
    """
    from facemllm.workflow.runner import run_step

    return run_step("deploy", profile, overrides, version=version)
