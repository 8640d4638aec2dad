"""Figures of a benchmark's questions: by its own rules and by ours, side by side.

`own` reads answers and adds them up as the benchmark does (`tasks.multiple_choice`), `own_answered` leaves out those in
which its rule finds no option (Face-Human-Bench states both); `ours` reads them strictly and adds up the same way;
`likelihood` takes the likeliest option, of models that were scored so, over questions with one picture. A question that
a model was not asked, since it shows more pictures than the model takes, is wrong by every rule, and counted.

Intervals are a bootstrap over clusters: questions that share a picture, a person, or are one question asked of several
versions of a picture. Legend: N questions, S clusters, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from facemllm.core import digests
from facemllm.errors import UserError
from facemllm.scoring import metrics, stats
from facemllm.scoring.metrics import ACCURACY, Array
from facemllm.scoring.paired import judged
from facemllm.scoring.sheet import model_of
from facemllm.settings import Settings
from facemllm.tables import Table, mapping
from facemllm.tasks.answers import refuses
from facemllm.tasks.multiple_choice import BENCHMARKS, Benchmark, Problem, of_row

RULES = ("own", "own_answered", "ours", "likelihood")
OVERALL = ""
"""The name of the figure over everything; those beneath are `category` and `category/task`, and so on."""
_TASK = 2  # levels of a place that name a task

Node = tuple[str, ...]


def benchmark_of(table: Table) -> Benchmark | None:
    """The benchmark whose questions a table holds; None where it holds none's. Raises UserError when they are mixed."""
    sources = table.sources
    if not set(sources) & set(BENCHMARKS):
        return None
    if len(sources) > 1:
        raise UserError(f"{table.path} mixes {', '.join(sources)}; a benchmark is evaluated by itself")
    return BENCHMARKS[sources[0]]


@dataclass(frozen=True)
class Paper:
    """The questions of a table in order; `clusters` gives the cluster of each, numbered from 0."""

    benchmark: Benchmark
    sample_ids: Sequence[str]
    problems: Sequence[Problem]
    clusters: npt.NDArray[np.int64]

    @property
    def cluster_count(self) -> int:
        """How many clusters there are."""
        return int(self.clusters.max()) + 1

    @cached_property
    def nodes(self) -> dict[Node, npt.NDArray[np.int64]]:
        """Positions of the questions beneath each place of the benchmark's table, the whole of it first."""
        found: dict[Node, list[int]] = {(): []}
        for number, problem in enumerate(self.problems):
            if (place := problem.place) is not None:
                for depth in range(len(place) + 1):
                    found.setdefault(place[:depth], []).append(number)
                if not self.benchmark.levels:
                    found.setdefault(("several pictures" if problem.pictures > 1 else "one picture",), []).append(
                        number
                    )
        return {node: np.array(found[node], dtype=np.int64) for node in sorted(found)}


@dataclass(frozen=True)
class Marked:
    """Answers to a paper: `right` and `counted` by rule (N,), and whether each was unreadable to us or to the
    benchmark, refused, or not asked."""

    right: Mapping[str, Array]
    counted: Mapping[str, Array]
    shares: Mapping[str, Array]


def read_paper(table: Table, split: str) -> Paper:
    """The questions of a split. Raises UserError when there are none, or a row is none of a benchmark's."""
    benchmark = benchmark_of(table)
    sample_ids, problems, links = [], [], []
    for row in table.iterate(["conversation_id", "source", "subject_id", "images", "messages", "turns"], split):
        problem = of_row(row)
        problems.append(problem)
        sample_ids.append(str(row["turns"][0]["sample_id"]))
        person = [row["subject_id"]] if row["subject_id"] else []
        links.append([*person, problem.same, *(digests.of_bytes(image["bytes"]) for image in row["images"])])
    if not problems or benchmark is None:
        raise UserError(f"{table.path} has no questions in split '{split}'; choose another evaluate.split")
    return Paper(benchmark, sample_ids, problems, _clusters(links))


def _clusters(links: Sequence[Sequence[str]]) -> npt.NDArray[np.int64]:
    """Which entries hang together by what they name, directly or through others: a number from 0 for each."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    names: dict[str, int] = {}
    pairs = [(number, names.setdefault(name, len(names))) for number, own in enumerate(links) for name in own]
    rows, columns = np.array(pairs).T
    size = len(links) + len(names)
    graph = coo_array((np.ones(len(pairs)), (rows, columns + len(links))), shape=(size, size))
    found = connected_components(graph, directed=False)[1][: len(links)]
    return np.unique(found, return_inverse=True)[1].astype(np.int64)


def mark(paper: Paper, predictions: Table) -> Marked:
    """Answers of a predictions table, marked. Raises UserError unless every question is answered once."""
    rows = {row["sample_id"]: row for row in predictions.iterate(["sample_id", "raw", "parsed", "scores"])}
    if predictions.rows != len(rows) or set(rows) != set(paper.sample_ids):
        raise UserError(f"{predictions.path} does not answer each of these {len(paper.problems)} questions once")
    count = len(paper.problems)
    right = {rule: np.zeros(count) for rule in RULES}
    counted = {rule: np.ones(count) for rule in RULES}
    shares = {name: np.zeros(count) for name in ("unreadable", "own_unreadable", "refused", "not_answered")}
    for number, (name, problem) in enumerate(zip(paper.sample_ids, paper.problems, strict=True)):
        row = rows[name]
        raw, scores = row["raw"], mapping(row["scores"])
        own = None if raw is None else paper.benchmark.mark(raw, problem.options)
        said = None if own is None else problem.options[own]
        right["own"][number] = right["own_answered"][number] = said == problem.answer
        right["ours"][number] = row["parsed"] == problem.answer
        counted["own_answered"][number] = own is not None
        counted["likelihood"][number] = bool(scores)
        right["likelihood"][number] = bool(scores) and max(scores, key=lambda text: scores[text]) == problem.answer
        shares["not_answered"][number] = raw is None
        shares["unreadable"][number] = raw is not None and row["parsed"] is None
        shares["own_unreadable"][number] = raw is not None and own is None
        shares["refused"][number] = raw is not None and row["parsed"] is None and refuses(raw)
    return Marked(right, counted, shares)


def evaluation(settings: Settings, table: Table, predictions: Table) -> dict[str, Any]:
    """What `metrics.json` holds: whose answers these are, and the figures by place (`benchmarks.measure`)."""
    about = predictions.manifest["about"]
    split = about.get("split", settings.evaluate.split)
    paper = read_paper(table, split)
    return {
        "benchmark": paper.benchmark.name,
        "model_digest": model_of(predictions),
        "model": about.get("model"),
        "conversations_digest": table.digest,
        "predictions_digest": predictions.digest,
        "split": split,
        "clusters": paper.cluster_count,
        "left_out": sum(problem.place is None for problem in paper.problems),
        "not_asked": about.get("not_asked", {}),
        "seed": settings.seed,
        "resamples": settings.evaluate.bootstrap,
        "figures": measure(settings, paper, mark(paper, predictions)),
    }


def measure(settings: Settings, paper: Paper, marked: Marked) -> dict[str, Any]:
    """The figures by place (`OVERALL`, `category`, `category/task`; `task` says whether it is one): value and interval
    by each rule, what chance gives, shares; of a task, where there are several, also how far it lies from the mean of
    all, with Holm's p over them."""
    drawn = {rule: replicates(settings, paper, marked, rule) for rule in RULES if marked.counted[rule].any()}
    gaps = dict(_gaps(settings, paper, drawn["ours"]))
    found, tasks = {}, set(tasks_of(paper))
    for node, rows in paper.nodes.items():
        clusters = len(np.unique(paper.clusters[rows]))
        own = [paper.problems[row] for row in rows]
        found["/".join(node)] = {
            "n": len(rows),
            "task": node in tasks,
            "clusters": clusters,
            "several_pictures": sum(problem.pictures > 1 for problem in own),
            "chance": stats.plain_mean(1 / len(problem.options) for problem in own),
            **{name: stats.plain_mean(values[rows]) for name, values in marked.shares.items()},
            **{rule: stats.spread(values[node], clusters) for rule, values in drawn.items()},
            **({"gap": gaps[node]} if node in gaps else {}),
        }
    return found


def replicates(settings: Settings, paper: Paper, marked: Marked, rule: str) -> dict[Node, Array]:
    """Accuracy (1 + R,) beneath each place by a rule, added up as the benchmark does: over all questions, or as the
    mean over the next level. The draws are the same for every model."""
    right, counted = marked.right[rule] * marked.counted[rule], marked.counted[rule]

    def sums(rows: npt.NDArray[np.int64]) -> stats.Sums:
        added = np.stack([right[rows], counted[rows]], axis=1)
        return stats.Sums(ACCURACY, stats.by_subject(paper.clusters[rows], added, paper.cluster_count))

    nodes = paper.nodes
    if not paper.benchmark.levels:
        own = {node: sums(rows) for node, rows in nodes.items()}
        return stats.replicate(own, settings.evaluate.bootstrap, settings.seed)
    parents = {node[:-1] for node in nodes if node}
    leaves = {node: sums(rows) for node, rows in nodes.items() if node not in parents}
    found = stats.replicate(leaves, settings.evaluate.bootstrap, settings.seed)
    for node in sorted(parents, key=len, reverse=True):
        found[node] = metrics.mean(value for child, value in found.items() if child and child[:-1] == node)
    return found


def tasks_of(paper: Paper) -> list[Node]:
    """The places that are tasks."""
    tasks = {problem.place[:_TASK] for problem in paper.problems if problem.place}
    return [node for node in paper.nodes if node in tasks]


def _gaps(settings: Settings, paper: Paper, drawn: Mapping[Node, Array]) -> Iterator[tuple[Node, dict[str, Any]]]:
    tasks = tasks_of(paper)
    if len(tasks) < 2:
        return
    middle = metrics.mean(drawn[node] for node in tasks)
    found = {node: _tested(settings, paper, node, drawn[node] - middle) for node in tasks}
    for (node, entry), p_holm in zip(found.items(), _corrected(found.values()), strict=True):
        difference = entry.pop("difference")
        yield node, {**difference, **entry, "p_holm": p_holm}


def _tested(settings: Settings, paper: Paper, node: Node, gap: Array, changes_N: Array | None = None) -> dict[str, Any]:
    """A difference with its p, as `paired.compare` finds it: of a t test, else, of answers that all changed alike
    (`changes_N`), of a sign test over clusters."""
    rows = paper.nodes[node]
    clusters, value, error, p = len(np.unique(paper.clusters[rows])), float(gap[0]), stats.standard_error(gap), math.nan
    if clusters >= settings.evaluate.min_group:
        p = stats.p_value(value, error, clusters - 1)
        if error == 0 and value != 0 and changes_N is not None:
            p = stats.sign_test(np.bincount(paper.clusters[rows], changes_N[rows]).astype(np.float64))
    return {"difference": stats.spread(gap, clusters), "p": stats.plain(p)}


def _corrected(entries: Iterable[Mapping[str, Any]]) -> list[float | None]:
    return [stats.plain(p) for p in stats.holm([math.nan if one["p"] is None else one["p"] for one in entries])]


def compare(settings: Settings, paper: Paper, first: Marked, second: Marked, rule: str = "ours") -> dict[str, Any]:
    """The second's figures less the first's, paired: overall and by task, with p, Holm's p over the tasks, and the
    verdict on the second, as `paired.compare` has them."""
    ours, theirs = (replicates(settings, paper, marked, rule) for marked in (first, second))
    changes_N = second.right[rule] - first.right[rule]
    found = {}
    for nodes in ([()], tasks_of(paper)):
        tested = {node: _tested(settings, paper, node, theirs[node] - ours[node], changes_N) for node in nodes}
        for (node, entry), p_holm in zip(tested.items(), _corrected(tested.values()), strict=True):
            about = {"higher_is_better": True, "metric": ACCURACY.name, "unit": ""}
            found["/".join(node)] = judged({**entry, **about, "p_holm": p_holm})
    return found
