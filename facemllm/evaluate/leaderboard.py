"""`facemllm leaderboard`: several models on the same questions, before and after fine-tuning, in one table.

The list is a YAML file (`listed`). A model that has `fine_tuned_from` is held against that one, question by question
(`scoring.paired`, `scoring.benchmarks`), corrected (Holm) over all such pairs: overall, and over all their tasks.
Models that answered in two ways (likelihood and words) are not judged.

Under OUT lie `answers/KEY/`, an evaluation and its `cost.json` each, KEY being the digest of the model, the questions
and all that its answers hang on; `leaderboard.json`; and `leaderboard.md`. What is there is not asked again. A model
that fails is a line in the table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from facemllm.core import cost, digests, progress
from facemllm.core.files import atomic_write
from facemllm.errors import one_line
from facemllm.evaluate import benchmarks, run
from facemllm.evaluate.listed import Listed, settings_of
from facemllm.evaluate.models import Chosen, answered
from facemllm.evaluate.peers import at_endpoint, on_this_machine
from facemllm.evaluate.predict import Likelihood, predict
from facemllm.scoring import benchmarks as scoring
from facemllm.scoring import paired, stats
from facemllm.scoring.metrics import CLOSED_MEAN
from facemllm.settings import Settings
from facemllm.tables import CONVERSATIONS, PREDICTIONS, Table, open_table
from facemllm.version import ledger

LIKELIHOOD, WRITTEN = "likelihood", "written"
"""How closed questions were answered."""
OVERALL, OWN = "overall", "overall, own rules"
"""Names of the figures over everything: mean balanced accuracy of closed questions, or of a benchmark accuracy by our
reading and by its own rules."""
TWO_WAYS = "answered in two ways, not judged"
COST = "cost.json"

VersionFolder = Callable[[str], Path]
"""The folder of a registered version or alias; raises UserError if there is none. The registry knows."""


@dataclass(frozen=True)
class Answers:
    """A model of the list with its evaluation."""

    listed: Listed
    folder: Path
    metrics: Mapping[str, Any]

    @property
    def way(self) -> str:
        """How it answered closed questions."""
        ours = self.listed.kind == "ours" and "benchmark" not in self.metrics
        return LIKELIHOOD if ours else WRITTEN


def leaderboard(
    settings: Settings, models: Sequence[Listed], conversations: Path, out: Path, version_folder: VersionFolder
) -> dict[str, Any]:
    """Evaluate what is not evaluated yet, and make the table: `models`, each with `figures` by column, shares, cost and
    `error`, and `differences` of those that were fine-tuned. Written as `leaderboard.json`, and returned. Raises
    UserError when the questions are none, or the ledger forbids to measure on them."""
    table = open_table(conversations, CONVERSATIONS)
    ledger.require(settings, table.sources, "evaluate")
    benchmark = scoring.benchmark_of(table)
    chosen = {"generated_faces": 0, "disturbed_faces": 0}
    settings = settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update=chosen)})
    found: dict[str, Answers] = {}
    rows = []
    for number, listed in enumerate(models, start=1):
        progress.event(note=f"{listed.name} ({number} of {len(models)})")
        row: dict[str, Any] = {name: getattr(listed, name) for name in ("name", "kind", "fine_tuned_from")}
        try:
            own = found[listed.name] = _answers(settings, listed, table, out, version_folder)
            row |= {"digest": own.metrics["model_digest"], "way": own.way, "figures": figures(own.metrics)}
            row |= {**_shares(own.metrics), "cost": _json(own.folder / COST), "error": None}
        except Exception as error:  # of one model: others are asked all the same
            row["error"] = one_line(error)
            progress.event(note=f"{listed.name} failed: {row['error']}")
        rows.append(row)
    board = {
        "conversations_digest": table.digest,
        "sources": table.sources,
        "split": settings.evaluate.split,
        "benchmark": None if benchmark is None else benchmark.title,
        "models": rows,
        "differences": _differences(settings, table, found),
    }
    atomic_write(out / "leaderboard.json", run.encode(board))
    return board


def figures(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The columns of a model: overall first, then the tasks, each with `value`, `low`, `high`, `unit` and whether
    higher is better. Tasks of a benchmark are accuracies by our reading."""
    share = {"unit": "", "higher_is_better": True}
    if "benchmark" in metrics:
        by_place = metrics["figures"]
        tasks = {place: body["ours"] for place, body in by_place.items() if body["task"]}
        heads = {OWN: by_place[scoring.OVERALL]["own"], OVERALL: by_place[scoring.OVERALL]["ours"]}
        return {name: {**share, **figure} for name, figure in {**heads, **tasks}.items()}
    kept = ("value", "low", "high", "unit", "higher_is_better")
    closed = metrics[CLOSED_MEAN] or {}
    heads = {OVERALL: {**share, **{end: closed.get(end) for end in ("value", "low", "high")}}}
    return heads | {task: {name: body[name] for name in kept} for task, body in metrics["tasks"].items()}


def _shares(metrics: Mapping[str, Any]) -> dict[str, Any]:
    if "benchmark" in metrics:
        whole = metrics["figures"][scoring.OVERALL]
        return {"n": whole["n"], "unreadable": whole["unreadable"], "not_answered": whole["not_answered"]}
    tasks = metrics["tasks"].values()
    count = sum(body["n"] for body in tasks)
    unreadable = sum(body["unreadable"] * body["n"] for body in tasks)
    return {"n": count, "unreadable": stats.plain(unreadable / count), "not_answered": 0.0}


def _answers(settings: Settings, listed: Listed, table: Table, out: Path, version_folder: VersionFolder) -> Answers:
    """The evaluation of a model, made if it is not there yet."""
    own = settings_of(settings, listed)
    model = _chosen(own, listed, table, version_folder)
    code = digests.of_code("facemllm.evaluate.models")
    hangs_on = {"evaluate": own.evaluate.model_dump(), "seed": own.seed, "kind": listed.kind, "code": code}
    hangs_on |= {"image_size": listed.image_size}
    folder = out / "answers" / digests.of_json([model.digest, table.digest, hangs_on])[:32]
    if not (folder / COST).is_file():
        _evaluate(own, model, table, folder, listed.image_size)
    return Answers(listed, folder, _json(folder / "metrics.json"))


def _chosen(settings: Settings, listed: Listed, table: Table, version_folder: VersionFolder) -> Chosen:
    if listed.kind == "endpoint":
        return Chosen.other(at_endpoint(settings, table.path))
    if listed.kind == "hub":
        return Chosen.other(on_this_machine(settings, listed.where))
    folder = Path(listed.where)
    return Chosen.ours(folder if folder.is_dir() else version_folder(listed.where))


def _evaluate(settings: Settings, model: Chosen, table: Table, folder: Path, image_size: int | None) -> None:
    spent: dict[str, Any] = {"parameters": None, "operations": None, "tokens_in": None, "tokens_out": None}
    spent |= {"price": None, "seconds": None, "questions": None, "side": None, "image_tokens": None}
    predictor = None
    if model.peer is not None:
        spent["side"] = model.peer.image_side
    if model.folder is not None:
        predictor = run.load(settings, model.folder, image_size)
        spent |= {"side": predictor.family.side, "image_tokens": predictor.family.image_count}
        spent["operations"] = _operations(settings, predictor, table)
    if (weights := model.folder or _folder_of(model)) is not None:
        spent["parameters"] = parameters_of(weights)

    def timed(seconds: float, questions: int) -> None:
        spent.update(seconds=seconds, questions=questions)

    def finish(partial: Path, metrics: Mapping[str, Any]) -> None:
        if model.peer is not None:  # whose replies may be of another day
            used = model.peer.used
            spent.update(seconds=used.seconds, questions=used.replies, price=used.cost)
            if used.metered:
                spent.update(tokens_in=used.tokens_in / used.metered, tokens_out=used.tokens_out / used.metered)
        (partial / COST).write_bytes(run.encode(spent))

    answered(settings, model, table.path, folder, finish, timed, predictor)


def _folder_of(model: Chosen) -> Path | None:
    """The folder of a peer that runs on this machine."""
    found = getattr(model.peer.sender, "folder", None) if model.peer is not None else None
    return found if isinstance(found, Path) else None


def parameters_of(folder: Path) -> int:
    """How many numbers the weights of a model directory hold, a shared one counted once."""
    from safetensors import safe_open

    count = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                size = 1
                for side in tensors.get_slice(name).get_shape():
                    size *= side
                count += size
    return count


class _Kept:
    """Takes the rows that a table would."""

    def __init__(self) -> None:
        self.rows = 0

    def write(self, rows: Sequence[Any]) -> None:
        self.rows += len(rows)


def _operations(settings: Settings, predictor: Any, table: Table) -> float | None:
    """Floating-point operations a question, counted by PyTorch on those of one picture; None where it asks nothing."""
    split, longest = settings.evaluate.split, settings.evaluate.max_new_tokens
    with cost.operations() as counter:
        if scoring.benchmark_of(table) is not None:
            single = (one for one in benchmarks.posed(table, split) if len(one.pictures) == 1)
            count = len(list(benchmarks.Own(predictor, longest).solve(list(islice(single, 1)))))
        else:
            kept: Any = _Kept()
            faces = run.drawn(table, split, 1)
            predict(Likelihood(predictor, longest), table, split, kept, "", batch_images=1, faces=faces)
            count = kept.rows
    return counter.get_total_flops() / count if count else None


def _differences(settings: Settings, table: Table, found: Mapping[str, Answers]) -> list[dict[str, Any]]:
    """Of every model that was fine-tuned from another of the list: its figures less the other's, paired."""
    rows: list[dict[str, Any]] = []
    for own in found.values():
        if (base := found.get(own.listed.fine_tuned_from or "")) is None:
            continue
        compared = _compared(settings, table, base.folder, own.folder)
        if base.way != own.way:
            unjudged = {"p": None, "p_holm": None, "verdict": TWO_WAYS}
            compared = {column: {**entry, **unjudged} for column, entry in compared.items()}
        rows.append({"name": own.listed.name, "from": base.listed.name, "figures": compared})
    pairs = [row["figures"] for row in rows]
    tested = [(entries, column) for entries in pairs for column, entry in entries.items() if "verdict" not in entry]
    for family in ([pair for pair in tested if (pair[1] == OVERALL) == overall] for overall in (True, False)):
        p = [entries[column]["p"] for entries, column in family]
        corrected = stats.holm([float("nan") if one is None else one for one in p])
        for (entries, column), p_holm in zip(family, corrected, strict=True):
            entries[column] = paired.judged({**entries[column], "p_holm": stats.plain(p_holm)})
    return rows


def _compared(settings: Settings, table: Table, first: Path, second: Path) -> dict[str, Any]:
    kept = ("difference", "higher_is_better", "unit", "p")
    if scoring.benchmark_of(table) is None:
        compared = paired.compare(settings, table.path, first, second)["figures"]
        heads = {name: entry for name, entry in compared.items() if "." not in name}
    else:
        paper = scoring.read_paper(table, settings.evaluate.split)
        ours, theirs = (scoring.mark(paper, open_table(one / run.PREDICTED, PREDICTIONS)) for one in (first, second))
        heads = scoring.compare(settings, paper, ours, theirs)
    named = {CLOSED_MEAN: OVERALL, scoring.OVERALL: OVERALL}
    return {named.get(name, name): {key: entry[key] for key in kept} for name, entry in heads.items()}


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text("utf-8")))
