"""Apparent age in years, answered in steps of five."""

from facemllm.tasks.base import Option, Task, column
from facemllm.tasks.items import Number
from facemllm.tasks.wordings import kept

_YEARS = r"(?:years? old|years? of age|years?(?= [.,]|$)|yrs?(?: old)?(?= [.,]|$)|yo|y o)"

TASK = Task(
    name="age",
    metric="mae",
    unit="years",
    items=(
        Number(
            name="age",
            templates=("How old is the person?", "What is the person's age?", "How many years old is this face?"),
            unseen=("What age is this person?", "How old is this face?", *kept("age")),
            options=tuple(Option(value=str(age), text=f"about {age} years old") for age in range(5, 86, 5)),
            source=column("age"),
            low=0,
            high=120,
            readings=((1, rf"N {_YEARS}"), (1, "aged N")),
            short=((1, "N"),),
            lead="he|she|they|it|the|this|a|an|his|her|their|of|person|individual|subject|woman|man|girl|boy|lady|face"
            "|is|looks|seems|appears|to|be|put|place|at|age|aged|estimated?|apparent|approximate|perceived|likely|approx|:",
        ),
    ),
    use="apparent age of the face shown",
)
