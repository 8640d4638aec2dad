"""`facemllm evaluate`: any model on any conversations, and a report of it; ours, or by the same questions another's.

A model of ours is a directory; another's is a peer (`peers`). Questions of a benchmark are put and scored by the
benchmark's own rules and by ours (`benchmarks`), all others as tasks (`run`). What a peer will be asked for, and what
that may cost, is said before; the bill after, however it ends.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facemllm.asking.bill import Bill, announcement
from facemllm.asking.endpoint import EndpointSender
from facemllm.asking.store import Replies
from facemllm.core import digests, progress
from facemllm.core.files import require_absent
from facemllm.evaluate import benchmarks, run
from facemllm.evaluate.peers import Peer, Reached, at_endpoint, check_name, is_ours, on_this_machine, words
from facemllm.evaluate.predict import KINDS, puts
from facemllm.report.run import write_report
from facemllm.scoring.benchmarks import benchmark_of
from facemllm.settings import Settings
from facemllm.tables import CONVERSATIONS, Table, open_table
from facemllm.version import ledger


@dataclass(frozen=True)
class Chosen:
    """A model to evaluate: the directory of one of ours, or a peer. `digest` is of all that its answers hang on."""

    name: str
    digest: str
    folder: Path | None = None
    peer: Peer | None = None

    @classmethod
    def ours(cls, folder: Path) -> Chosen:
        """A model directory."""
        return cls(folder.name, digests.of_tree(folder), folder=folder)

    @classmethod
    def other(cls, peer: Peer) -> Chosen:
        """A peer."""
        return cls(peer.name, peer.digest, peer=peer)


def evaluate(settings: Settings, model: str, conversations: Path, out: Path, *, endpoint: bool) -> Mapping[str, Any]:
    """Evaluate into the folder `out`, of what is no benchmark with `report.html`; returns the metrics.

    `model` is a directory of ours, else one of transformers; at an endpoint, the settings name it. Raises UserError
    when it cannot be found, asked or go on, the ledger forbids it, `out` exists, or the split holds no questions; then
    `out` is not made, and what a peer answered is in the store.
    """
    require_absent(out)
    if not endpoint:
        check_name(model)
    table = open_table(conversations, CONVERSATIONS)
    sources, benchmark = table.sources, benchmark_of(table)
    ledger.require(settings, sources, "evaluate")
    started, rows = time.monotonic(), ledger.entries(settings)
    ours = not endpoint and is_ours(model)

    def report(folder: Path, metrics: Mapping[str, Any]) -> None:
        if benchmark is not None:
            return
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

    if ours:
        chosen = Chosen.ours(Path(model))
    else:
        chosen = Chosen.other(at_endpoint(settings, conversations) if endpoint else on_this_machine(settings, model))
    return answered(settings, chosen, conversations, out, report)


def answered(
    settings: Settings,
    model: Chosen,
    conversations: Path,
    out: Path,
    finish: run.Finish,
    timed: run.Timed | None = None,
    predictor: Any = None,
) -> Mapping[str, Any]:
    """Evaluate a model into `out`, by the rules of what it is asked; `predictor` is one of ours, loaded already. Raises
    UserError as `evaluate`."""
    table = open_table(conversations, CONVERSATIONS)
    benchmark, peer = benchmark_of(table), model.peer
    if peer is None:
        assert model.folder is not None
        if benchmark is None:
            known = {"predictor": predictor, "finish": finish, "timed": timed}
            return run.evaluate(settings, model.folder, model.digest, conversations, out, **known)
        folder, mine = model.folder, {"model_digest": model.digest}

        def own() -> benchmarks.Own:
            return benchmarks.Own(predictor or run.load(settings, folder), settings.evaluate.max_new_tokens)

        return benchmarks.answered(settings, own, mine, conversations, out, finish, timed)
    about = {"model_digest": peer.digest, "model": {**peer.identity, "name": peer.name}}
    asks = peer.sender.sender if isinstance(peer.sender, Reached) else peer.sender
    count, missing, characters = (benchmarks.to_ask if benchmark else _to_ask)(settings, peer, table)
    if missing and isinstance(asks, EndpointSender):
        progress.event(note=announcement(asks, count, missing, characters))
    with Bill(asks, peer.name, count, peer.outcomes) as bill:

        def finished(folder: Path, metrics: Mapping[str, Any]) -> None:
            (folder / "bill.json").write_bytes(bill.encoded())
            finish(folder, metrics)

        if benchmark is not None:
            solver = benchmarks.Other(peer)
            return benchmarks.answered(settings, lambda: solver, about, conversations, out, finished, timed)
        return run.answered(settings, lambda: (peer, None), about, conversations, out, finished, timed)


def _to_ask(settings: Settings, peer: Peer, table: Table) -> tuple[int, int, int]:
    """How many questions an evaluation has, how many of them are not answered yet, and the characters of those."""
    split = settings.evaluate.split
    disturbed = set(run.drawn(table, split, settings.evaluate.disturbed_faces))
    count = missing = characters = 0
    with closing(Replies(peer.home)) as store:
        for face in table.iterate(["image_id", "messages", "turns"], split):
            for put in puts(face):
                text, image_id = words(put), face["image_id"]
                for change in ("", *(KINDS if image_id in disturbed and run.is_native(put.question) else ())):
                    count += 1
                    if store.read(image_id, peer.key(image_id, change, text)) is None:
                        missing, characters = missing + 1, characters + len(text)
    return count, missing, characters
