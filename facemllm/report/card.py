"""The model card: what a version is, what it was made from, how well it does, and what it must not be used for.

Markdown with the metadata header that model hubs read, figures included (`model-index`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from facemllm.core import cost
from facemllm.report.kit import brief, p_value, plain_markdown, render
from facemllm.report.kit import code as in_code
from facemllm.report.kit import text as text_of
from facemllm.scoring import figures
from facemllm.scoring.figures import measure
from facemllm.scoring.metrics import CLOSED_MEAN, clears_constant
from facemllm.settings import Settings
from facemllm.tasks import ZERO_SHOT
from facemllm.version import ledger

SHORT = 1000  # characters; MLflow shows the description in full beside a version
PIPELINE = "image-text-to-text"

_FIXED = {*figures.HEAD, *figures.FIGURES}
_COST = ("device", "seconds", "samples", "tokens", "flops", "peak_memory_bytes", cost.CPU, cost.GPU)
_UNREAD = 0.01  # share of answers that cannot be read, from which on the limits name a task

Row = Sequence[Any]


def card(
    settings: Settings,
    model_digest: str,
    evaluation: Mapping[str, Any],
    lineage: Mapping[str, str],
    sources: Sequence[str],
    costs: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    decision: Mapping[str, Any] | None = None,
    code: Mapping[str, Any] | None = None,
) -> str:
    """The model card in Markdown, with the metadata header that model hubs read.

    `evaluation` is `metrics.json`; `lineage` names digests of what the model was made from, `sources` whose pictures,
    `costs` what each step cost. Of a version that is to be decided on, `decision` holds the gate's `passed`, `checks`
    and `loosened`, and the `champion` with what is worse than it; `code` the `commit` and whether it was `dirty`. What
    was not measured is left out.
    """
    rows = ledger.entries(settings)
    priced = {step: cost.priced(body, settings.cost.price_per_hour) for step, body in (costs or {}).items()}
    trusted = figures.trust(evaluation)
    body = render(
        "card.md.jinja",
        settings=settings,
        stages=list(settings.stages()),
        evaluation=evaluation,
        synthetic=_synthetic(sources),
        sources=[rows[key] for key in sources],
        allowed=[ledger.MEANING[use] for use in ledger.allowed(settings, sources)],
        results=_results(evaluation),
        zero_shot=_tasks(evaluation, zero_shot=True).get(ZERO_SHOT),
        groups=_groups(evaluation),
        gaps=_gaps(evaluation),
        compared=trusted["gaps"]["compared"],
        detectable=trusted["gaps"]["minimum_detectable_difference"],
        miscalibrated={t: b for t, b in (evaluation.get("calibration") or {}).items() if b.get("ece")},
        unlearnt=_unlearnt(evaluation),
        surest=trusted["gaps"]["surest"],
        unreadable={n: p["unreadable"] for n, p in _tasks(evaluation).items() if (p.get("unreadable") or 0) >= _UNREAD},
        costs=_costs(priced),
        decision=decision,
        checks=_checks(decision or {}),
        worse=_worse((decision or {}).get("champion") or {}),
        code=code,
        made=[("", "SHA-256"), *((n, in_code(digest)) for n, digest in {"model": model_digest, **lineage}.items())],
    )
    return f"---\n{_header(settings, evaluation, sources, list(rows.values()))}\n---\n\n{body}"


def short(settings: Settings, model_digest: str, evaluation: Mapping[str, Any], sources: Sequence[str]) -> str:
    """The card in a few lines, for the description of a registered version."""
    data = "synthetic heads; says nothing about real photographs" if _synthetic(sources) else ", ".join(sources)
    headline = ", ".join(
        f"{task} {brief(part)} {part.get('metric') or ''} {part.get('unit') or ''}".rstrip()
        for task, part in evaluation.get("tasks", {}).items()
    )
    lines = [
        f"Data: {data}. Profile {settings.profile}. Model {model_digest[:12]}.",
        f"Held-out people ({settings.evaluate.split}): {headline}.",
        "Not for identifying people, nor for decisions about them.",
    ]
    return "\n".join(lines)[:SHORT]


def _header(
    settings: Settings, evaluation: Mapping[str, Any], sources: Sequence[str], rows: Sequence[ledger.Entry]
) -> str:
    """The metadata as YAML: tags, and the figure of every task as hubs read them."""
    from huggingface_hub import EvalResult, ModelCardData

    found = dict(evaluation.get("tasks") or {})
    if evaluation.get(CLOSED_MEAN):
        found[CLOSED_MEAN] = evaluation[CLOSED_MEAN]
    results = [
        EvalResult(
            task_type=PIPELINE,
            task_name=task.replace("_", " "),
            dataset_type="-".join(sources) or "unknown",
            dataset_name=", ".join(sources) or "unknown",
            dataset_config=task,
            dataset_split=settings.evaluate.split,
            dataset_revision=evaluation.get("conversations_digest"),
            metric_type=metric,
            metric_name=measure(part, metric).long,
            metric_value=figure["value"],
        )
        for task, part in found.items()
        for metric, figure in {part.get("metric"): part, **(part.get("also") or {})}.items()
        if metric and figure.get("value") is not None
    ]
    licence, stated = _licence([row for row in rows if row.key in sources])
    data = ModelCardData(
        license=licence,
        license_name=stated,
        language="en",
        library_name="transformers",
        pipeline_tag=PIPELINE,
        tags=["face-perception", "multimodal", *(["synthetic-data"] if _synthetic(sources) else [])],
        model_name=settings.promote.model_name,
        eval_results=results or None,
    )
    return data.to_yaml()


def _licence(rows: Sequence[ledger.Entry]) -> tuple[str, str | None]:
    """The header's licence: a name that hubs know if all sources are under it, else `other` with the sources' words."""
    texts = list(dict.fromkeys(row.licence for row in rows))
    known = {found for text in texts if (found := re.match(r"cc0-1\.0|cc[ -]by[ -]4\.0$", text, re.IGNORECASE))}
    if len(texts) == 1 and known:
        return known.pop().group().lower().replace(" ", "-"), None
    return "other", "; ".join(texts) or "unknown"


def _synthetic(sources: Sequence[str]) -> bool:
    return list(sources) == ["render"]


def _tasks(evaluation: Mapping[str, Any], *, zero_shot: bool = False) -> dict[str, Any]:
    return {n: part for n, part in (evaluation.get("tasks") or {}).items() if (n == ZERO_SHOT) == zero_shot}


def _results(evaluation: Mapping[str, Any]) -> list[Row]:
    """Every task and item with its interval beside its baselines."""
    rows = figures.results(_tasks(evaluation))
    names = list(dict.fromkeys(name for row in rows for name in row if name not in _FIXED))
    lines: list[Row] = [("task", "metric", "value", "95 % interval", "n", "unreadable", *names)]
    for row in rows:
        name = f"{row['task']} · {row['item']}" if row["item"] else Markup(f"**{plain_markdown(row['task'])}**")
        between = "" if row["low"] is None else f"{brief(row['low'])} – {brief(row['high'])}"
        counts = ("" if row["n"] is None else str(row["n"]), brief(row["unreadable"]))
        metric = f"{row['metric']} {row['unit']}".strip()
        lines.append((name, metric, brief(row["value"]), between, *counts, *(brief(row.get(n)) for n in names)))
    return lines


def _groups(evaluation: Mapping[str, Any]) -> list[Row]:
    """Figures by groups of people, crossings of two left out; empty if no group is known."""
    lines: list[Row] = [("task", "by", "group", "people", "figure")]
    for row in figures.fairness_rows(evaluation):
        if " x " not in row["kind"]:
            figure = "too few people" if row.get("too_few") or row.get("value") is None else brief(row)
            lines.append((row["task"], row["kind"], row["group"], row.get("people", ""), figure))
    return lines if len(lines) > 1 else []


def _gaps(evaluation: Mapping[str, Any]) -> list[Row]:
    return [
        (gap["task"], gap["kind"], f"{gap['a']} – {gap['b']}", brief(gap), Markup(p_value(gap["p_holm"])))
        for gap in figures.shown_gaps(evaluation)
    ]


def _unlearnt(evaluation: Mapping[str, Any]) -> list[str]:
    """Tasks and items whose interval does not clear the constant answer. Those without that baseline say nothing."""
    found = []
    for task, head in _tasks(evaluation).items():
        for item, part in {"": head, **(head.get("items") or {})}.items():
            rival = figures.baselines(part).get("constant")
            better = measure({**head, **part}).higher_is_better
            judged = {**part, "baselines": {"constant": rival}, "higher_is_better": better}
            if rival is not None and part.get("low") is not None and not clears_constant(judged):
                found.append(f"{task} {item}".strip())
    return found


def _costs(found: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """What each step behind the model cost; empty if nothing was recorded."""
    known = {name for body in found.values() for name, value in body.items() if value is not None}
    names = [name for name in (*_COST, "price") if name in known]
    head = ("step", *(name.replace("_", " ") for name in names))
    return [head, *((step, *(_amount(body.get(n)) for n in names)) for step, body in found.items())] if names else []


def _checks(decision: Mapping[str, Any]) -> list[Row]:
    """Every rule of the gate that holds a figure against a limit."""
    lines: list[Row] = [("rule", "of", "figure", "limit", "in params.yaml", "")]
    for one in decision.get("checks") or ():
        if isinstance(one["limit"], int | float) and not isinstance(one["limit"], bool):
            usual = "" if one["default"] == one["asked"] else text_of(one["default"])
            verdict = Markup("passed" if one["passed"] else "**failed**")
            lines.append((one["kind"], one["key"], brief(one), brief(one["limit"]), usual, verdict))
    return lines if len(lines) > 1 else []


def _worse(champion: Mapping[str, Any]) -> list[Row]:
    """Tasks whose figure is worse than the champion's, and by how much."""
    lines: list[Row] = [("task", "worse by", "allowed")]
    lines += [(one["task"], brief(one), brief(one["limit"])) for one in champion.get("worse") or ()]
    return lines if len(lines) > 1 else []


def _amount(value: Any) -> str:
    if isinstance(value, int) and value < 10**10:
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, int | float) else str(value or "")
