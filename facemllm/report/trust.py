"""How far answers can be relied on: consistency, calibration, robustness, two ways of answering, confusions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from facemllm.report import html
from facemllm.report.charts import reliability

_WAYS = {
    "unseen": "in words that training never used",
    "statement": "as a statement to confirm or deny",
    "lettered": "with the options behind letters",
}
_KINDS = {
    "blur": "blurred",
    "dark": "dark",
    "jpeg": "poor JPEG",
    "occlusion": "a third covered",
    "no_map": "without the map of face parts",
}


def consistency(found: Mapping[str, Any] | None) -> str:
    """Broken logical relations beside those that the labels break, and the same question in other words."""
    relations, ways = (found or {}).get("relations") or {}, (found or {}).get("ways") or {}
    captions = (found or {}).get("captions") or {}
    parts = []
    if relations.get("model"):
        said = (
            "Where a logical relation can be checked (no beard and a goatee; bald and blond hair), the model's answers"
        )
        parts.append(_broken(f"{said} break it", relations) + _relations("relations", relations))
    if (captions.get("model") or {}).get("value") is not None:
        said = "Where a caption states what was asked too, it contradicts the model's own answer"
        parts.append(_broken(said, captions) + _relations("comparisons of captions with answers", captions))
    if ways:
        rows = [
            html.row(
                [
                    _WAYS.get(way, html.words(way)),
                    html.share(body.get("agreement")),
                    html.share(body.get("accuracy")),
                    html.percent(body.get("blind")),
                    html.text(body.get("n")),
                ],
                numeric=(3, 4),
            )
            for way, body in ways.items()
        ]
        asked = "the same question on the same face, asked"
        head = (asked, "same answer [95 %]", "right [95 %]", "right without the picture", "asked")
        parts.append(html.table(head, rows, numeric=(3, 4)))
    return html.section("Consistency", "".join(parts)) if parts else ""


def _broken(said: str, found: Mapping[str, Any]) -> str:
    model, truth = found["model"], found.get("truth") or {}
    cases = f"{html.share(model)} of {html.text(model.get('n'))} cases"
    return f"<p>{said} in {cases}, the true labels in {html.share(truth)}.</p>"


def _relations(what: str, found: Mapping[str, Any]) -> str:
    rows = [
        html.row(
            [
                html.words(str(r["relation"])),
                html.percent(r.get("broken_by_model")),
                html.percent(r.get("broken_by_truth")),
                html.text(r.get("n")),
            ],
            numeric=(1, 2, 3),
        )
        for r in found.get("by_relation") or ()
    ]
    head = ("relation", "broken by the model", "by the labels", "cases")
    return html.folded(f"All {len(rows)} {what}", html.table(head, rows, numeric=(1, 2, 3)))


def maps(found: Mapping[str, Any] | None, source: str) -> str:
    """Where the maps of face parts came from that the model was shown; empty if it was shown none."""
    if not found:
        return ""
    origin = (
        "The renderer made them with the faces, so they are exact; a map of a real face, drawn by a person or a model, "
        "is not."
        if source == "render"
        else "They are those of the data sources, or of the model that the faces table names in `provenance`; what "
        "they get wrong is in the figures."
    )
    return html.quiet(
        f"The model was shown a map of face parts beside {html.text(found['given'])} of {html.text(found['faces'])} "
        f"faces. {origin} Disturbed pictures keep the map of the sound picture."
    )


def characteristics(found: Mapping[str, Any] | None) -> str:
    """The scores of the knowledge branch beside what the same model says in words."""
    if not found:
        return ""
    balanced, broken = found["balanced"], found["relations"]
    lead = html.quiet(
        "The knowledge branch gives every characteristic a probability before a word is written; one half or more "
        "counts as yes. Text that does not tell counts as wrong. Balanced: the mean of yes and no, averaged over "
        "characteristics."
    )
    said = (
        f"<p>Both say the same in {html.share(found['agreement'])} of the cases in which the text tells. Expected "
        f"calibration error of the scores: {html.number(found['ece'])}. Where the text tells enough to check a logical "
        f"relation ({html.text(broken['n'])} cases), the scores break {html.share(broken['scores'])} of them, the text "
        f"{html.share(broken['text'])}, the true labels {html.share(broken['labels'])}.</p>"
    )
    rows = [
        html.row([name, html.share(found[who]), html.number(balanced[who]), html.text(found["n"])], numeric=(2, 3))
        for who, name in (("scores", "scores"), ("text", "text"))
    ]
    both = html.table(("", "right [95 %]", "balanced", "labels"), rows, numeric=(2, 3))
    each = [
        html.row(
            [
                html.words(one["name"]),
                html.text(one["n"]),
                html.percent(one["yes"]),
                *(html.percent(one[who]["accuracy"]) for who in ("scores", "text")),
                *(html.number(one[who]["balanced_accuracy"]) for who in ("scores", "text")),
                html.percent(one["agreement"]),
            ],
            numeric=range(1, 8),
        )
        for one in found["by_characteristic"]
    ]
    head = ("", "labels", "yes", "scores right", "text right", "scores balanced", "text balanced", "the same")
    folds = html.folded(f"All {len(each)} characteristics", html.table(head, each, range(1, 8)))
    shares = [
        html.row(
            [
                html.words(one["relation"]),
                html.text(one["n"]),
                *(html.percent(one[who]) for who in ("scores", "text", "labels")),
            ],
            (1, 2, 3, 4),
        )
        for one in broken["by_relation"]
    ]
    if shares:
        names = ("relation", "cases", "broken by the scores", "by the text", "by the labels")
        folds += html.folded(f"All {len(shares)} relations", html.table(names, shares, (1, 2, 3, 4)))
    plot = html.folded("Reliability plot of the scores", reliability(found["bins"]))
    return html.section("Scores beside the answers", lead + both + said + folds + plot)


def calibration(found: Mapping[str, Any] | None) -> str:
    """Whether the model is as often right as it is sure."""
    if not found:
        return ""
    lead = html.quiet(
        "Expected calibration error: how far confidence (the probability of the answer given) lies from the share of "
        "right answers, on average over 15 bins of confidence. Chance alone gives a model that knows how sure to be "
        "the error “by chance”: what lies above it is the model's own."
    )
    rows = [
        html.row(
            [
                html.words(task),
                html.number(body.get("ece")),
                html.number(body.get("expected")),
                html.text(body.get("n")),
            ],
            (1, 2, 3),
        )
        for task, body in found.items()
    ]
    plots = "".join(
        f"<div><h3>{html.words(task)}</h3>{reliability(body.get('bins') or ())}</div>" for task, body in found.items()
    )
    drawn = html.folded("Reliability plots: share right against confidence", f'<div class="curves">{plots}</div>')
    return html.section(
        "Calibration", lead + html.table(("task", "ECE", "by chance", "answers"), rows, (1, 2, 3)) + drawn
    )


def robustness(slices: Mapping[str, Any] | None, disturbed: Mapping[str, Any] | None, about_maps: str = "") -> str:
    """Turned and covered faces, and the same faces made worse; then what is to be known of their maps."""
    parts = []
    if slices:
        rows = [
            html.row(
                [
                    html.words(name),
                    _slice(body.get("closed_mean")),
                    html.text(body.get("people")),
                    html.text(body.get("n")),
                ],
                numeric=(2, 3),
            )
            for name, body in slices.items()
        ]
        parts.append(html.table(("faces", "balanced accuracy [95 %]", "people", "asked"), rows, numeric=(2, 3)))
    if disturbed:
        rows = [_disturbed(kind, body) for kind, body in disturbed.items()]
        head = ("the same faces", "before", "after [95 %]", "change [95 %]", "", "faces")
        parts.append(f"<h3>Disturbed pictures</h3>{about_maps}{html.table(head, rows, numeric=(5,))}")
    lead = html.quiet("Mean balanced accuracy over all closed questions.")
    return html.section("Robustness", lead + "".join(parts)) if parts else ""


def _slice(figure: Mapping[str, Any] | None) -> str:
    if figure is None or figure.get("value") is None:
        return '<span class="quiet">too few people for a figure</span>'
    return html.estimate(figure)


def _disturbed(kind: str, body: Mapping[str, Any]) -> str:
    change = body.get("change") or {}
    verdict = html.tag("no change shown", "quiet")
    if change.get("high") is not None and change["high"] < 0:
        verdict = html.tag("worse", "bad")
    elif change.get("low") is not None and change["low"] > 0:
        verdict = html.tag("better", "good")
    cells = [_KINDS.get(kind, html.words(kind)), html.estimate(body.get("before")), html.estimate(body.get("after"))]
    return html.row([*cells, html.estimate(change), verdict, html.text(body.get("faces"))], numeric=(5,))


def generation(found: Mapping[str, Any] | None) -> str:
    """Answers chosen by likelihood beside answers generated freely."""
    if not found:
        return ""
    body = (
        "<p>Closed questions are answered by the likelihood of their options. Left to answer freely, the model gives "
        f"the same answer in {html.share(found.get('agreement'))} of {html.text(found.get('n'))} questions; "
        f"{html.percent(found.get('unreadable'))} of its free answers cannot be read. Neither way gave an answer that "
        f"can be read in {html.percent(found.get('both_unreadable'))}, which is no agreement.</p>"
    )
    rows = [
        html.row([html.words(task), html.percent(part.get("value")), html.text(part.get("n"))], numeric=(1, 2))
        for task, part in (found.get("by_task") or {}).items()
    ]
    if rows:
        body += html.folded("By task", html.table(("task", "same answer", "asked"), rows, numeric=(1, 2)))
    return html.section("Likelihood against free generation", body)


def confusion(found: Mapping[str, Any] | None) -> str:
    """What is taken for what, folded: a table an item, rows the truth, columns the answers."""
    folds = []
    for name, body in (found or {}).items():
        labels = [str(label) for label in body["labels"]]
        unread = body.get("unparsed") or [0] * len(labels)
        rows = []
        for label, counts, lost in zip(labels, body["counts"], unread, strict=True):
            cells = "".join(_shaded(count, sum(counts) + lost) for count in (*counts, lost))
            rows.append(f"<tr><td>{html.words(label)}</td>{cells}</tr>")
        head = ["truth ↓ answered →", *(label.replace("_", " ") for label in labels), "unread"]
        folds.append(html.folded(name.replace("_", " "), html.table(head, rows, range(1, len(head)), "confusion")))
    return html.section("What is taken for what", "".join(folds)) if folds else ""


def _shaded(count: int, total: int) -> str:
    depth = round(100 * count / total) if total else 0
    return f'<td class="n" style="--depth:{depth}%">{html.text(count)}</td>'
