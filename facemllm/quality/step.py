"""The step `validate`: derive columns, run the suites, write the report, and stop on a critical failure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from facemllm.errors import UserError
from facemllm.quality.checking import Outcome, run_suite
from facemllm.quality.columns import Tallies, conversations_frame, faces_frame
from facemllm.quality.report import page
from facemllm.quality.suites import conversations_checks, faces_checks
from facemllm.records import CONVERSATIONS, FACES, open_table, partial_folder, publish
from facemllm.settings import Settings

RESULT = "result.json"
REPORT = "report.html"


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


def validate(settings: Settings, faces: Path, conversations: Path, out: Path) -> Verdict:
    """Check both tables and write `report.html` and `result.json` into the folder `out`.

    Both files depend on the tables and the limits in `quality` alone. Raises UserError naming the first critical
    failure, its table and row, and the report, which is kept.
    """
    face_table, conversation_table = open_table(faces, FACES), open_table(conversations, CONVERSATIONS)
    partial = partial_folder(out)
    try:
        tallies = Tallies()
        face_rows = faces_frame(face_table, settings.quality.min_box_pixels, tallies)
        outcomes = run_suite("faces", faces_checks(settings.quality), face_rows)
        conversation_rows = conversations_frame(conversation_table, face_rows, tallies)
        outcomes += run_suite("conversations", conversations_checks(settings.quality), conversation_rows)
        counts = {
            "faces": face_table.rows,
            "conversations": conversation_table.rows,
            "questions": sum(tallies.questions.values()),
            "checks": len(outcomes),
            "failed": sum(not outcome.passed for outcome in outcomes),
        }
        verdict = Verdict(
            passed=not _failed(outcomes, "critical"),
            critical=tuple(o.line() for o in _failed(outcomes, "critical")),
            warnings=tuple(o.line() for o in _failed(outcomes, "warning")),
            counts=counts,
        )
        result = {
            "schema": "validation/1",
            **asdict(verdict),
            "tables": {"faces": face_table.digest, "conversations": conversation_table.digest},
            "limits": settings.quality.model_dump(),
            "checks": [asdict(outcome) for outcome in outcomes],
        }
        text = json.dumps(result, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (partial / RESULT).write_text(text, "utf-8")
        (partial / REPORT).write_text(page(result, outcomes, face_rows, tallies), "utf-8")
        publish(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if not verdict.passed:
        paths = {"faces": faces, "conversations": conversations}
        first = _failed(outcomes, "critical")[0]
        more = f" (and {len(verdict.critical) - 1} more)" if len(verdict.critical) > 1 else ""
        raise UserError(f"{first.line()}{more}; table {paths[first.table]}; report {out / REPORT}")
    return verdict


def _failed(outcomes: list[Outcome], severity: str) -> list[Outcome]:
    return [o for o in outcomes if not o.passed and o.severity == severity]
