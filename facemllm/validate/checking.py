"""Runs a suite of checks over a data frame with Great Expectations and says plainly how each one went."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from facemllm.validate.suites import ROW_COUNT, Check

if TYPE_CHECKING:
    import pandas as pd

EXAMPLES = 5
BALANCE = "balance"


@dataclass(frozen=True)
class Outcome:
    """How one check went. `error` is set when it could not be run, which counts as a critical failure; `telling` when
    the examples' values say what is wrong, rather than which value was found."""

    table: str
    name: str
    says: str
    severity: str
    passed: bool
    checked: int
    failed: int
    observed: str
    examples: tuple[Mapping[str, Any], ...]
    error: str
    telling: bool = False

    @property
    def unit(self) -> str:
        """What is counted: rows of a table, or groups at a filter."""
        return "groups" if self.table == BALANCE else "rows"

    def line(self) -> str:
        """The outcome in one line, with the first failing row."""
        if self.error:
            return f"{self.table}: check '{self.name}' could not be run: {self.error}"
        text = f"{self.table}: check '{self.name}' failed ({self.says})"
        if self.observed:
            text += f"; {self.observed}"
        if self.unit == "groups" and self.examples:
            return f"{text}: {'; '.join(example['value'] for example in self.examples)}"
        if self.failed:
            text += f"; {self.failed} of {self.checked} rows"
        if self.examples:
            first = self.examples[0]
            text += f", first row {first['row']}, image {str(first['image_id'])[:12]}"
            text += f" ({first['value']})" if self.telling and first["value"] else ""
        return text


def run_suite(table: str, checks: Sequence[Check], frame: pd.DataFrame, examples: int = EXAMPLES) -> list[Outcome]:
    """Run every check over the frame; outcomes come in the order of the checks, with up to `examples` failing rows.

    Of a frame without rows only their number is checked: there is nothing else to say about it. A
    failing row is told by its number and `image_id`.
    """
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    warnings.filterwarnings("ignore", module="great_expectations")
    import great_expectations as gx
    import great_expectations.expectations as expectations

    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    if frame.empty:
        checks = [check for check in checks if check.kind == ROW_COUNT]
    if not checks:
        return []
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}  # type: ignore[assignment]
    asset = context.data_sources.add_pandas("tables").add_dataframe_asset(table)
    # all at once: a suite that is in the context already saves itself anew with every expectation added
    built = [
        getattr(expectations, check.kind)(**check.arguments, severity=check.severity, meta={"name": check.name})
        for check in checks
    ]
    suite = context.suites.add(gx.ExpectationSuite(name=table, expectations=built))
    validation = gx.ValidationDefinition(
        name=table, data=asset.add_batch_definition_whole_dataframe("all"), suite=suite
    )
    result = context.validation_definitions.add(validation).run(
        batch_parameters={"dataframe": frame},
        result_format={
            "result_format": "SUMMARY",
            "partial_unexpected_count": examples,
            "unexpected_index_column_names": ["row", "image_id", *sorted({c.shows for c in checks if c.shows})],
        },
    )
    # results come in an order of Great Expectations' own
    raw: list[Any] = [entry.to_json_dict() for entry in result.results]
    found = {entry["expectation_config"]["meta"]["name"]: entry for entry in raw}
    return [_outcome(table, check, found[check.name]) for check in checks]


def _outcome(table: str, check: Check, raw: Mapping[str, Any]) -> Outcome:
    result = raw["result"]
    error = _raised(raw["exception_info"])
    checked = int(result.get("element_count") or 0) - int(result.get("missing_count") or 0)
    failed = int(result.get("unexpected_count") or 0)
    if check.kind == "ExpectColumnValuesToNotBeNull":
        checked = int(result.get("element_count") or 0)
    column = check.shows or check.arguments.get("column")
    examples = tuple(
        {"row": int(e["row"]), "image_id": e["image_id"], "value": "" if column is None else str(e.get(column))}
        for e in result.get("partial_unexpected_index_list") or ()
    )
    observed = ""
    if check.kind == ROW_COUNT:
        observed = f"found {result.get('observed_value', 0)} rows"
    elif missing := result.get("partial_missing_list"):
        observed = f"missing: {', '.join(map(str, missing))}"
    return Outcome(
        table=table,
        name=check.name,
        says=check.says,
        severity="critical" if error else check.severity,
        passed=bool(raw["success"]) and not error,
        checked=checked,
        failed=failed,
        observed=observed,
        examples=examples,
        error=error,
        telling=bool(check.shows),
    )


def _raised(info: Mapping[str, Any]) -> str:
    """The message of an exception inside a check: `success: False` alone does not tell it from a failing row."""
    entries = [info] if "raised_exception" in info else [e for e in info.values() if isinstance(e, Mapping)]
    messages = [str(e.get("exception_message")) for e in entries if e.get("raised_exception")]
    return messages[0] if messages else ""
