"""What the tables must satisfy, as data: one `Check` a line, in plain words, with its severity; and running the checks
over a data frame with Great Expectations, which says plainly how each one went (`run_suite`).

The severity policy is `POLICY`: critical where training on the data would be wrong (the workflow stops), warning where
a person should look (reported, the workflow goes on), info for a remark. A check that cannot be run is critical.
Columns that the tables do not hold (`digest_matches`, ...) are derived in `faces.py`, `conversations.py` and
`balance.py`: true, false, or null where the check does not apply. Great Expectations leaves nulls out.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from facemllm.settings import Validate
from facemllm.tables import SPLITS
from facemllm.tables.schemas import SEGMENTATION

if TYPE_CHECKING:
    import pandas as pd

EXAMPLES = 5
BALANCE = "balance"

Severity = Literal["critical", "warning", "info"]
POLICY: Mapping[Severity, str] = {
    "critical": "Training on it would be wrong, so the workflow stops here. So does a check that could not be run.",
    "warning": "The workflow goes on; a person should look before the model is approved.",
    "info": "A remark. Nothing depends on it.",
}

FILTERS: Mapping[str, tuple[str, str]] = {
    "duplicates": ("the search for duplicates", "Search for duplicates and leaks, at the import"),
    "annotation": ("annotation", "Annotation: raw faces to annotated faces"),
    "reformat": ("question making", "Question making: annotated faces to conversations"),
}
"""Everything after the import that drops rows, in order, as it is called in a sentence and in a heading."""

EXPRESSIONS = ("neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger", "contempt")
GENDERS = ("female", "male")
CLOSED_FORMS = ("boolean", "choice")
ROW_COUNT = "ExpectTableRowCountToBeBetween"

# Attributes that cannot hold together. Sources break some of them (CelebA does), so their share is reported.
_CLASHES = {
    "No_Beard": ("Goatee", "Mustache"),
    "Bald": ("Bangs", "Wavy_Hair", "Straight_Hair"),
    "Straight_Hair": ("Wavy_Hair",),
    "No_Eyewear": ("Eyeglasses",),
    "Mouth_Closed": ("Mouth_Slightly_Open",),
    "Obstructed_Forehead": ("Fully_Visible_Forehead",),
    "Young": ("Middle_Aged", "Senior"),
    "Middle_Aged": ("Senior",),
    "Black_Hair": ("Blond_Hair", "Gray_Hair"),
    "Blond_Hair": ("Brown_Hair",),
    "Brown_Hair": ("Gray_Hair",),
}
CONTRADICTIONS = tuple((name, other) for name, others in _CLASHES.items() for other in others)


@dataclass(frozen=True)
class Check:
    """One expectation. `says` is what it means to a reader; `kind` is the Great Expectations class; `shows` is the
    column that tells what is wrong with a failing row, the checked one unless named."""

    name: str
    says: str
    severity: Severity
    kind: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    shows: str = ""


def _holds(column: str, says: str, severity: Severity, mostly: float = 1.0, shows: str = "") -> Check:
    """A derived column is true wherever it applies, or in a share `mostly` of the rows."""
    arguments = {"column": column, "value_set": [True], "mostly": mostly}
    return Check(column, says, severity, "ExpectColumnValuesToBeInSet", arguments, shows)


def _filled(column: str, says: str) -> Check:
    return Check(f"{column}_present", says, "critical", "ExpectColumnValuesToNotBeNull", {"column": column})


def _unique(column: str, says: str) -> Check:
    return Check(f"{column}_unique", says, "critical", "ExpectColumnValuesToBeUnique", {"column": column})


def _matches(column: str, says: str, regex: str) -> Check:
    arguments = {"column": column, "regex": regex}
    return Check(f"{column}_form", says, "critical", "ExpectColumnValuesToMatchRegex", arguments)


def _between(column: str, says: str, low: float, high: float, severity: Severity = "critical") -> Check:
    arguments = {"column": column, "min_value": low, "max_value": high}
    name = f"{column}_range" if severity == "critical" else f"{column}_usual"
    return Check(name, says, severity, "ExpectColumnValuesToBeBetween", arguments)


def _one_of(column: str, says: str, values: tuple[str, ...], severity: Severity = "critical") -> Check:
    arguments = {"column": column, "value_set": list(values)}
    return Check(f"{column}_known", says, severity, "ExpectColumnValuesToBeInSet", arguments)


def _common(quality: Validate) -> list[Check]:
    rows, splits = {"min_value": quality.min_rows}, {"column": "split", "value_set": list(SPLITS)}
    return [
        Check("min_rows", f"there are at least {quality.min_rows} rows", "critical", ROW_COUNT, rows),
        Check("splits_present", "every split has rows", "critical", "ExpectColumnDistinctValuesToContainSet", splits),
        _one_of("split", "the split is train, validation or test", SPLITS),
        _filled("source", "the source is named"),
        _holds("subject_in_one_split", "no subject appears in two splits", "critical"),
    ]


def raw_checks(quality: Validate, sources: Sequence[str]) -> list[Check]:
    """The suite of every faces table. `sources` may be used: they stand in the ledger and are not withdrawn."""
    words = r"^[a-z][a-z0-9_]*$"
    return [
        *_common(quality),
        _one_of("source", "the source stands in the ledger and is not withdrawn", tuple(sources)),
        _holds("terms_allow_use", "the source's terms allow what its split is for", "critical", shows="source"),
        _filled("image_id", "every face has an image_id"),
        _unique("image_id", "no image appears twice"),
        _matches("image_id", "the image_id is a SHA-256 in hex", r"^[0-9a-f]{64}$"),
        _holds("digest_matches", "the image_id is the SHA-256 of the image", "critical"),
        _holds("decodes", "the image can be decoded", "critical"),
        _holds("size_matches", "the image has the stated width and height", "critical"),
        _holds("numbers_finite", "no number is NaN or infinite", "critical"),
        _holds("box_inside", "the face box lies inside the image", "warning"),
        _holds("box_large", f"the face box is at least {quality.min_box_pixels} pixels wide and high", "warning"),
        _holds("landmarks_inside", "the landmarks lie inside the image", "warning"),
        _holds("segmentation_decodes", "the segmentation can be decoded", "critical"),
        _holds("segmentation_matches_size", "the segmentation is as large as the image", "warning"),
        _holds("segmentation_classes_ok", f"segmentation classes are 0 to {len(SEGMENTATION) - 1}", "critical"),
        _matches("expression", "the expression is written in lower_snake_case", words),
        _one_of("expression", "the expression is one of the eight common ones", EXPRESSIONS, "info"),
        _one_of("gender", "the gender label is female or male", GENDERS),
        _between("age", "the age is 0 to 116 years", 0, 116),
        _between("skin_tone", "the skin tone is on the Monk scale, 1 to 10", 1, 10),
        *(_between(a, f"{a} is between -180 and 180 degrees", -180, 180) for a in ("yaw", "pitch", "roll")),
        *(
            _between(a, f"{a} is within 99 degrees, as pose benchmarks ask", -99, 99, "info")
            for a in ("yaw", "pitch", "roll")
        ),
        _holds("action_units_ok", "action units are named AU<number> and lie in 0 to 5", "critical"),
        _holds("alike_in_one_split", "no two splits hold images that look the same", "warning"),
    ]


def annotated_checks(quality: Validate, sources: Sequence[str], *, with_raw: bool) -> list[Check]:
    """The suite of the annotated faces: that of every faces table, and what annotation must and must not do."""
    kept = "picture, source, subject and split are those of the raw table"
    agreement = [
        _holds("in_raw", "the face is in the raw table", "critical"),
        _holds("identity_kept", kept, "critical", shows="changed"),
        _holds("labels_kept", "no label that the source gave was changed", "critical", shows="changed"),
    ]
    share, odd, clashing = quality.caption_share, quality.disagreement_share, quality.contradiction_share
    contradict = f"at most {odd:.0%} of the captions contradict a label"
    exclude = f"at most {clashing:.0%} of the faces have attributes that exclude each other"
    return [
        *raw_checks(quality, sources),
        *(agreement if with_raw else ()),
        _holds("has_caption", f"at least {share:.0%} of the faces have a caption", "warning", share),
        _holds("caption_agrees", contradict, "warning", 1 - odd, shows="disagreements"),
        _holds("attributes_agree", exclude, "warning", 1 - clashing, shows="clashes"),
    ]


def conversations_checks(quality: Validate) -> list[Check]:
    """The suite of the conversations table."""
    return [
        *_common(quality),
        _filled("conversation_id", "every conversation has an id"),
        _unique("conversation_id", "no conversation appears twice"),
        _holds("image_known", "the image is in the annotated table", "critical"),
        _holds("split_matches", "the split is that of the face", "critical"),
        _holds("subject_matches", "the subject is that of the face", "critical"),
        _holds("source_matches", "the source is that of the face", "critical"),
        _holds("segmentation_matches", "the segmentation is that of the face", "critical"),
        _holds("groups_match", "the fairness groups are those of the face", "critical"),
        _holds("image_matches", "the image_id is the SHA-256 of the conversation's one image", "critical"),
        _holds("turns_match", "there is one turn for every two messages, and at least one", "critical"),
        _holds("roles_alternate", "user and assistant alternate, the user first", "critical"),
        _holds("image_first", "one image stands in the first message and none elsewhere", "critical"),
        _holds("texts_filled", "no question or answer is empty", "critical"),
        _holds("samples_unique", "no sample_id appears twice", "critical"),
        _holds("questions_known", "every question is one that a task asks", "critical", shows="unknown_questions"),
        _holds("answers_in_options", "closed questions have options, and the answer is one of them", "critical"),
        _holds("answers_match_labels", "every answer is the label of the face", "critical", shows="wrong_answers"),
        _holds("replies_say_answers", "the words of every reply say its answer", "critical", shows="odd_replies"),
    ]


def balance_checks(filters: Iterable[str]) -> list[Check]:
    """The suite of group balance: one check a filter."""
    says = "thins no group much more than all"
    return [_holds(f"{name}_keeps_groups", f"{FILTERS[name][0]} {says}", "warning", shows="says") for name in filters]


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
    """Run every check over the frame; outcomes come in the order of the checks, with up to `examples` failing rows. Of
    a frame without rows only their number is checked: there is nothing else to say about it. A failing row is named by
    its number and `image_id`."""
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
