"""Component that ends a run on a cluster, however it went."""

from kfp.dsl import HTML, Output, PipelineTaskFinalStatus

from components import component


@component
def finish(profile: str, overrides: list, status: PipelineTaskFinalStatus, report: Output[HTML]) -> str:
    """Write the run's folder on the volume and close its MLflow run. Returns the folder."""
    from facemllm.workflow.artifacts import finish_run

    return finish_run(profile, overrides, status.state, report)
