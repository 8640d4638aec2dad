"""The step `ingest`: faces of the configured sources, or those of a recorded revision."""

from __future__ import annotations

from typing import Any

from facemllm.core.step import Context, Outcome, Step
from facemllm.settings import Settings
from facemllm.version import step as version


def _reads(settings: Settings) -> dict[str, Any]:
    """What the faces depend on beside the step's own code: settings, the sources' files, readers and ledger rows, and
    who was forgotten.

    Raises UserError when a source is not in the ledger or withdrawn: then what was made of it is not used again.
    """
    from facemllm.ingest.importing import code_of, fingerprint
    from facemllm.version import ledger
    from facemllm.version.tombstones import Tombstones

    sources = settings.ingest.sources
    names = sorted({source.name for source in sources})
    ledger.require(settings, names)
    return {
        "ingest": settings.ingest.model_dump(exclude={"workers", "ledger"}),
        "files": [fingerprint(source, settings.ingest.links) for source in sources],
        "readers": code_of(sources),
        "uses": ledger.allowed(settings, names),
        "forgotten": Tombstones.of(settings).digest,
        "restore": settings.version.restore,
    }


def _work(c: Context) -> Outcome:
    from facemllm.ingest.run import ingest

    if c.settings.version.restore:
        return version.restored(c, "faces")
    return Outcome.of_table(ingest(c.settings, c.out), "faces")


STEP = Step(name="ingest", module="facemllm.ingest.run", sections=_reads, inputs={}, work=_work)
