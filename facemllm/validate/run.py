"""The step `validate`: derive columns, run the suites, write the report, and stop on a critical failure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facemllm.core.files import building
from facemllm.errors import UserError
from facemllm.settings import Settings
from facemllm.tables import CONVERSATIONS, FACES, Table, open_table
from facemllm.validate import suites
from facemllm.validate.balance import Reason, balance_frame, of_manifest, reasons, shares
from facemllm.validate.conversations import conversations_frame
from facemllm.validate.faces import annotated_frame, raw_frame
from facemllm.validate.memory import Count, Labels, Originals, Tallies
from facemllm.validate.report import Findings, page
from facemllm.validate.suites import BALANCE, Outcome, run_suite
from facemllm.version import ledger

if TYPE_CHECKING:
    import pandas as pd

RESULT = "result.json"
REPORT = "report.html"
_NAMED_GROUPS = 50


@dataclass(frozen=True)
class Verdict:
    """What the checks found. `critical` and `warnings` hold one line a failed check."""

    passed: bool
    critical: tuple[str, ...]
    warnings: tuple[str, ...]
    counts: Mapping[str, int]

    @property
    def figure(self) -> str:
        """The verdict in a few words."""
        passed = self.counts["checks"] - self.counts["failed"]
        return f"{passed} of {self.counts['checks']} checks passed, {len(self.warnings)} warnings"


def validate(settings: Settings, raw: Path | None, annotated: Path, conversations: Path, out: Path) -> Verdict:
    """Check the tables and write `report.html` and `result.json` into the folder `out`. `raw` are the faces before
    annotation; without them (None) nothing can be said about what annotation changed or dropped. Both files depend on
    the tables, the limits in `quality` and the ledger alone. Raises UserError naming the first critical failure, its
    table and row, and the report, which is kept."""
    paths = {"annotated": annotated, "conversations": conversations}
    if raw is not None:
        paths = {"faces": raw, **paths}
    tables = {
        name: open_table(path, CONVERSATIONS if name == "conversations" else FACES) for name, path in paths.items()
    }
    with building(out) as partial:
        findings = _findings(settings, tables)
        verdict = _verdict(tables, findings)
        result = {
            "schema": "validation/2",
            **asdict(verdict),
            "tables": {name: table.digest for name, table in tables.items()},
            "limits": settings.validate.model_dump(),
            "checks": [asdict(outcome) for outcome in findings.outcomes],
            "groups": [asdict(share) for share in findings.shares],
            "refused": {title: [asdict(reason) for reason in some] for title, some in findings.refused.items()},
            "disagreements": dict(findings.tallies.disagreements),
        }
        text = json.dumps(result, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (partial / RESULT).write_text(text, "utf-8")
        (partial / REPORT).write_text(page(result, findings), "utf-8")
    if not verdict.passed:
        first = _failed(findings.outcomes, "critical")[0]
        more = f" (and {len(verdict.critical) - 1} more)" if len(verdict.critical) > 1 else ""
        where = f"; table {paths[first.table]}" if first.table in paths else ""
        raise UserError(f"{first.line()}{more}{where}; report {out / REPORT}")
    return verdict


def _findings(settings: Settings, tables: Mapping[str, Table]) -> Findings:
    quality, rows = settings.validate, ledger.entries(settings)
    usable = sorted(key for key, entry in rows.items() if entry.status != "withdrawn")
    tallies, labels = Tallies(), Labels(tables["conversations"].manifest["about"])
    originals, outcomes = None, []
    if "faces" in tables:
        originals = Originals()
        frame = raw_frame(tables["faces"], quality, rows, originals)
        outcomes += run_suite("faces", suites.raw_checks(quality, usable), frame)
        del frame
    faces = annotated_frame(tables["annotated"], quality, rows, originals, labels, tallies)
    outcomes += run_suite("annotated", suites.annotated_checks(quality, usable, with_raw=originals is not None), faces)
    talks = conversations_frame(tables["conversations"], labels, tallies)
    outcomes += run_suite("conversations", suites.conversations_checks(quality), talks)
    filtered = _filtered(tables, originals, labels)
    found = shares(filtered, quality.group_loss)
    if found:
        frame = balance_frame(found, filtered)
        outcomes += run_suite(BALANCE, suites.balance_checks(filtered), frame, examples=_NAMED_GROUPS)
    return Findings(
        outcomes=outcomes,
        faces=faces,
        tallies=tallies,
        ledger=rows,
        sources=_sources(tables, faces),
        about=tables["annotated"].manifest["about"],
        shares=found,
        filtered=filtered,
        imported=_imported(tables, filtered),
        refused=_refused(tables),
    )


def _filtered(tables: Mapping[str, Table], originals: Originals | None, labels: Labels) -> dict[str, Count]:
    """What every filter did to the groups, as far as the tables tell."""
    counts = {}
    if originals is not None:
        if duplicates := of_manifest(tables["faces"].manifest["about"]):
            counts["duplicates"] = duplicates
        counts["annotation"] = originals.memory.count()
    counts["reformat"] = labels.memory.count()
    return counts


def _imported(tables: Mapping[str, Table], filtered: Mapping[str, Count]) -> int | None:
    """Rows that the import refused: those in quarantine that the search for duplicates did not put there."""
    if "faces" not in tables:
        return None
    duplicates = filtered.get("duplicates")
    dropped = 0 if duplicates is None else duplicates.rows_before - duplicates.rows_after
    return max(0, int(tables["faces"].manifest["quarantined"]) - dropped)


def _refused(tables: Mapping[str, Table]) -> dict[str, list[Reason]]:
    titles = {
        "faces": "By the import and the search for duplicates",
        "annotated": "By annotation",
        "conversations": "By question making",
    }
    named = {"faces": "raw faces", "annotated": "annotated faces"}
    parents = {tables[name].digest: said for name, said in named.items() if name in tables}
    return {titles[name]: reasons(table, parents) for name, table in tables.items()}


def _sources(tables: Mapping[str, Table], faces: pd.DataFrame) -> list[str]:
    """Sources of the data: those that the manifests name, and those that the rows name."""
    named: Any = next(
        (list(about) for table in tables.values() if isinstance(about := table.manifest["about"].get("sources"), list)),
        [],
    )
    return sorted({str(name) for name in (*named, *faces["source"].dropna())})


def _verdict(tables: Mapping[str, Table], findings: Findings) -> Verdict:
    outcomes = findings.outcomes
    counts = {
        **{name: table.rows for name, table in tables.items()},
        "questions": sum(findings.tallies.questions.values()),
        "checks": len(outcomes),
        "failed": sum(not outcome.passed for outcome in outcomes),
    }
    return Verdict(
        passed=not _failed(outcomes, "critical"),
        critical=tuple(o.line() for o in _failed(outcomes, "critical")),
        warnings=tuple(o.line() for o in _failed(outcomes, "warning")),
        counts=counts,
    )


def _failed(outcomes: Sequence[Outcome], severity: str) -> list[Outcome]:
    return [o for o in outcomes if not o.passed and o.severity == severity]
