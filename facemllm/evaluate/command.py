"""`facemllm evaluate`: any model on any conversations, and a report of it.

Beside the door of the workflow's step there are two for models of others (`peers`); which one is told by what is named.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from facemllm.core import digests
from facemllm.evaluate import peers
from facemllm.evaluate.run import evaluate as evaluate_ours
from facemllm.report.run import write_report
from facemllm.settings import Settings
from facemllm.tables import CONVERSATIONS, open_table
from facemllm.version import ledger


def evaluate(settings: Settings, model: str, conversations: Path, out: Path, *, endpoint: bool) -> Mapping[str, Any]:
    """Evaluate into the folder `out`, `report.html` included; returns the metrics.

    `model` is a directory of ours, else one of transformers; at an endpoint, the settings name it. Raises UserError
    when it cannot be found or asked, the ledger forbids it, `out` exists, or the split holds no questions.
    """
    if not endpoint:
        peers.check_name(model)
    sources = open_table(conversations, CONVERSATIONS).sources
    ledger.require(settings, sources, "evaluate")
    started, rows = time.monotonic(), ledger.entries(settings)

    def report(folder: Path, metrics: Mapping[str, Any]) -> None:
        summary = {
            "run": out.name,
            "profile": settings.profile,
            "seconds": time.monotonic() - started,
            "tasks": metrics["tasks"],
            "closed_mean": metrics["closed_mean"],
            "sources": [rows[name].model_dump(mode="json") for name in sources],
            "model": {"digest": metrics["model_digest"], "name": model if endpoint else Path(model).name},
        }
        write_report(folder / "report.html", summary, folder, source=", ".join(sources))

    if not endpoint and peers.is_ours(model):
        digest = digests.of_tree(Path(model))
        return evaluate_ours(settings, Path(model), digest, conversations, out, finish=report)
    peer = peers.at_endpoint(settings, conversations) if endpoint else peers.on_this_machine(settings, model)
    return peers.evaluate_peer(settings, peer, conversations, out, report)
