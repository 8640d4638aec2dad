"""The gate: whether a model may be put before a person. It fails on everything it cannot see.

A rule answers as data (`checks.check`), each limit beside that of plain `params.yaml`. By the kind of their checks:

    digest        the bytes of every input are those of its digest
    identity      the candidate's answers are the model's own, the champion's those of the model in production
    threshold     every figure named in `promote.thresholds` reaches its bound
    present       every task of `reformat.tasks` has a figure
    constant      the 95 % interval of every task lies wholly on the good side of what a constant answer scores
    unreadable    few of a task's answers cannot be read
    champion      both models have answered the same questions; a task fails where the whole 95 % interval of the paired
                  difference is worse than the champion by more than `champion_margin` (a share of the champion's error
                  for errors, points of the figure otherwise), uncorrected: a false alarm costs less than a loss
    fairness      no gap between two groups of people is shown to exceed `promote.fairness_gap` of its task, corrected
                  for all pairs of the task; with `fairness_power: required`, the people are also enough to show one
    contradictions, robustness
                  answers about one face seldom contradict each other; figures do not fall too far on worse pictures
    budget, uses  what the model cost; what the terms of all its sources allow

A figure that is missing or undefined, and a kind of group that a fairness rule knows but that has no two groups of
enough people, fails its check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from facemllm.core import digests
from facemllm.core.store import Store
from facemllm.errors import UserError
from facemllm.promote import rules_origin as origins
from facemllm.promote.checks import Check, check, number
from facemllm.promote.evidence import names, read_once, readable, recount, verified
from facemllm.promote.limits import changes, in_words, limits, marked
from facemllm.promote.rules import (
    Difference,
    above_constant,
    consistent,
    higher_is_better,
    known_rules,
    no_worse,
    robust,
    threshold,
    unreadable,
)
from facemllm.promote.rules import find as find_figure
from facemllm.promote.rules_fairness import fair, unjudged
from facemllm.promote.rules_origin import Origin
from facemllm.scoring import paired, stats
from facemllm.scoring.figures import shown_gaps
from facemllm.settings import Settings, plain
from facemllm.version import ledger

__all__ = ["Decision", "Difference", "Origin", "Verdict", "decide", "differences", "judge", "known_rules", "verdict"]


@dataclass(frozen=True)
class Decision:
    """The gate's answer: why it refuses (or what it found in order), every check, and the limits that were loosened."""

    passed: bool
    reasons: list[str]
    checks: list[Check] = field(default_factory=list)
    loosened: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """A decision on a stored evaluation, with the `metrics` of both models that it was judged by, and the SHA-256 of
    each file of the `model` and the `evaluation`."""

    decision: Decision
    metrics: Mapping[str, Any]
    champion: Mapping[str, Any] | None
    origin: Origin
    files: Mapping[str, Mapping[str, str]]


def verdict(
    settings: Settings,
    evaluation: str,
    *,
    model: str | None = None,
    champion: str = "",
    answered: Callable[[Mapping[str, Any]], Path | None] = lambda _: None,
) -> Verdict:
    """Judge an evaluation in the store from bytes whose digests are taken anew, those of the model too.

    `evaluation` and `model` are the digests they must have (`model` None: the one the evaluation names), `champion` is
    that of the model in production, or empty; for the candidate's metrics `answered` gives the folder of the champion's
    evaluation, named by its digest. Raises UserError naming the first file that does not fit its digest, and for
    figures that do not follow from the answers beside them.
    """
    store = Store(settings.home)
    records = store.records()

    def files(digest: str) -> Mapping[str, str]:
        listed = records.get(digest, {}).get("files")
        return listed if isinstance(listed, dict) else {}

    with readable(store.path(evaluation)), ExitStack() as held:
        candidate = held.enter_context(verified(store.path(evaluation), evaluation, files(evaluation)))
        metrics = read_figures(candidate.path, store.path(evaluation))
        model = model or str(metrics["model_digest"])
        names(store.path(model))
        bytes_of = digests.of_each(store.path(model), fresh=True)
        listings = {"evaluation": (evaluation, digests.of_listing(candidate.files))}
        listings["model"] = (model, digests.of_listing(bytes_of))
        theirs, rival, folder = None, None, answered(metrics) if champion and champion != model else None
        if folder is not None:
            rival = held.enter_context(verified(folder, folder.name, files(folder.name)))
            theirs = read_figures(rival.path, folder)
            listings["champion's evaluation"] = (folder.name, digests.of_listing(rival.files))
        origin = Origin(
            model=model,
            champion=champion if champion != model else None,
            answered={"candidate": metrics["model_digest"], **({"champion": theirs["model_digest"]} if theirs else {})},
            digests=listings,
            sources=ledger.sources_of_model(held.enter_context(read_once(*_lineage(store.path(model), bytes_of)))),
            costs={step: record["cost"] for step, record in store.behind(model).items() if record.get("cost")},
        )
        for each in origins.same_bytes(origin) + origins.own_figures(origin):
            if not each["passed"]:
                raise UserError(f"{each['reason']}; nothing was judged: make again what does not fit")
        conversations = store.path(metrics["conversations_digest"])
        recount(metrics, conversations, candidate)
        decision = decide(settings, conversations, candidate.path, rival.path if rival else None, origin)
    return Verdict(decision, metrics, theirs, origin, {"model": bytes_of, "evaluation": candidate.files})


def _lineage(model: Path, files: Mapping[str, str]) -> tuple[Path, str]:
    return model / "lineage.json", files.get("lineage.json", "")


def read_figures(folder: Path, shown: Path | None = None) -> dict[str, Any]:
    """What `metrics.json` of an evaluation folder holds, as `paired.read_metrics`, with its tasks. Raises UserError,
    naming the folder `shown`."""
    try:
        metrics = paired.read_metrics(folder)
    except UserError as error:
        raise UserError(str(error).replace(str(folder), str(shown or folder))) from None
    if not isinstance(metrics.get("tasks"), dict):
        raise UserError(f"{shown or folder} is not an evaluation: metrics.json does not state tasks; evaluate again")
    return metrics


def decide(
    settings: Settings,
    conversations: Path,
    candidate: Path,
    champion: Path | None = None,
    origin: Origin | None = None,
) -> Decision:
    """Judge the evaluation folder of a candidate, against that of the champion if there is one.

    Raises UserError for a threshold that names nothing, for metrics that do not belong to the predictions beside them,
    and when the two models have not answered the same questions.
    """
    metrics = read_figures(candidate)
    if champion is None or paired.read_metrics(champion)["model_digest"] == metrics["model_digest"]:
        return judge(settings, metrics, origin=origin)
    return judge(settings, metrics, differences(settings, conversations, candidate, champion), origin)


def judge(
    settings: Settings,
    metrics: Mapping[str, Any],
    against: Mapping[str, Difference] | None = None,
    origin: Origin | None = None,
) -> Decision:
    """Judge figures: `metrics` as in metrics.json, `against` the champion by task. Without an `origin`, what the model
    cost, what its data allow and whose the figures are is not judged."""
    asked, promote = known_rules(settings), settings.promote
    checks = [] if origin is None else origins.same_bytes(origin) + origins.own_figures(origin)
    if origin is not None and origin.champion and against is None:
        reason = (
            f"the champion {origin.champion[:12]} has not answered the candidate's questions; run the pipeline again"
        )
        checks.append(check("champion", "all tasks", False, reason, setting="promote.champion_margin"))
    checks += [threshold(key, bound, find_figure(metrics, key)) for key, bound in asked.items()]
    for name in settings.reformat.tasks:
        entry = metrics["tasks"].get(name)
        if entry is None and not promote.every_task:
            continue
        if entry is None or number(entry["value"]) is None:
            reason = f"{name} has no figure; every task must be evaluated"
            checks.append(check("present", name, False, reason, setting="promote.every_task"))
        elif promote.above_constant:
            checks.append(above_constant(name, entry))
        if entry is not None and promote.unreadable is not None:
            checks.append(unreadable(name, entry, promote.unreadable))
        if against is not None and entry is not None:
            checks.append(no_worse(name, against.get(name), promote.champion_margin, entry))
    gaps = {name: gap for name, gap in promote.fairness_gap.items() if gap is not None}
    checks += [fair(settings, name, gap, metrics) for name, gap in gaps.items()]
    checks += consistent(settings, metrics) + robust(settings, metrics)
    if origin is not None:
        checks += origins.within_budget(settings, origin) + origins.allowed_uses(settings, origin)
    return _decision(settings, checks, _in_order(settings, metrics, checks, against))


def differences(settings: Settings, conversations: Path, candidate: Path, champion: Path) -> dict[str, Difference]:
    """Every figure of two evaluations, paired: the same resampled people for both. By name as in metrics.json.

    Raises UserError unless both have answered the same questions of these conversations.
    """
    mine, yours = paired.replicates(settings, paired.read_pair(conversations, candidate, champion))
    found = {}
    for name, values in mine.items():
        gap = yours[name] - values if higher_is_better(name) else values - yours[name]
        found[name] = Difference(float(values[0]), float(yours[name][0]), stats.interval(gap))
    return found


def depends(settings: Settings) -> dict[str, Any]:
    """The settings and ledger rows that a verdict depends on, `params.yaml`'s own limits among them."""
    usual = {key: limit.value for key, limit in limits(plain()).items()}
    ours = {key: limit.value for key, limit in limits(settings).items()}
    rows = {key: [row.status, *row.uses] for key, row in ledger.entries(settings).items()}
    return {"limits": ours, "params": usual, "price_per_hour": settings.cost.price_per_hour, "ledger": rows}


def _decision(settings: Settings, checks: list[Check], in_order: str) -> Decision:
    changed = {change.key: change for change in changes(settings)}
    ours, usual = limits(settings), limits(plain())
    marked_checks = [marked(each, ours, usual, changed) for each in checks]
    loosened = [change for change in changed.values() if change.loosened]
    failed = [each["reason"] for each in marked_checks if not each["passed"]]
    words = f"gate loosened by: {', '.join(map(str, loosened))}"
    reasons = failed or ([in_order, words] if loosened else [in_order])
    entries = [{name: value for name, value in asdict(one).items() if name != "loosened"} for one in loosened]
    return Decision(not failed, reasons, marked_checks, entries)


def _in_order(
    settings: Settings, metrics: Mapping[str, Any], checks: list[Check], against: Mapping[str, Difference] | None
) -> str:
    kinds = [each["kind"] for each in checks]
    parts = [f"{kinds.count('threshold')} thresholds are met"]
    if settings.promote.above_constant:
        parts.append(f"all {kinds.count('constant')} tasks are better than a constant answer")
    if "fairness" in kinds:
        few = [each["too_few"] for each in checks if each.get("too_few")]
        underpowered = f" ({unjudged(few)})" if few else ""
        detectable = [
            f"{each['key']} {each['minimum_detectable_difference']:.3g}"
            for each in checks
            if each.get("minimum_detectable_difference")
        ]
        power = f"; minimum detectable difference at most: {', '.join(detectable)}" if detectable else ""
        parts.append(f"no gap between groups is shown to exceed what is allowed{underpowered}{power}")
    allowed = settings.promote.fairness_gap
    free = [f"{g['task']} by {g['kind']}" for g in shown_gaps(metrics) if allowed.get(g["task"]) is None]
    if free:
        parts.append(f"gaps shown that promote.fairness_gap sets no limit to: {', '.join(free)}")
    quiet = {"unreadable": "readable answers", "contradictions": "consistency", "robustness": "worse pictures"}
    quiet |= {"budget": "budget", "uses": "terms of the data"}
    if held := [words for kind, words in quiet.items() if kind in kinds]:
        parts.append(f"within limits: {', '.join(held)}")
    margin = in_words(settings.promote.champion_margin)
    parts.append(
        "there is no other champion to compare with"
        if against is None
        else f"no task is shown to be worse than the champion by more than the margin of {margin}"
    )
    return "; ".join(parts)
