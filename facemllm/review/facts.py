"""What a bundle says about a model, as the page shows it: rules with what is worst first, figures, changes against the
champion, gaps, data, cost, what came from what.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from facemllm.promote.checks import State, rules
from facemllm.report.web import plain
from facemllm.review.fields import MOST, Object, is_digest, mapping, mappings, number, pairs, rows, said, text
from facemllm.scoring.figures import Measure, measure

_MEASURED: tuple[str, ...] = ("device", "seconds", "samples", "tokens", "flops", "peak_memory_bytes")
_MEASURED += ("energy_cpu_joules", "energy_gpu_joules", "price")
_STEPS = ("ingest", "annotate", "reformat", "validate", "version", "align", "instruct", "specialize")


@dataclass(frozen=True)
class Check:
    """One rule of the gate. `usual` says where the limit is not that of params.yaml; `shown` and `asked` are value and
    limit where they are no numbers."""

    key: str
    kind: str
    state: State
    reason: str
    value: float | None
    low: float | None
    high: float | None
    limit: float | None
    usual: str = ""
    shown: str = ""
    asked: str = ""


@dataclass(frozen=True)
class Task:
    """One task's figure with its interval, beside its baselines and the champion. `worse` is by how much the champion
    is better, with its interval, where both were compared."""

    name: str
    measure: Measure
    value: float | None
    low: float | None
    high: float | None
    n: float | None
    unreadable: float | None
    higher_is_better: bool
    constant: float | None
    pixels: float | None
    champion: float | None


@dataclass(frozen=True)
class Change:
    """A task against the champion: how much worse this model is (negative: better), with its interval, and whether
    the interval leaves zero out."""

    name: str
    champion: float | None
    value: float | None
    worse: float | None
    low: float | None
    high: float | None
    verdict: str


@dataclass(frozen=True)
class Gap:
    """A difference between two groups of people; `detectable` is the least difference those people could show."""

    task: str
    kind: str
    groups: str
    value: float | None
    low: float | None
    high: float | None
    limit: float | None
    detectable: float | None
    verdict: str


@dataclass(frozen=True)
class Source:
    """A dataset behind the model: its licence and what it may be used for."""

    name: str
    licence: str
    uses: tuple[str, ...]
    further: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Digest:
    """Something named by its SHA-256, and the anchor under which the page lists it."""

    name: str
    value: str

    @property
    def anchor(self) -> str:
        """An id made of plain characters."""
        return "digest-" + re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class Facts:
    """A whole bundle."""

    name: str
    version: str
    model: str
    size: float | None
    files: int
    passed: bool | None
    checks: tuple[Check, ...]
    loosened: tuple[tuple[str, str, str], ...]
    tasks: tuple[Task, ...]
    changes: tuple[Change, ...]
    champion: tuple[str, str] | None
    gaps: tuple[Gap, ...]
    sources: tuple[Source, ...]
    data: tuple[tuple[str, str], ...]
    code: tuple[tuple[str, str], ...]
    settings: tuple[tuple[str, str], ...]
    cost: tuple[tuple[str, ...], ...]
    lineage: tuple[Digest, ...]
    digests: tuple[Digest, ...]

    @property
    def failed(self) -> int:
        """How many rules are broken."""
        return sum(check.state == "failed" for check in self.checks)

    @property
    def near(self) -> int:
        """How many rules are met within the uncertainty of the figure."""
        return sum(check.state == "near" for check in self.checks)

    @property
    def worse(self) -> int:
        """How many tasks are shown to be worse than the champion's."""
        return sum(change.verdict == "worse" for change in self.changes)


def read(bundle: Object) -> Facts:
    """What a bundle (`bundle.json`, whose digest was checked) says."""
    model, gate = mapping(bundle, "model"), mapping(bundle, "gate")
    tasks = tuple(_task(name, entry) for name, entry in mappings(bundle.get("tasks")))
    usual = {plain(row.get("key")): row for row in rows(bundle.get("loosened"))}
    checks = [_check(row, state) for state, row in rules(bundle)[:MOST]]
    passed = gate.get("passed")
    champion = mapping(bundle, "champion")
    return Facts(
        name=text(model, "name"),
        version=text(model, "version"),
        model=text(model, "digest"),
        size=number(model.get("bytes")),
        files=len(mapping(model, "files")),
        passed=passed if isinstance(passed, bool) else None,
        checks=tuple(checks),
        loosened=tuple((key, said(row.get("value")), said(row.get("default"))) for key, row in usual.items()),
        tasks=tasks,
        changes=_changes(tasks, checks) if champion else (),
        champion=(text(champion, "version"), text(champion, "digest")) if champion else None,
        gaps=tuple(_gaps(bundle, gate)),
        sources=tuple(map(_source, rows(bundle.get("sources")))),
        data=_data(bundle),
        code=pairs({**_plain(mapping(bundle, "code")), "image": bundle.get("image")}),
        settings=_settings(mapping(bundle, "settings")),
        cost=_cost(mapping(bundle, "cost")),
        lineage=_lineage(mapping(bundle, "lineage")),
        digests=tuple(_digests(bundle)),
    )


def _check(row: Object, state: State) -> Check:
    key, kind, setting = text(row, "key"), text(row, "kind"), text(row, "setting")
    value, low, high, limit = (number(row.get(name)) for name in ("value", "low", "high", "limit"))
    changed = ""
    if state == "loosened" or row.get("change") in ("loosened", "tightened"):
        changed = f"{setting} {said(row.get('asked'))}, usually {said(row.get('default'))}"
    shown, asked = ("" if number(row.get(n)) is not None else said(row.get(n)) for n in ("value", "limit"))
    return Check(key, kind, state, text(row, "reason"), value, low, high, limit, changed, _short(shown), _short(asked))


def _short(words: str) -> str:
    """A digest by its first digits."""
    return words[:12] if is_digest(words) else words


def _task(name: str, entry: Object) -> Task:
    value, low, high, n, unreadable = (number(entry.get(k)) for k in ("value", "low", "high", "n", "unreadable"))
    rivals = mapping(entry, "baselines")
    higher = entry.get("higher_is_better")
    how = measure({"metric": text(entry, "metric"), "unit": text(entry, "unit")})
    return Task(
        name=name,
        measure=how,
        value=value,
        low=low,
        high=high,
        n=n,
        unreadable=unreadable,
        higher_is_better=higher if isinstance(higher, bool) else how.higher_is_better,
        constant=number(rivals.get("constant")),
        pixels=number(rivals.get("pixels")),
        champion=number(mapping(entry, "champion").get("value")),
    )


def _changes(tasks: Sequence[Task], checks: Sequence[Check]) -> tuple[Change, ...]:
    paired = {check.key: check for check in checks if check.kind == "champion"}
    found = []
    for task in tasks:
        check = paired.get(task.name)
        worse = check.value if check is not None else None
        low, high = (check.low, check.high) if check is not None else (None, None)
        if worse is None and task.value is not None and task.champion is not None:
            worse = (task.champion - task.value) * (1 if task.higher_is_better else -1)
        shown = "worse" if low is not None and low > 0 else "better" if high is not None and high < 0 else ""
        verdict = shown or ("no difference shown" if low is not None else "")
        found.append(Change(task.name, task.champion, task.value, worse, low, high, verdict))
    order = {"worse": 0, "better": 2}
    return tuple(sorted(found, key=lambda one: (order.get(one.verdict, 1), -(one.worse or 0.0))))


def _gaps(bundle: Object, gate: Object) -> Iterator[Gap]:
    """What the fairness rules say, each with its power, then the other gaps that were shown, largest first."""
    rules = [row for row in rows(gate.get("checks")) if row.get("kind") == "fairness"]
    limits = {text(row, "key"): number(row.get("limit")) for row in rules}
    power = {text(row, "key"): number(row.get("minimum_detectable_difference")) for row in rules}
    seen = set()
    for row in rules:
        task, pair = text(row, "key"), _pair(row.get("groups"))
        seen.add((task, pair))
        blind = (power[task] or 0.0) > (limits[task] or 0.0)
        verdict = "beyond the limit" if row.get("passed") is not True else "too few people" if blind else "within"
        yield _gap(row, task, "the rule", pair, limits[task], power[task], verdict)
    for row in sorted(rows(bundle.get("gaps")), key=lambda row: -abs(number(row.get("value")) or 0.0)):
        task, pair = text(row, "task"), _pair([row.get("a"), row.get("b")])
        if (task, pair) not in seen:
            detectable = number(row.get("minimum_detectable_difference"))
            verdict = "shown" if limits.get(task) is not None else "no limit"
            yield _gap(row, task, text(row, "kind"), pair, limits.get(task), detectable, verdict)


def _gap(
    row: Object, task: str, kind: str, pair: str, limit: float | None, detectable: float | None, verdict: str
) -> Gap:
    value, low, high = (number(row.get(name)) for name in ("value", "low", "high"))
    return Gap(task, kind, pair, value, low, high, limit, detectable, verdict)


def _pair(groups: object) -> str:
    return " – ".join(plain(one, 100) for one in groups[:2] if one is not None) if isinstance(groups, list) else ""


def _source(row: Object) -> Source:
    uses = row.get("uses")
    known = ("key", "name", "licence", "uses")
    name = text(row, "name") or text(row, "key")
    allowed = tuple(plain(use) for use in uses[:MOST]) if isinstance(uses, list) else ()
    return Source(name, text(row, "licence"), allowed, pairs({k: v for k, v in row.items() if k not in known}))


def _data(bundle: Object) -> tuple[tuple[str, str], ...]:
    evaluation = mapping(bundle, "evaluation")
    asked = {"evaluated on": evaluation.get("split"), **{n: evaluation.get(n) for n in ("people", "pictures")}}
    return pairs({"revision": mapping(bundle, "data").get("revision"), **asked})


def _plain(source: Object) -> dict[str, object]:
    """What is no object in an object."""
    return {name: value for name, value in source.items() if not isinstance(value, dict)}


def _settings(settings: Object) -> tuple[tuple[str, str], ...]:
    changed = (
        (name, f"{said(row.get('value'))}, usually {said(row.get('default'))}")
        for name, row in mappings(settings.get("changed"))
    )
    return (*pairs({"profile": settings.get("profile")}), *changed)


def _cost(cost: Object) -> tuple[tuple[str, ...], ...]:
    """A row a step behind the names of what was measured; the sum last."""
    steps = list(mappings(cost.get("steps")))
    known = [name for name in _MEASURED if any(entry.get(name) is not None for _, entry in steps)]
    if not steps:
        return ()
    whole = {"seconds": cost.get("seconds"), "price": cost.get("price")}
    each = [(name, *(_cell(entry.get(one)) for one in known)) for name, entry in steps]
    return (("", *known), *each, ("all", *(_cell(whole.get(one)) for one in known)))


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else _large(value)


def _large(value: object) -> str:
    return f"{number(value):.3g}" if isinstance(value, int) and abs(value) >= 10**7 and number(value) else said(value)


def _lineage(lineage: Object) -> tuple[Digest, ...]:
    data = {"conversations", "faces"}  # other names of what ingest and reformat made
    place = {name: index for index, name in enumerate(_STEPS)}
    known = [Digest(plain(name), plain(value)) for name, value in list(lineage.items())[:MOST]]
    known = [one for one in known if is_digest(one.value) and one.name not in data]
    last = {"evaluate": 1, "gate": 2}
    return tuple(sorted(known, key=lambda one: (last.get(one.name, 0), place.get(one.name, len(place)), one.name)))


def _digests(bundle: Object) -> Iterator[Digest]:
    champion = mapping(bundle, "champion")
    named = {
        "model": mapping(bundle, "model").get("digest"),
        "evaluation": mapping(bundle, "evaluation").get("digest"),
        "faces": mapping(bundle, "data").get("faces"),
        "conversations": mapping(bundle, "data").get("conversations"),
        "model card": bundle.get("card"),
        "SBOM": bundle.get("sbom"),
        "champion's model": champion.get("digest"),
        "champion's evaluation": champion.get("evaluation"),
    }
    for name, value in named.items():
        if is_digest(value):
            yield Digest(name, str(value))
