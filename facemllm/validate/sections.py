"""Sections of the report page about where the data came from and what was left out on the way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from facemllm.validate import html
from facemllm.validate.balance import Reason, Share, sentence
from facemllm.validate.memory import Count, Tallies
from facemllm.validate.suites import FILTERS
from facemllm.version.ledger import MEANING, USES, Entry

_TITLES = {
    "duplicates": "Search for duplicates and leaks, at the import",
    "annotation": "Annotation: raw faces to annotated faces",
    "reformat": "Question making: annotated faces to conversations",
}


def sources(names: Iterable[str], ledger: Mapping[str, Entry], rows: Mapping[str, int], refused: Any) -> list[str]:
    """The ledger's rows of the sources, what all of them allow, and how many pictures terms kept from an annotator.

    `rows` are annotated faces by source; `refused` is the annotation's own count by source.
    """
    names = sorted(names)
    known = [ledger[name] for name in names if name in ledger]
    cells = [
        [
            f"<b>{escape(entry.name)}</b><br>{html.code(entry.key)}",
            f"{rows.get(entry.key, 0):,}",
            escape(entry.licence),
            html.mark(entry.status, {"active": "good", "restricted": "warn"}.get(entry.status, "bad")),
            _uses(entry.uses),
        ]
        for entry in known
    ]
    unknown = [name for name in names if name not in ledger]
    cells += [
        [html.code(n), f"{rows.get(n, 0):,}", html.mark("not in the ledger", "bad"), "", "nothing"] for n in unknown
    ]
    shared = [use for use in USES if not unknown and all(use in entry.uses for entry in known)]
    parts = [
        "<h2 id=sources>Sources and their terms</h2>",
        html.table(("Source", "Faces", "Licence", "Status", "Allowed uses"), cells),
        f"<p>Allowed with all of them together: <b>{_uses(shared)}</b>.</p>",
        html.quiet("; ".join(f"{use.replace('_', ' ')}: {meaning}" for use, meaning in MEANING.items()) + "."),
    ]
    for entry in known:
        parts += html.folded(
            f"Terms of {escape(entry.name)}",
            [
                f"<p>{escape(entry.terms)}</p>",
                html.quiet(f"Consent: {escape(entry.consent)}.<br>Citation: {escape(entry.citation)}"),
            ],
        )
    return [*parts, *_held_back(_counts(refused), ledger)]


def _counts(stated: Any) -> Mapping[str, int]:
    """Counts out of a manifest, which another program may have written."""
    return stated if isinstance(stated, Mapping) and all(isinstance(n, int) for n in stated.values()) else {}


def _held_back(refused: Mapping[str, int], ledger: Mapping[str, Entry]) -> list[str]:
    if not refused:
        return [html.quiet("No picture was held back from the annotator by its source's terms.")]
    rows = []
    for name, count in sorted(refused.items()):
        entry = ledger.get(name)
        terms = "not in the ledger" if entry is None else f"{entry.licence}; {entry.terms}"
        uses = () if entry is None else entry.uses
        rows.append([html.code(name), f"{count:,}", escape(terms), _uses(uses)])
    return [
        "<h3>Held back from the annotator by their terms</h3>",
        html.table(("Source", "Pictures", "Terms", "Allowed uses"), rows),
    ]


def _uses(uses: Sequence[str]) -> str:
    return ", ".join(use.replace("_", " ") for use in USES if use in uses) or "nothing"


def contradictions(tallies: Tallies, about: Mapping[str, Any]) -> list[str]:
    """Text against label, as annotation found it and as it stands in the table now, and attributes against each other.

    `about` holds the annotation's own counts by item: `contradictions` of texts, `label_contradictions` of labels.
    """
    parts = ["<h2 id=contradictions>Contradictions</h2>", "<h3>Words that contradict a label</h3>"]
    texts, labels = (_counts(about.get(name)) for name in ("contradictions", "label_contradictions"))
    items = sorted({*texts, *labels, *tallies.disagreements})
    if items:
        rows = [
            [
                escape(item),
                f"{texts.get(item, 0):,}",
                f"{labels.get(item, 0):,}",
                f"{tallies.disagreements[item]:,}",
                escape(tallies.first.get(item, "")),
            ]
            for item in items
        ]
        parts += [
            html.quiet(
                "What the source says of a face stays its label. Annotation counted where a model's caption, or a "
                "label that it gave, says otherwise; captions are read once more here, as they would be trained on."
            ),
            html.table(("What", "Captions, at annotation", "Labels given", "Captions now", "First of those now"), rows),
        ]
    else:
        parts.append(html.quiet("None: no caption states something else than a label of its face."))
    parts.append("<h3>Attributes that exclude each other, on one face</h3>")
    if tallies.exclusive:
        rows = [[escape(pair), f"{count:,}"] for pair, count in sorted(tallies.exclusive.items())]
        parts.append(html.table(("Pair", "Faces"), rows))
    else:
        parts.append(html.quiet("None."))
    return parts


def balance(found: Sequence[Share], counts: Mapping[str, Count], refused: int | None, limit: float) -> list[str]:
    """Group balance before and after every filter; `refused` rows were dropped by the import, None if that is not
    known."""
    parts = [
        "<h2 id=groups>Group balance before and after every filter</h2>",
        html.quiet(
            "Filters drop groups silently. A group is named here when a filter dropped more than "
            f"{100 * limit:g} percentage points more of it than of all rows, and chance alone would do so in fewer "
            "than 5 % of such reports (Fisher's exact test, Holm's correction). Rows without the label are left out."
        ),
    ]
    named = [share for share in found if share.thinned]
    parts += [f"<p>{html.mark('Look:', 'warn')} {escape(sentence(s, counts[s.filter]))}.</p>" for s in named]
    if not named:
        parts.append(f"<p>{html.mark('No group', 'good')} lost much more than the others.</p>")
    if refused is not None:
        parts += ["<h3>Import</h3>", f"<p>{refused:,} rows refused. Their groups are not known.</p>"]
    by_filter = {name: list(some) for name, some in groupby(found, key=lambda share: share.filter)}
    for name in FILTERS:
        parts.append(f"<h3>{_TITLES[name]}</h3>")
        if name not in counts:
            parts.append(html.quiet("Not counted: the tables at hand do not tell."))
            continue
        count = counts[name]
        dropped = count.rows_before - count.rows_after
        if not count.rows_before:
            parts.append(html.quiet("There were no rows."))
            continue
        share = f" ({100 * dropped / count.rows_before:.1f} %)" if dropped else ""
        parts.append(
            f"<p>{count.rows_before:,} faces before, {count.rows_after:,} after: {dropped:,} dropped{share}.</p>"
        )
        rows = [
            [
                escape(s.group.replace("_", " ")),
                escape(s.value) + (" " + html.mark("thinned", "warn") if s.thinned else ""),
                f"{s.before:,}",
                f"{s.after:,}",
                html.bar(1 - s.lost),
            ]
            for s in by_filter.get(name, ())
        ]
        shown = [html.table(("Group", "Value", "Before", "After", "Kept"), rows)]
        parts += html.folded("Every group", shown, opened=dropped > 0)
    return parts


def refused(by_table: Mapping[str, Sequence[Reason]]) -> list[str]:
    """What every step refused, by reason."""
    parts = ["<h2 id=refused>Rows refused</h2>"]
    for title, found in by_table.items():
        parts.append(f"<h3>{escape(title)}</h3>")
        if not found:
            parts.append(html.quiet("None."))
            continue
        rows = [
            [
                f"{reason.rows:,}",
                escape(reason.wording) + (" <span class=quiet>(and alike)</span>" if reason.varies else ""),
                "<br>".join(html.code(file) for file in reason.files)
                + (" …" if reason.rows > len(reason.files) else ""),
            ]
            for reason in found
        ]
        parts.append(html.table(("Rows", "Reason", "First of them"), rows))
    return parts
