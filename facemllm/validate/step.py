"""The step `validate`: the report of the checks on all tables; a critical failure stops the run."""

from __future__ import annotations

from typing import Any

from facemllm.core import digests
from facemllm.core.step import Context, Outcome, Step
from facemllm.settings import Settings


def _reads(settings: Settings) -> dict[str, Any]:
    """The limits, and the ledger that the report quotes."""
    from facemllm.version import ledger

    rows = {key: row.model_dump() for key, row in ledger.entries(settings).items()}
    return {"validate": settings.validate.model_dump(), "ledger": rows}


def _work(c: Context) -> Outcome:
    from facemllm.validate.run import validate

    verdict = validate(c.settings, c.path("faces"), c.path("annotated"), c.path("conversations"), c.out)
    if c.run is not None:
        c.run.log_artifacts(c.out, "validation")
    return Outcome(digests.of_tree(c.out), verdict.figure)


STEP = Step(
    name="validate",
    module="facemllm.validate.run",
    sections=_reads,
    inputs={"faces": "ingest", "annotated": "annotate", "conversations": "reformat"},
    work=_work,
    engine_cache=True,
)
