"""Component of the step `gate`."""

from components import component


@component
def gate(profile: str, overrides: list, code: str, evaluation: str) -> str:
    """Hold the metrics against thresholds, baselines and the champion. Returns `passed` or `refused`."""
    from facemllm.workflow.runner import run_step

    return run_step("gate", profile, overrides, evaluation=evaluation)
