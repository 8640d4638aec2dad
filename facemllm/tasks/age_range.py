"""Apparent age as one of FairFace's nine ranges of years: as the source says it, else from the age in years."""

from facemllm.tasks import age
from facemllm.tasks.answers import only
from facemllm.tasks.base import Option, Row, Task
from facemllm.tasks.items import Choice

RANGES = ("0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69", "70+")
_OLDEST = 120
_ENDS = {name: tuple(name.split("-")) for name in RANGES[:-1]}
_DECADES = {"20": "twenties", "30": "thirties", "40": "forties", "50": "fifties", "60": "sixties"}
_PERSON = "(?:his|her|their|the)"


def _range(row: Row) -> str | None:
    """The row's range; one of other bins (RAF-DB has 4-19) is none, and then the age in years says."""
    if row.get("age_range") in RANGES:
        return str(row["age_range"])
    age = row.get("age")
    if age is None or not 0 <= age <= _OLDEST:
        return None
    return next((name for name, (_, high) in _ENDS.items() if age < int(high) + 1), RANGES[-1])


def _patterns(low: str, high: str) -> tuple[str, ...]:
    years = "(?: years?(?: old| of age)?)?"
    decade = (rf"(?:in {_PERSON} )?(?:(?:early|mid|late) )?(?:{low}s|{_DECADES.get(low)})",) if low in _DECADES else ()
    return (rf"(?:(?:between|from|aged|ages?) )*{low}(?: years)?(?: to| and| -)? {high}{years}", *decade)


class _Range(Choice):
    """A range of years, which an age in years falls into."""

    def names(self, words: str) -> bool:
        """Whether a range or an age is named."""
        return super().names(words) or self.parse(words) is not None

    def parse(self, text: str) -> str | None:
        """The one range that the text plainly names, or that holds the one age it states; both have to agree."""
        years = age.TASK.items[0].parse(text)
        named = super().parse(text), None if years is None else _range({"age": float(years)})
        return only(filter(None, named))


TASK = Task(
    name="age_range",
    metric="accuracy",
    items=(
        _Range(
            name="age_range",
            templates=("Which age range fits the person?", "Between which years is the person's age?"),
            unseen=("What range of years is the age in?",),
            options=(
                *(Option(value=name, text=f"{low} to {high} years old") for name, (low, high) in _ENDS.items()),
                Option(value="70+", text="70 years old and older"),
            ),
            source=_range,
            patterns={
                **{name: _patterns(low, high) for name, (low, high) in _ENDS.items()},
                "70+": (
                    r"(?:over|older than|more than|above) (?:69|70)(?: years?(?: old| of age)?)?",
                    r"70\+(?: years?(?: old)?)?",
                ),
            },
            claim="the person is {}",
        ),
    ),
    use="apparent age of the face shown",
)
