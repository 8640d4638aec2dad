"""The page a person reads after the checks: one HTML file without network or script, the same for the same tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facemllm.quality.checking import Outcome
from facemllm.quality.columns import Tallies
from facemllm.records import SPLITS

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


def page(result: Mapping[str, Any], outcomes: Sequence[Outcome], faces: pd.DataFrame, tallies: Tallies) -> str:
    """The report as one HTML text."""
    style = (Path(__file__).parent / "report.css").read_text("utf-8")
    body = [
        *_head(result),
        "<h2>Checks</h2>",
        *_checks("faces", "Faces table", outcomes),
        *_checks("conversations", "Conversations table", outcomes),
        *_examples(outcomes),
        "<h2>Who is in the data</h2>",
        "<p class=quiet>Rows per split and share of all labelled rows. A group that is rare here will be measured "
        "with wide intervals, and learned from little.</p>",
        *_balance(faces),
        "<h2>Labels and questions</h2>",
        *_attributes(tallies),
        *_contradictions(tallies),
        *_questions(tallies),
    ]
    return (
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f"<title>Data checks: {'passed' if result['passed'] else 'failed'}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n{chr(10).join(body)}\n</body>\n</html>\n"
    )


def _head(result: Mapping[str, Any]) -> list[str]:
    counts = result["counts"]
    if not result["passed"]:
        verdict = (
            f"<span class=bad>Failed</span>: {len(result['critical'])} critical. Nothing may be trained on this data."
        )
    elif result["warnings"]:
        verdict = f"<span class=warn>Passed with {len(result['warnings'])} warnings</span>, listed below."
    else:
        verdict = "<span class=good>Passed</span>, without warnings."
    return [
        "<h1>Data checks</h1>",
        f"<p>{verdict}</p>",
        f"<p>{counts['faces']:,} faces, {counts['conversations']:,} conversations, {counts['questions']:,} questions; "
        f"{counts['checks']} checks, {counts['failed']} failed.</p>",
        f"<p class=quiet>Faces <code>{result['tables']['faces']}</code><br>"
        f"Conversations <code>{result['tables']['conversations']}</code></p>",
    ]


def _checks(table: str, title: str, outcomes: Sequence[Outcome]) -> list[str]:
    rows = []
    for o in (o for o in outcomes if o.table == table):
        if o.passed:
            mark = "<span class=good>passed</span>"
        else:
            mark = f"<span class={'bad' if o.severity == 'critical' else 'warn'}>failed</span>"
        found = o.error or o.observed or (f"{o.failed:,} of {o.checked:,} rows" if o.failed else "")
        rows.append([mark, escape(o.says), o.severity, escape(found), _code(o.name)])
    return [f"<h3>{title}</h3>", _table(("Result", "What was checked", "Severity", "Found", "Check"), rows)]


def _examples(outcomes: Sequence[Outcome]) -> list[str]:
    rows = [
        [
            o.table,
            f"<code>{o.name}</code>",
            f"{e['row']}",
            f"<code>{escape(str(e['image_id']))}</code>",
            escape(e["value"]),
        ]
        for o in outcomes
        if not o.passed
        for e in o.examples
    ]
    if not rows:
        return []
    return ["<h3>Examples of failing rows</h3>", _table(("Table", "Check", "Row", "image_id", "Value"), rows)]


def _balance(faces: pd.DataFrame) -> list[str]:
    if faces.empty:
        return []
    parts = []
    people = faces.groupby("split")["subject_id"].nunique()
    totals = Counter(faces["split"])
    rows = [
        [escape(split), f"{totals[split]:,}", f"{int(people.get(split, 0)):,}", _bar(totals[split] / len(faces))]
        for split in SPLITS
    ]
    parts += ["<h3>Splits</h3>", _table(("Split", "Faces", "Subjects", "Share of faces"), rows)]
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
            + [_bar(count / whole.total())]
            for value, count in sorted(whole.items(), key=_natural)
        ]
        unknown = len(faces) - whole.total()
        note = f" <span class=quiet>({unknown:,} faces without)</span>" if unknown else ""
        parts += [f"<h3>{title}{note}</h3>", _table(("Value", *(s.capitalize() for s in SPLITS), "Share"), rows)]
    return parts


def _attributes(tallies: Tallies) -> list[str]:
    names = sorted({name for name, _ in tallies.attributes})
    rows = []
    for name in names:
        yes, no = tallies.attributes[(name, True)], tallies.attributes[(name, False)]
        rows.append([escape(name), f"{yes:,}", f"{no:,}", _bar(yes / (yes + no))])
    return ["<h3>Attributes</h3>", _table(("Attribute", "Yes", "No", "Share of yes"), rows)] if rows else []


def _contradictions(tallies: Tallies) -> list[str]:
    rows = [[escape(pair), f"{count:,}"] for pair, count in sorted(tallies.contradictions.items())]
    return ["<h3>Attributes that exclude each other, on one face</h3>", _table(("Pair", "Faces"), rows)] if rows else []


def _questions(tallies: Tallies) -> list[str]:
    tasks = sorted({task for task, _ in tallies.questions})
    rows = [[escape(task), *(f"{tallies.questions[(task, split)]:,}" for split in SPLITS)] for task in tasks]
    parts = ["<h3>Questions by task</h3>", _table(("Task", *(s.capitalize() for s in SPLITS)), rows)]
    for task in tasks:
        answers = {(item, answer): count for (of, item, answer), count in tallies.answers.items() if of == task}
        if not answers:
            continue
        asked: Counter[str] = Counter()
        for (item, _), count in answers.items():
            asked[item] += count
        rows = [
            [escape(item), escape(answer), f"{count:,}", _bar(count / asked[item])]
            for (item, answer), count in sorted(answers.items())
        ]
        title = f"<h3>Answers to closed questions: {escape(task)}</h3>"
        parts += [title, _table(("Item", "Answer", "Questions", "Share of the item"), rows)]
    return parts


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, float) else str(value)


def _natural(item: tuple[str, int]) -> tuple[int, str]:
    return (int(item[0]), "") if item[0].isdigit() else (0, item[0])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table of cells that are HTML already; cells that are numbers stand to the right."""

    def cell(text: str) -> str:
        return f"<td class=n>{text}</td>" if text.replace(",", "").isdigit() else f"<td>{text}</td>"

    cells = [[cell(text) for text in row] for row in rows]
    kinds = [" class=n" if all(row[n].startswith("<td class=n>") for row in cells) else "" for n in range(len(header))]
    head = "".join(f"<th{kind}>{name}</th>" for name, kind in zip(header, kinds, strict=True))
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    return f"<div class=scroll><table>\n<tr>{head}</tr>\n{body}\n</table></div>"


def _bar(share: float) -> str:
    return (
        '<svg class=bar viewBox="0 0 100 8" preserveAspectRatio=none aria-hidden=true>'
        f'<rect class=back width="100" height="8"/><rect width="{100 * share:.1f}" height="8"/></svg> {share:.1%}'
    )
