"""The step `reformat`: conversations about annotated faces."""

from __future__ import annotations

from typing import Any

from facemllm.core.step import Context, Outcome, Step
from facemllm.settings import Settings
from facemllm.version import step as version


def _reads(settings: Settings) -> dict[str, Any]:
    return {"reformat": settings.reformat.model_dump(), "restore": settings.version.restore}


def _work(c: Context) -> Outcome:
    from facemllm.reformat.run import reformat

    if c.settings.version.restore:
        return version.restored(c, "conversations")
    manifest = reformat(c.settings, c.path("annotated"), c.out)
    outcome = Outcome.of_table(manifest, "conversations")
    if unasked := manifest["about"].get("unasked"):
        named = f"{', '.join([*unasked][:3])}{' …' * (len(unasked) > 3)}"
        outcome.figure += f"; nothing asked about {len(unasked)} labels: {named}"
    return outcome


STEP = Step(
    name="reformat",
    module="facemllm.reformat.run",
    sections=_reads,
    inputs={"annotated": "annotate"},
    work=_work,
    engine_cache=True,
)
