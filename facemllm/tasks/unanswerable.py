"""Questions that no picture of a face answers: who it is, what they believe, what is outside the picture. The taught
answer says so in a few words, and it is marked together with its opposite: of half of the faces the question is one
that the picture does answer, borrowed from another task, and there the same words are wrong.

Answers are written freely and read as `cannot_tell` or `answered`; anything else is neither. `unanswerable` is taught.
`unanswerable_new` is asked at evaluation alone: of subjects, and in words, that training does not use, and of borrowed
questions in their unseen wordings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import ClassVar

from facemllm.core.digests import draw
from facemllm.tasks import attributes, expression
from facemllm.tasks.answers import normalise, refuses
from facemllm.tasks.base import Form, Item, Row, Task
from facemllm.tasks.paraphrases import Topic, admitted, paraphrases
from facemllm.tasks.wordings import kept, written

CANNOT_TELL, ANSWERED = "cannot_tell", "answered"
REFUSAL = "this cannot be told from a face"
EACH = 16
"""Most wordings of one subject."""
_BORROWED: tuple[Item, ...] = (*attributes.TASK.items, *expression.TASK.items)
_CANNOT = re.compile(
    r"\b(?:cannot|not|never|no way to|impossible to|unable to|hard to) (?:\w+ ){0,2}?(?:tell|told|know|known|say|said"
    r"|see|seen|determined?|judged?|inferr?(?:ed)?|answer(?:ed)?|identif(?:y|ied)|visible|shown?|depicted)\b"
)
_PERSON, _OWN = "[the person|this person|the individual]", "[the person's|this person's|their]"


def _fact(*names: str) -> Topic:
    """A fact of somebody's life, by its names."""
    name = f"[{'|'.join(names)}]"
    return Topic(
        direct=(f"what is {_OWN} {name}", f"[what|which] {name} does {_PERSON} have"),
        clause=(f"what {_OWN} {name} is", f"[what|which] {name} {_PERSON} has"),
        noun=(f"{_OWN} {name}", f"the {name} of {_PERSON}"),
        limit=EACH,
    )


def _whether(said: str, *asked: str) -> Topic:
    """Something that somebody is or does: as part of a sentence, and as questions."""
    return Topic(direct=asked, clause=(f"[whether|if] {_PERSON} {said}",), limit=EACH)


def _thing(name: str, *asked: str) -> Topic:
    """A thing that is not in the picture."""
    return Topic(
        direct=(f"what [color|kind of thing] is the {name}", f"what does the {name} look like", *asked),
        clause=(f"what color the {name} is", f"what the {name} looks like"),
        noun=(f"the color of the {name}",),
        limit=EACH,
    )


TAUGHT: Mapping[str, Topic] = {
    "name": _fact("name", "first name", "surname", "full name"),
    "identity": Topic(
        direct=(f"who is {_PERSON}", "who is this", "[do you recognize|can you identify] [this person|who this is]"),
        clause=(f"who {_PERSON} is", "who this is", "[whether|if] this is somebody famous"),
        noun=(f"the identity of {_PERSON}",),
        limit=2 * EACH,
    ),
    "relation": _whether(
        "is related to me", "[is this|could this be] the same person as in another photo", "have I seen them before"
    ),
    "religion": _fact("religion", "faith", "belief", "church"),
    "belief": _whether("believes in god", f"is {_PERSON} [religious|a believer|an atheist|a Muslim|a Christian|a Jew]"),
    "race": _fact("race", "ethnic origin", "ancestry", "ethnicity"),
    "nationality": _fact("nationality", "citizenship", "home country", "passport"),
    "origin": Topic(
        direct=(f"where [is|was] {_PERSON} from", f"[what|which] country does {_PERSON} come from"),
        clause=(f"where {_PERSON} is from", f"[what|which] country {_PERSON} was born in"),
        limit=EACH,
    ),
    "orientation": _whether(
        "is gay", f"is {_PERSON} [gay|straight|homosexual|heterosexual|attracted to men or to women]"
    ),
    "health": _whether(
        "is ill", f"is {_PERSON} [ill|sick|healthy|in good health|pregnant]", "what illness do they have"
    ),
    "diagnosis": _fact("illness", "diagnosis", "medical condition", "disease", "mental disorder"),
    "drugs": _whether("takes drugs", f"does {_PERSON} [drink|smoke|take drugs|drink alcohol]", f"is {_PERSON} drunk"),
    "crime": _whether(
        "is a criminal", f"is {_PERSON} [a criminal|a thief|dangerous|guilty]", f"has {_PERSON} [been in prison|stolen]"
    ),
    "honesty": _whether("can be trusted", f"is {_PERSON} [honest|lying|trustworthy|loyal]", "can I trust this person"),
    "income": _fact("income", "salary", "wage", "bank balance"),
    "wealth": _whether("is rich", f"is {_PERSON} [rich|poor|wealthy]", f"how much [money|debt] does {_PERSON} have"),
    "job": _fact("job", "profession", "occupation", "employer"),
    "politics": _fact("political party", "political view", "vote", "opinion on politics"),
    "intelligence": _whether("is clever", f"how [intelligent|clever|smart] is {_PERSON}", "what IQ do they have"),
    "marriage": _whether("is married", f"is {_PERSON} [married|single|divorced|in love]", f"whom did {_PERSON} marry"),
    "children": _whether("has children", f"how many [children|kids] does {_PERSON} have", f"is {_PERSON} a parent"),
    "address": _fact("address", "home town", "phone number", "email address", "postcode"),
    "hobby": _fact("hobby", "favorite sport", "favorite team", "pastime"),
    "thoughts": Topic(
        direct=(f"what is {_PERSON} thinking [about|of|now]", f"what will {_PERSON} do [tomorrow|next]"),
        clause=(f"what {_PERSON} is thinking about", f"what {_PERSON} plans to do"),
        limit=EACH,
    ),
    "photographer": Topic(
        direct=(
            "who took [this|the] [photo|picture]",
            "when was [this|the] [photo|picture] taken",
            "which camera was used",
        ),
        clause=("who took this photo", "when the picture was taken", "where the photo was taken"),
        limit=EACH,
    ),
    "car": _thing(
        "car", "which make is the car", "how many cars are there", "is the car parked", "what is the number plate"
    ),
    "room": _thing("room", "how big is the room", "which room is this", "what is on the wall", "what is on the table"),
    "sofa": _thing("sofa", "is there a [sofa|chair|lamp|carpet|curtain]", "how many windows are there"),
    "shoes": _thing(
        "pair of shoes", f"[what|which] shoes does {_PERSON} wear", "are the shoes clean", "what shoe size is it"
    ),
    "bag": _thing("bag", f"what is in {_OWN} [bag|pocket|hand]", f"is {_PERSON} carrying a bag"),
    "dog": _thing("dog", "which breed is the dog", "is there a [dog|cat|horse|bird]", "what is the name of the cat"),
    "house": _thing("house", "how many floors has the house", "which street is it", "what is in the garden"),
    "weather": Topic(
        direct=(
            "[what|how] is the weather [like]",
            "is it [raining|sunny|windy|snowing|cold]",
            "how warm is it outside",
        ),
        clause=("what the weather is like", "[whether|if] it is [raining|sunny|windy|cold]"),
        noun=("the weather", "the temperature outside"),
        limit=EACH,
    ),
    "brand": Topic(
        direct=(
            f"[what|which] [brand|make] of [watch|phone|jacket|clothes] does {_PERSON} [wear|have]",
            "[what|which] [brand|label] is the [jacket|shirt|watch]",
        ),
        clause=("[what|which] brand the [jacket|watch|phone] is",),
        noun=("the brand of the [jacket|watch|phone|shirt]",),
        limit=EACH,
    ),
    "city": Topic(
        direct=("[what|which] [city|country|town|village] is this", "where is this", "what is the name of this place"),
        clause=("[what|which] [city|town|place] this is", "where we are"),
        limit=EACH,
    ),
    "others": Topic(
        direct=(
            "how many [people|others] are behind the camera",
            "who stands beside them",
            "what is behind the person",
        ),
        clause=("who else is there", "how many other people are near"),
        limit=EACH,
    ),
}
"""Subject -> how it is asked about in training."""

NEW: tuple[str, ...] = (
    *("How tall is this person?", "What do they weigh?", "What's the blood type here", "Which school did she go to?"),
    *("what did he have for breakfast", "What is this person's favourite song?", "Does he own a boat?"),
    *("Can you tell me which languages the woman speaks?", "is the man left-handed", "Which star sign are they?"),
    *("What time is it?", "How many trees are in the garden behind the fence?", "what's written on the poster"),
    *("Is the bicycle new?", "What is on the plate?", "Which floor of the building is this?", "How fast is the train?"),
    *("Does this person have siblings?", "What's their password", "How much did the haircut cost?"),
    *("Is she a good cook?", "Please tell me when his birthday is.", "Which army did this man serve in?"),
    *("what kind of trousers is this person wearing", "Are the socks striped?", "How many rings are on the hand?"),
    *("Who won the match yesterday?", "What is the capital of the country next door?", "Will it be a good harvest?"),
    "Has this person ever been to Japan?",
)
"""Questions about subjects that training leaves out, as people write them."""
_KEPT = (*NEW, *kept("unanswerable"))


def read(text: str) -> str | None:
    """Whether a text says that it cannot be told, or answers as an item that is borrowed from would have it."""
    words = normalise(text)
    if not words:
        return None
    if refuses(text) or _CANNOT.search(words):
        return CANNOT_TELL
    return ANSWERED if any(item.parse(text) is not None for item in _BORROWED) else None


@dataclass(frozen=True, kw_only=True)
class Unanswerable(Item):
    """An unanswerable question, or for half of the faces one that is borrowed: which one, and its wording, is drawn by
    the face, and the label follows. Borrowed wordings are counted on from the item's own. `taught` or not, an item is
    asked of validation and test faces; one that is not taught borrows unseen wordings."""

    topics: tuple[Topic, ...] = ()
    taught: bool = True
    form: Form = "open"
    wordings_agree: ClassVar[bool] = False

    def label(self, row: Row) -> str | None:
        """`cannot_tell`, or `answered` where an answerable question is borrowed; None where it is not to be asked: a
        face of which nothing is known would be one that always refuses."""
        if (not self.taught and row.get("split") == "train") or not self._lenders(row):
            return None
        return CANNOT_TELL if self._lent(row) is None else ANSWERED

    def reply(self, row: Row, label: str) -> str:
        """The refusal, or the borrowed question's true answer."""
        lent = self._lent(row)
        return REFUSAL if lent is None else lent.reply(row, str(lent.label(row)))

    def parse(self, text: str) -> str | None:
        """As `read` has it."""
        return read(text)

    def wording(self, row: Row) -> int:
        """A wording of the question that the row is asked."""
        start, stop = self._places[None if (lent := self._lent(row)) is None else lent.name]
        return start + draw(stop - start, str(row["image_id"]), self.name)

    @cached_property
    def paraphrases(self) -> tuple[str, ...]:
        """The grammar's wordings of all topics and those written by hand, after them those of borrowed questions."""
        return (*self._own, *(text for item in _BORROWED for text in self._lending(item)))

    @property
    def wordings(self) -> tuple[str, ...]:
        """All wordings that cannot be answered."""
        return (*self.templates, *self._own, *self.unseen)

    @cached_property
    def _own(self) -> tuple[str, ...]:
        unseen = (*self.unseen, *_KEPT)
        found = [paraphrases(self.templates, unseen, topic) for topic in self.topics]
        made = tuple(dict.fromkeys(text for each in found for text in each))
        return (*made, *admitted(written(self.name), (*self.templates, *made), unseen))

    @cached_property
    def _places(self) -> dict[str | None, tuple[int, int]]:
        own = len(self.templates) + len(self._own)
        ends = accumulate((len(self._lending(item)) for item in _BORROWED), initial=own)
        lent = zip((item.name for item in _BORROWED), pairwise(ends), strict=True)
        return {None: (0, own), **dict(lent)}

    def _lending(self, item: Item) -> Sequence[str]:
        return item.templates if self.taught else item.unseen

    def _lent(self, row: Row) -> Item | None:
        """The item that a row's question is borrowed from; None where the row is asked what cannot be told."""
        image_id = str(row["image_id"])
        if draw(2, image_id, self.name, "answerable"):
            return None
        known = self._lenders(row)
        return known[draw(len(known), image_id, self.name, "borrowed")] if known else None

    def _lenders(self, row: Row) -> list[Item]:
        return [item for item in _BORROWED if self._lending(item) and item.label(row) is not None]


TASK = Task(
    name="unanswerable",
    metric="balanced_accuracy",
    items=(
        Unanswerable(
            name="unanswerable",
            templates=(
                "What is this person's name?",
                "Which religion does this person have?",
                "What color is the car?",
            ),
            topics=tuple(TAUGHT.values()),
        ),
        Unanswerable(name="unanswerable_new", templates=_KEPT, taught=False),
    ),
    use="saying that a face does not tell who somebody is, what they believe or what is around them",
)
