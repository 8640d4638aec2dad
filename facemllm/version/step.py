"""The step `version`: both tables as a revision of the data repository; and how other steps take its tables."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from facemllm.core.step import Context, Outcome, Step, section, write_json
from facemllm.settings import Settings


def restored(c: Context, name: str) -> Outcome:
    """The table `name` of the recorded revision that the settings ask for, in place of making it."""
    from facemllm.tables import open_table
    from facemllm.version.record import restore

    revision = str(c.settings.version.restore)
    folder = c.work / "restored"
    if folder.exists():
        shutil.rmtree(folder)
    restore(c.settings, revision, folder)
    (folder / name).rename(c.out)
    manifest = open_table(c.out).manifest
    return Outcome(manifest["digest"], f"{manifest['rows']:,} {name} restored from {revision[:12]}")


def _work(c: Context) -> Outcome:
    from facemllm.version.record import record

    revision = record(c.settings, c.path("annotated"), c.path("conversations"))
    digest = write_json(c.out, "revision.json", {"revision": revision.sha, **c.inputs})
    return Outcome(digest, f"revision {revision.sha[:12]}", output=revision.sha)


def _still(settings: Settings, record: Mapping[str, Any]) -> bool:
    """Whether a remembered revision is still in the data repository."""
    from facemllm.version.record import has

    return has(settings, record["output"])


STEP = Step(
    name="version",
    module="facemllm.version.record",
    sections=section("version"),
    inputs={"annotated": "annotate", "conversations": "reformat"},
    work=_work,
    after=("validate",),
    still=_still,
)
