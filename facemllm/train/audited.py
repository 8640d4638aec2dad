"""The audit of logical relations that a stage with the knowledge branch starts from, to be shown beside its losses."""

from __future__ import annotations

from typing import Any

from facemllm.knowledge.graph import characteristics, relations_of
from facemllm.knowledge.penalties import audit, enforced
from facemllm.settings import Settings
from facemllm.tables import Table
from facemllm.train.data import read_turns


def audited_relations(settings: Settings, conversations: Table) -> list[dict[str, Any]]:
    """A row a relation: `relation`, on how many training faces it can be `checked`, how many `broken`, the share
    as `rate` (None where none can be checked), and whether it is `enforced`. Raises UserError as training does."""
    knows = settings.model.knowledge
    known = characteristics(knows.tasks, read_turns(conversations, "train"))
    found = audit(relations_of(knows.tasks, known.nodes), known)
    kept = {str(relation) for relation in enforced(found, knows.audit)}
    return [
        {
            "relation": str(one.relation),
            "checked": one.spoken,
            "broken": one.broken,
            "rate": None if one.rate is None else round(one.rate, 6),
            "enforced": str(one.relation) in kept,
        }
        for one in found
    ]
