"""Ethnicity in the source's own categories, one item a source: theirs differ, and none is translated into another's."""

from functools import partial

from facemllm.tasks.base import Option, Row, Task
from facemllm.tasks.items import Choice

_KIND = r"(?: (?:person|woman|man|face|origin|descent))?"

SCHEMES: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {
    "fairface": (
        "FairFace's seven",
        ("white", "black", "latino_hispanic", "east_asian", "southeast_asian", "indian", "middle_eastern"),
        {
            "white": "white",
            "latino_hispanic": "latino hispanic|latin[oa]|hispanic|hispanic latin[oa]",
            "southeast_asian": "south ?east asian",
        },
    ),
    "utkface": ("UTKFace's five", ("white", "black", "asian", "indian", "others"), {"others": "others|other"}),
    "raf-db": ("RAF-DB's three", ("caucasian", "african_american", "asian"), {}),
    "morph2": ("MORPH's five", ("white", "black", "asian", "hispanic", "other"), {"other": "others|other"}),
}
"""Source -> how its categories are called, the categories, and patterns where they are more than the name."""


def _of(source: str, row: Row) -> str | None:
    return row.get("ethnicity") if row.get("source") == source else None


def _item(source: str) -> Choice:
    called, categories, patterns = SCHEMES[source]
    texts = {value: value.replace("_", " ") for value in categories}
    return Choice(
        name=f"ethnicity_{source.replace('-', '_')}",
        templates=(f"Which of {called} groups fits the face?", f"Which group, of {called}, is labeled?"),
        unseen=(f"Of {called} groups, which one fits?",),
        options=tuple(Option(value=value, text=text) for value, text in texts.items()),
        source=partial(_of, source),
        patterns={value: (rf"(?:an? )?(?:{patterns.get(value, text)}){_KIND}",) for value, text in texts.items()},
        claim="the label is {}",
    )


TASK = Task(
    name="ethnicity",
    metric="balanced_accuracy",
    items=tuple(_item(source) for source in SCHEMES),
    use="checking balance and fairness of data and models; not for decisions about people",
    sensitive=True,
)
