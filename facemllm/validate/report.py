"""The page a person reads after the checks: one HTML file without network or script, the same for the same tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from facemllm.report.kit import render
from facemllm.tables import SPLITS
from facemllm.validate.balance import Reason, Share, sentence
from facemllm.validate.memory import Count, Tallies
from facemllm.validate.suites import FILTERS, POLICY, Outcome
from facemllm.version.ledger import MEANING, USES, Entry

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
    """The report as one HTML text; `result` is `result.json`."""
    rows = Counter(found.faces["source"])
    by_table = {name: [o for o in found.outcomes if o.table == name] for name in _TABLES}
    return render(
        "validation.html.jinja",
        result=result,
        titles=_TABLES,
        policy=POLICY,
        checks=[(title, some) for name, title in _TABLES.items() if (some := by_table[name])],
        failing=[o for o in found.outcomes if not o.passed and o.unit == "rows" and o.examples],
        meaning=MEANING,
        splits=SPLITS,
        imported=found.imported,
        refused=found.refused,
        **sources(found.sources, found.ledger, rows, found.about.get("ledger_refused")),
        **contradictions(found.tallies, found.about),
        named=[sentence(share, found.filtered[share.filter]) for share in found.shares if share.thinned],
        filters=[_filter(name, found) for name in FILTERS],
        parts=_splits(found.faces),
        labels=list(_labels(found.faces)),
        attributes=_attributes(found.tallies),
        questions=_questions(found.tallies),
    )


def sources(names: Sequence[str], ledger: Mapping[str, Entry], rows: Mapping[str, int], refused: Any) -> dict[str, Any]:
    """The ledger's rows of the sources, what all of them allow, and how many pictures terms kept from an annotator.
    `rows` are annotated faces by source; `refused` is the annotation's own count by source."""
    known = [ledger[name] for name in sorted(names) if name in ledger]
    unknown = [name for name in sorted(names) if name not in ledger]
    shared = [use for use in USES if not unknown and all(use in entry.uses for entry in known)]
    return {
        "sources": [(entry, rows.get(entry.key, 0)) for entry in known],
        "unknown": [(name, rows.get(name, 0)) for name in unknown],
        "shared": shared,
        "held_back": [(name, count, ledger.get(name)) for name, count in sorted(_counts(refused).items())],
    }


def contradictions(tallies: Tallies, about: Mapping[str, Any]) -> dict[str, Any]:
    """Text against label, as annotation found it and as it stands in the table now, and attributes against each other.
    `about` holds the annotation's own counts by item: `contradictions` of texts, `label_contradictions` of labels."""
    texts, labels = (_counts(about.get(name)) for name in ("contradictions", "label_contradictions"))
    items = sorted({*texts, *labels, *tallies.disagreements})
    return {
        "contradictions": [
            (item, texts.get(item, 0), labels.get(item, 0), tallies.disagreements[item], tallies.first.get(item, ""))
            for item in items
        ],
        "exclusive": sorted(tallies.exclusive.items()),
    }


def _counts(stated: Any) -> Mapping[str, int]:
    """Counts out of a manifest, which another program may have written."""
    return stated if isinstance(stated, Mapping) and all(isinstance(n, int) for n in stated.values()) else {}


def _filter(name: str, found: Findings) -> dict[str, Any]:
    """What a filter did to all rows and to every group; `count` is None where the tables do not tell."""
    count = found.filtered.get(name)
    return {
        "title": FILTERS[name][1],
        "count": count,
        "dropped": count.rows_before - count.rows_after if count else 0,
        "groups": [share for share in found.shares if share.filter == name],
    }


def _splits(faces: pd.DataFrame) -> list[tuple[str, int, int, float]]:
    """Faces, subjects and share of the faces of every split."""
    if faces.empty:
        return []
    people, totals = faces.groupby("split")["subject_id"].nunique(), Counter(faces["split"])
    return [(split, totals[split], int(people.get(split, 0)), totals[split] / len(faces)) for split in SPLITS]


def _labels(faces: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """By label: faces without it, and of every value the faces by split and the share of all labelled rows."""
    for column, title in _LABELS if len(faces) else ():
        values = faces[column]
        if column == "age":
            values = values.map(lambda age: None if age is None or age != age else int(age // 10) * 10)
        known = [(_plain(value), split) for value, split in zip(values, faces["split"], strict=True) if value == value]
        counted = Counter((value, split) for value, split in known if value)
        whole = Counter(value for value, _ in counted.elements())
        rows = [
            (
                f"{value} to {int(value) + 9}" if column == "age" else value,
                [counted[(value, split)] for split in SPLITS],
                count / whole.total(),
            )
            for value, count in sorted(whole.items(), key=_natural)
        ]
        if rows:
            yield {"title": title, "unknown": len(faces) - whole.total(), "rows": rows}


def _attributes(tallies: Tallies) -> list[tuple[str, int, int]]:
    """Faces with and without every attribute."""
    names = sorted({name for name, _ in tallies.attributes})
    return [(name, tallies.attributes[(name, True)], tallies.attributes[(name, False)]) for name in names]


def _questions(tallies: Tallies) -> list[dict[str, Any]]:
    """By task: questions by split, and of closed ones every item's answers with their number and share."""
    found = []
    for task in sorted({task for task, _ in tallies.questions}):
        answers = {(item, answer): count for (of, item, answer), count in tallies.answers.items() if of == task}
        asked: Counter[str] = Counter()
        for (item, _), count in answers.items():
            asked[item] += count
        rows = [(item, answer, count, count / asked[item]) for (item, answer), count in sorted(answers.items())]
        found.append({"task": task, "asked": [tallies.questions[(task, split)] for split in SPLITS], "answers": rows})
    return found


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, float) else str(value)


def _natural(item: tuple[str, int]) -> tuple[int, str]:
    return (int(item[0]), "") if item[0].isdigit() else (0, item[0])
