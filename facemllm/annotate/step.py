"""The step `annotate`: faces described by the configured annotator."""

from __future__ import annotations

from typing import Any

from facemllm.core.step import Context, Outcome, Step
from facemllm.settings import Settings
from facemllm.version import step as version


def _reads(settings: Settings) -> dict[str, Any]:
    from facemllm.annotate.run import reads

    return {"annotate": reads(settings), "restore": settings.version.restore}


def _work(c: Context) -> Outcome:
    from facemllm.annotate.run import annotate

    if c.settings.version.restore:
        return version.restored(c, "faces")
    return Outcome.of_table(annotate(c.settings, c.path("faces"), c.out), "faces annotated")


STEP = Step(
    name="annotate",
    module="facemllm.annotate.run",
    sections=_reads,
    inputs={"faces": "ingest"},
    work=_work,
    engine_cache=True,
)
