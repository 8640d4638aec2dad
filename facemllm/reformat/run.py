"""The step `reformat`: every known label of a face becomes a turn of a conversation about it.

The caption comes first, then the tasks in the order of the settings. What is asked, and how, is drawn by hashes of
image and item, so that adding a source, a row or a task leaves all other turns as they are; but balance goes by the
answers of a source, and a temperature by the sizes of all of them. Rows stream; memory is flat.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from facemllm.core import progress
from facemllm.reformat import mixture
from facemllm.reformat.conversations import ConversationBatch
from facemllm.reformat.questions import BrokenQuestion, Chances, Plan, batches
from facemllm.settings import Reformat, Settings
from facemllm.tables import CONVERSATIONS, FACES, Table, TableWriter, open_table
from facemllm.tasks import ZERO_SHOT
from facemllm.version import ledger
from facemllm.version.tombstones import FORGOTTEN, Tombstones

LEFT_OUT = "left out by the mixture (reformat.mixture)"
SILENT = "no known label answers a question"


def reformat(settings: Settings, faces: Path, out: Path) -> Mapping[str, Any]:
    """Write the conversations about `faces` to `out`. Returns the manifest; its `held_out_questions` counts by name how
    often evaluation asks what is held out, 0 where no face has that label.

    A row goes to quarantine when its labels answer no question, when one of them cannot be answered, when it was
    forgotten, or when the mixture leaves it out. Raises UserError if a task is unknown, or sensitive and without a
    reason, a held-out name or a cap does not fit, `faces` is no sound table, or `out` exists.
    """
    plan = Plan(settings.reformat)
    table = open_table(faces, FACES)
    ledger.require(settings, table.sources)
    forgotten = Tombstones.of(settings)
    taken, counts = mixture.chosen(table, settings.reformat.mixture, forgotten.covers)
    chances: Chances = {}
    if settings.reformat.balance:
        chances = mixture.chances(
            table, plan, settings.reformat.balance, lambda row: taken(row) and not forgotten.covers(row)
        )
    writer = TableWriter(
        out,
        CONVERSATIONS,
        parents=[table.digest],
        about=_about(settings.reformat, plan, table, counts),
        shard_mb=settings.ingest.shard_mb,
    )
    made, number, zero = ConversationBatch(), 0, Counter(dict.fromkeys(plan.held_out.names, 0))
    with writer, progress.bar("making questions", table.rows) as bar:
        for batch, found in batches(table, pictures=True):
            for place, row in enumerate(found):
                refusal = FORGOTTEN if forgotten.covers(row) else None if taken(row) else LEFT_OUT
                try:
                    asked = plan.questions(row, chances) if refusal is None else []
                    if asked:
                        made.add(place, row, asked)
                        zero.update(one.question.item for one, _ in asked if one.question.task == ZERO_SHOT)
                    else:
                        refusal = refusal or SILENT
                except BrokenQuestion as error:
                    refusal = str(error)
                if refusal:
                    writer.quarantine(table.digest, number + place, refusal)
            if len(made):
                writer.write_table(made.batch(batch))
            number += len(found)
            bar.update(number)
        writer.manifest["about"]["held_out_questions"] = dict(zero)
    return writer.manifest


def _about(qa: Reformat, plan: Plan, table: Table, counts: Mapping[str, Any] | None) -> dict[str, Any]:
    about = {
        "tasks": [task.name for task in plan.tasks],
        "forms": {**qa.forms.model_dump(), "unseen": qa.unseen_wordings},
        "held_out": list(plan.held_out.names),
        "reasons": plan.reasons,
        "balance": qa.balance,
        **table.terms,
    }
    if counts is not None:
        about["mixture"] = {**qa.mixture.model_dump(), "sources": counts}
    return about
