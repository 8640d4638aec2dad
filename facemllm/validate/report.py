"""The page a person reads after the checks: one HTML file without network or script, the same for the same tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facemllm.tables import SPLITS
from facemllm.validate import html, sections
from facemllm.validate.balance import Reason, Share
from facemllm.validate.checking import Outcome
from facemllm.validate.memory import Count, Tallies
from facemllm.validate.suites import POLICY
from facemllm.version.ledger import Entry

if TYPE_CHECKING:
    import pandas as pd

_LABELS = (
    ("source", "Source"),
    ("gender", "Gender label"),
    ("age", "Age, by decade"),
    ("ethnicity", "Ethnicity, as the source labels it"),
    ("skin_tone", "Skin tone (Monk scale)"),
    ("expression", "Expression"),
)
_TABLES = {
    "faces": "Raw faces",
    "annotated": "Annotated faces",
    "conversations": "Conversations",
    "balance": "Group balance",
}
_CONTENTS = (
    ("checks", "Checks"),
    ("sources", "Sources and their terms"),
    ("contradictions", "Contradictions"),
    ("groups", "Group balance"),
    ("refused", "Rows refused"),
    ("people", "Who is in the data"),
    ("labels", "Labels and questions"),
)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that the page shows. `sources` are the tables' sources, `about` the manifest of the annotated table,
    `filtered` what every filter did (by name), `imported` how many rows the import refused, `refused` by table."""

    outcomes: Sequence[Outcome]
    faces: pd.DataFrame
    tallies: Tallies
    ledger: Mapping[str, Entry]
    sources: Sequence[str]
    about: Mapping[str, Any]
    shares: Sequence[Share]
    filtered: Mapping[str, Count]
    imported: int | None
    refused: Mapping[str, Sequence[Reason]]


def page(result: Mapping[str, Any], found: Findings) -> str:
    """The report as one HTML text."""
    style = (Path(__file__).parent / "report.css").read_text("utf-8")
    rows = Counter(found.faces["source"])
    body = [
        *_head(result),
        "<h2 id=checks>Checks</h2>",
        *_policy(),
        *(part for name in _TABLES for part in _checks(name, found.outcomes)),
        *_examples(found.outcomes),
        *sections.sources(found.sources, found.ledger, rows, found.about.get("ledger_refused")),
        *sections.contradictions(found.tallies, found.about),
        *sections.balance(found.shares, found.filtered, found.imported, result["limits"]["group_loss"]),
        *sections.refused(found.refused),
        "<h2 id=people>Who is in the data</h2>",
        html.quiet(
            "Annotated faces per split and share of all labelled rows. A group that is rare here will be measured "
            "with wide intervals, and learned from little."
        ),
        *_people(found.faces),
        "<h2 id=labels>Labels and questions</h2>",
        *_attributes(found.tallies),
        *_questions(found.tallies),
    ]
    return (
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f"<title>Data checks: {'passed' if result['passed'] else 'failed'}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n{chr(10).join(body)}\n</body>\n</html>\n"
    )


def _head(result: Mapping[str, Any]) -> list[str]:
    counts, tables = result["counts"], result["tables"]
    if not result["passed"]:
        verdict = (
            f"{html.mark('Failed', 'bad')}: {len(result['critical'])} critical. Nothing may be trained on this data."
        )
    elif result["warnings"]:
        warned = len(result["warnings"])
        verdict = f"{html.mark(f'Passed with {warned} warning' + 's' * (warned > 1), 'warn')}, listed below."
    else:
        verdict = f"{html.mark('Passed', 'good')}, without warnings."
    lines = [*(("stop", line) for line in result["critical"]), *(("look", line) for line in result["warnings"])]
    said = "".join(f"<li class={kind}>{escape(line)}</li>" for kind, line in lines)
    raw = f"{counts['faces']:,} raw faces, " if "faces" in counts else ""
    return [
        "<h1>Data checks</h1>",
        f"<p>{verdict}</p>",
        *([f"<ul class=lines>{said}</ul>"] if lines else []),
        f"<p>{raw}{counts['annotated']:,} annotated faces, {counts['conversations']:,} conversations, "
        f"{counts['questions']:,} questions; {counts['checks']} checks, {counts['failed']} failed.</p>",
        html.quiet("<br>".join(f"{_TABLES[name]} {html.code(digest)}" for name, digest in tables.items())),
        f"<nav>{' '.join(f'<a href=#{anchor}>{title}</a>' for anchor, title in _CONTENTS)}</nav>",
    ]


def _policy() -> list[str]:
    return html.folded(
        "What critical, warning and info mean",
        [html.table(("Severity", "What follows"), [[name, escape(says)] for name, says in POLICY.items()])],
    )


def _checks(table: str, outcomes: Sequence[Outcome]) -> list[str]:
    some = [o for o in outcomes if o.table == table]
    if not some:
        return []
    failed = [o for o in some if not o.passed]
    result = html.mark(f"{len(failed)} of {len(some)} failed", "warn") if failed else html.mark("all passed", "good")
    parts = [f"<h3>{_TABLES[table]}: {result}</h3>"]
    if failed:
        parts.append(_outcomes(failed))
    return parts + html.folded(f"All {len(some)} checks", [_outcomes(some)])


def _outcomes(outcomes: Sequence[Outcome]) -> str:
    rows = []
    for o in outcomes:
        if o.passed:
            result = html.mark("passed", "good")
        else:
            result = html.mark("failed", "bad" if o.severity == "critical" else "warn")
        found = o.error or o.observed or (f"{o.failed:,} of {o.checked:,} {o.unit}" if o.failed else "")
        rows.append([result, f"{escape(o.says)}<br>{html.code(o.name)}", o.severity, escape(found)])
    return html.table(("Result", "What was checked", "Severity", "Found"), rows)


def _examples(outcomes: Sequence[Outcome]) -> list[str]:
    rows = [
        [
            f"{o.table}, row {e['row']}<br>{html.code(o.name)}",
            escape(e["value"]) + f"<br>{html.code(str(e['image_id']))}",
        ]
        for o in outcomes
        if not o.passed and o.unit == "rows"
        for e in o.examples
    ]
    if not rows:
        return []
    return ["<h3>Examples of failing rows</h3>", html.table(("Where", "Found, and in which picture"), rows)]


def _people(faces: pd.DataFrame) -> list[str]:
    if faces.empty:
        return []
    parts = []
    people = faces.groupby("split")["subject_id"].nunique()
    totals = Counter(faces["split"])
    rows = [
        [escape(split), f"{totals[split]:,}", f"{int(people.get(split, 0)):,}", html.bar(totals[split] / len(faces))]
        for split in SPLITS
    ]
    parts += ["<h3>Splits</h3>", html.table(("Split", "Faces", "Subjects", "Share of faces"), rows)]
    for column, title in _LABELS:
        values = faces[column]
        if column == "age":
            values = values.map(lambda age: None if age is None or age != age else int(age // 10) * 10)
        known = [(_plain(value), split) for value, split in zip(values, faces["split"], strict=True) if value == value]
        counted = Counter((value, split) for value, split in known if value)
        if not counted:
            continue
        whole = Counter(value for value, _ in counted.elements())
        rows = [
            [f"{value} to {int(value) + 9}" if column == "age" else escape(value)]
            + [f"{counted[(value, split)]:,}" for split in SPLITS]
            + [html.bar(count / whole.total())]
            for value, count in sorted(whole.items(), key=_natural)
        ]
        unknown = len(faces) - whole.total()
        note = f" <span class=quiet>({unknown:,} faces without)</span>" if unknown else ""
        parts += [f"<h3>{title}{note}</h3>", html.table(("Value", *(s.capitalize() for s in SPLITS), "Share"), rows)]
    return parts


def _attributes(tallies: Tallies) -> list[str]:
    names = sorted({name for name, _ in tallies.attributes})
    rows = []
    for name in names:
        yes, no = tallies.attributes[(name, True)], tallies.attributes[(name, False)]
        rows.append([escape(name), f"{yes:,}", f"{no:,}", html.bar(yes / (yes + no))])
    return ["<h3>Attributes</h3>", html.table(("Attribute", "Yes", "No", "Share of yes"), rows)] if rows else []


def _questions(tallies: Tallies) -> list[str]:
    tasks = sorted({task for task, _ in tallies.questions})
    rows = [[escape(task), *(f"{tallies.questions[(task, split)]:,}" for split in SPLITS)] for task in tasks]
    parts = ["<h3>Questions by task</h3>", html.table(("Task", *(s.capitalize() for s in SPLITS)), rows)]
    for task in tasks:
        answers = {(item, answer): count for (of, item, answer), count in tallies.answers.items() if of == task}
        if not answers:
            continue
        asked: Counter[str] = Counter()
        for (item, _), count in answers.items():
            asked[item] += count
        rows = [
            [escape(item), escape(answer), f"{count:,}", html.bar(count / asked[item])]
            for (item, answer), count in sorted(answers.items())
        ]
        title = f"<h3>Answers to closed questions: {escape(task)}</h3>"
        parts += [title, html.table(("Item", "Answer", "Questions", "Share of the item"), rows)]
    return parts


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, float) else str(value)


def _natural(item: tuple[str, int]) -> tuple[int, str]:
    return (int(item[0]), "") if item[0].isdigit() else (0, item[0])
