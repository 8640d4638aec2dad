"""Component of the step `gate`."""

from kfp.dsl import HTML, Metrics, Output

from components import component


@component
def gate(
    profile: str, overrides: list, code: str, evaluation: str, metrics: Output[Metrics], report: Output[HTML]
) -> str:
    """Hold the metrics against thresholds, baselines and the champion. Returns `passed` or `refused`."""
    from facemllm.workflow.artifacts import run_component

    return run_component("gate", profile, overrides, [metrics, report], evaluation=evaluation)
