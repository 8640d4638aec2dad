"""From a question in anybody's words to the item of a task that it asks for: by meaning, not by wording.

A wording of an item (whatever its case, marks and spelling) is that item. Any other question is read word by word
(`reading`): its words are notions of the item, words that any question may hold ("could you tell me"), or strange. A
thing of another kind, and the question is not taken: "What color is the car?" shares all but one word with a question
of an item. An unknown word that tells how or what is done weighs little, less where the question is about somebody.
Items that the lexicon knows no notions of are compared by the rare words of their wordings. Where the lexicon finds
nothing, a linear classifier (`classifier`) may, if it is sure; it also takes back what it is sure to be about nothing
taught.

A yes/no question about an option ("Is her hair blond?") is the yes/no item of that thing where there is one, else the
choice that has the option. With a negation ("is she not smiling?") a bare yes could be taken either way; the match says
so, and is answered in words. Questions that name two items, are in another language or ask what no face answers match
nothing.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from heapq import nlargest

from facemllm.serve.asked.classifier import NONE, classifier, of_item
from facemllm.serve.asked.lexicon import LEXICON
from facemllm.serve.asked.reading import Reading, is_negated, is_yes_no, plain_words, read, written_names
from facemllm.tasks.base import Item, Question, Task
from facemllm.tasks.paraphrases import normal

ENOUGH = 0.78
"""Least similarity of a match, of 1."""
MARGIN = 0.15
"""Least distance to the second best item."""
SURE, SURER = 0.6, 0.85
"""Least probability of the classifier for an item where the lexicon finds none; the second where a question speaks of
something else (`_ELSEWHERE`). Chosen, as `DOUBT`, on lists whose authors the classifier had not learnt from."""
DOUBT, DOUBT_NEAR = 0.85, 0.5
"""Probability of the classifier that nothing taught is asked for, above which the lexicon is not believed; the second
where it found a question only near to an item (`_NEAR`)."""
_NEAR, _ELSEWHERE = 0.9, 1.0
_LIKELY = 0.5
"""Least probability, exceeded, of an option that a bare yes says."""
ASIDE = 0.95
"""Similarity of a question that stands beside a sentence about nothing that is known."""
_MAX_PARTS = 6
UNANSWERABLE = "unanswerable"
_ALIKE = (frozenset({"yaw", "pitch", "roll", "eyewear"}), frozenset({"hair_style", "Bangs"}))
"""Items that people ask for in each other's words ("tinted" glasses are read as tilted): one of them is asked for."""
_FOR_KINDS = frozenset({"WHICH", "KIND", "DESCRIBE", "STYLE", "LOOKLIKE"})
"""What asks for more than whether a thing is there."""
_PARTS = re.compile(r"[.;:!?\n,]+")
_ASKS = re.compile(
    r"(?:and |but |so )?(?:what|which|who|whose|how|where|when|why|is|are|does|do|did|has|have|can|could|will|would|was"
    r"|tell|say|name|give|describe)\b"
)
_ENDING = re.compile(r"(?<=\w{3})(?:ings?|ed|es|s|e)$")
_POINTS_BACK = re.compile(r"\b(?:its?|that|those|these|they|their|them|there)\b")


@dataclass(frozen=True)
class Match:
    """The item's `question`, the taught `wording` that is given to the model, and how near it is to what was asked (1
    for a wording of the item). `option` is the value of a choice that a yes/no question is about; `negated` tells that
    the question holds a negation."""

    question: Question
    wording: str
    similarity: float
    option: str | None = None
    negated: bool = False

    def reply(self, item: Item, value: str, text: str, probability: float | None = None) -> str:
        """The words of an answer to what was asked. `text` says the answer's `value`: it stays as it is, unless an
        option was asked for ("yes", or "no, sad"; without a yes where the `probability` of the option does not exceed
        one half), or a yes would be doubtful (a claim: "a hat cannot be seen")."""
        if self.negated:
            return item.claims.get(value, text)
        if self.option is None:
            return text
        if value != self.option:
            return f"no, {text}"
        return "yes" if probability is None or probability > _LIKELY else f"probably {text}"


class Matcher:
    """Knows the questions of some tasks. Pure: nothing is loaded, every answer depends on the text alone."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        """The task of unanswerable questions has nothing to match: whatever matches no item is one."""
        taught = [
            (task.question(item.name), item) for task in tasks if task.name != UNANSWERABLE for item in task.items
        ]
        self._wordings: dict[str, tuple[Question, str]] = {}
        self._signs: list[tuple[Question, tuple[frozenset[str], ...], frozenset[str]]] = []
        self._rare: list[tuple[Question, tuple[frozenset[str], ...]]] = []
        self._own_words: set[str] = set()
        named: set[str] = set()
        for question, item in taught:
            for text in item.wordings:  # where two tasks ask alike, the one named first answers
                self._wordings.setdefault(normal(text), (question, text))
            if item.name in named:
                continue
            named.add(item.name)
            if item.name in LEXICON.signs:
                self._signs.append((question, *_sign(item.name, item.form)))
            else:
                texts = [normal(text).split() for text in (*item.templates, *item.unseen)]
                self._own_words.update(*texts)
                said = set(map(_rare_words, texts))
                self._rare.append((question, tuple(words for words in said if words)))
        counts = Counter(word for _, said in self._rare for word in frozenset().union(*said))
        self._weights = {word: math.log(1 + len(self._rare) / count) for word, count in counts.items()}
        self._most = max(self._weights.values(), default=1.0)
        self._first = tuple(dict.fromkeys(question.templates[0] for question, _ in taught))

    def match(self, text: str) -> Match | None:
        """The item that a text asks for; None if it asks for none, for several, or for something else."""
        plain = plain_words(text)
        if plain is None:
            return None
        asked = read(plain, self._own_words, written_names(text))
        if found := self._wordings.get(plain):
            return self._found(*found, 1.0, asked)
        best = self._best(asked)
        if best is None and (aside := self._aside(text)):
            return aside
        return self._weighed(best and self._found(best[1], best[1].templates[0], best[0], asked), asked)

    def suggestions(self, text: str, count: int = 3) -> list[str]:
        """Questions that can be asked, at most so many, those nearest to the text first."""
        near: list[str] = []
        if (plain := plain_words(text)) is not None:
            found = read(plain, self._own_words)
            scored = [(_nearness(found, signs, beside), question) for question, signs, beside in self._signs]
            scored += [(self._overlap(_rare_words(found.words), said), question) for question, said in self._rare]
            near = [q.templates[0] for score, q in sorted(scored, key=lambda one: -one[0]) if score > 0]
        return list(dict.fromkeys([*near, *self._first]))[:count]

    def about_faces(self, text: str) -> bool:
        """Whether a free answer is reasonable: the text is English, speaks of a face or person, and of nothing else
        that is known not to be part of one."""
        if (plain := plain_words(text)) is None:
            return False
        words = set(plain.split())
        return not words.isdisjoint(LEXICON.face) and words.isdisjoint(LEXICON.elsewhere)

    def _weighed(self, found: Match | None, asked: Reading) -> Match | None:
        """What the lexicon found, unless the classifier is as good as sure that nothing taught is asked for; where it
        found nothing, the classifier's item if it is sure enough of it."""
        probability = classifier("items").probabilities(of_item(asked))
        if found is not None:
            most = DOUBT if found.similarity > _NEAR else DOUBT_NEAR
            return None if found.question.item in probability and probability[NONE] > most else found
        sure = SURER if asked.strange >= _ELSEWHERE else SURE
        likeliest = max(probability, key=probability.__getitem__)
        question = next((question for question, *_ in self._signs if question.item == likeliest), None)
        if question is None or probability[likeliest] < sure or self._asks_besides(likeliest, asked):
            return None
        return self._found(question, question.templates[0], probability[likeliest], asked)

    def _asks_besides(self, item: str, asked: Reading) -> bool:
        """Whether a question asks for another item by notions that neither ask for this one nor stand beside it."""
        asking, beside = next((signs, beside) for question, signs, beside in self._signs if question.item == item)
        left = asked.notions - frozenset[str]().union(*asking) - beside
        alike = next((items for items in _ALIKE if item in items), frozenset({item}))
        others = (sign for question, signs, _ in self._signs if question.item not in alike for sign in signs)
        return any(sign <= asked.notions and not sign.isdisjoint(left) for sign in others)

    def _found(self, question: Question, wording: str, similarity: float, asked: Reading) -> Match:
        return Match(question, wording, similarity, _option(question, asked), is_negated(asked.plain))

    def _aside(self, text: str) -> Match | None:
        """The match of the one part of a text that asks, beside parts that ask nothing and speak of nothing known."""
        parts = [part.strip() for part in _PARTS.split(text) if part.strip()]
        if not 1 < len(parts) <= _MAX_PARTS:
            return None
        found: Match | None = None
        others: list[Reading] = []
        for part in parts:
            if (plain := plain_words(part)) is None:
                return None
            asked = read(plain, self._own_words, written_names(part))
            if found is None and not _POINTS_BACK.search(plain) and (best := self._best(asked)):
                found = self._found(best[1], best[1].templates[0], ASIDE * best[0], asked)
            else:
                others.append(asked)
        return found if all(map(_quiet, others)) else None

    def _best(self, asked: Reading) -> tuple[float, Question] | None:
        """The best item and its similarity, if it is similar enough and no other nearly as much. The more precise
        questions, those compared by words, come first."""
        own = _rare_words(asked.words)
        precise = [(self._overlap(own, said), question) for question, said in self._rare]
        signed = [(_similarity(asked, signs, beside), question) for question, signs, beside in self._signs]
        for scored in (precise, signed):
            best, second = nlargest(2, [*scored, (0.0, None), (0.0, None)], key=lambda one: one[0])
            if best[1] is not None and best[0] >= ENOUGH and best[0] - second[0] >= MARGIN:
                return best[0], best[1]
        return None

    def _overlap(self, own: frozenset[str], said: Sequence[frozenset[str]]) -> float:
        """Weight of the words that a text and an item's wording share, of that of all their words."""
        best = 0.0
        for wording in said:
            if shared := own & wording:
                whole = sum(self._weights.get(word, self._most) for word in own | wording)
                best = max(best, sum(self._weights[word] for word in shared) / whole)
        return best


def _sign(item: str, form: str) -> tuple[tuple[frozenset[str], ...], frozenset[str]]:
    """Notions that ask for an item, and those that may stand beside."""
    signs, beside = LEXICON.signs[item]
    free = beside | LEXICON.soft
    return signs, free - _FOR_KINDS if form == "boolean" else free | {"WHICH"}


def _quiet(part: Reading) -> bool:
    """Whether a part of a text asks nothing and speaks of nothing known, of a face or not."""
    return (
        not part.notions - LEXICON.soft - LEXICON.persons - {"WHICH"}
        and not (part.strange and _ASKS.match(part.plain))
        and LEXICON.elsewhere.isdisjoint(part.words)
    )


def _similarity(asked: Reading, signs: Sequence[frozenset[str]], beside: frozenset[str]) -> float:
    """The share of what a question speaks of that an item accounts for; 0 where it does not ask for the item. Soft
    notions that may stand beside weigh nothing."""
    held = frozenset[str]().union(*(sign for sign in signs if sign <= asked.notions))
    if not held:
        return 0.0
    own = held | (asked.notions & beside - LEXICON.soft - {"WHICH"})
    return len(own) / (len(own) + len(asked.notions - own - beside) + asked.strange)


def _nearness(asked: Reading, signs: Sequence[frozenset[str]], beside: frozenset[str]) -> float:
    """How much of an item's notions a question holds, whatever else it speaks of."""
    hard = asked.notions - LEXICON.soft - LEXICON.persons
    return max((len(sign & hard) / len(sign) for sign in signs), default=0.0) + 0.1 * len(hard & beside)


def _option(question: Question, asked: Reading) -> str | None:
    """The value of the one option that a yes/no question is about."""
    options = LEXICON.options.get(question.item)
    if question.form != "choice" or not options or not is_yes_no(asked.plain):
        return None
    own = set(asked.words)
    named = {value for value, said in options.items() if not own.isdisjoint(said)}
    if question.item == "hair_color" and own & {"dark", "light", "darker", "lighter"}:
        named = {"Dark_Brown_Hair"} if named == {"Brown_Hair"} and "dark" in own else set()
    if question.item == "beard" and "full" in own:
        named = {"Full_Beard"}
    value = named.pop() if len(named) == 1 else None
    return value if any(option.value == value for option in question.options) else None


@cache
def _content(word: str) -> str:
    """What a word means to a comparison by words: itself without its ending; nothing for a plain one."""
    notions = LEXICON.notions.get(word)
    if notions is not None and notions <= LEXICON.soft - {"FULL"}:
        return ""
    return _ENDING.sub("", word)


def _rare_words(words: Iterable[str]) -> frozenset[str]:
    return frozenset(filter(None, map(_content, words)))
