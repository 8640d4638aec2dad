"""From a question in anybody's words to the item of a task that it asks for: by meaning, not by wording.

A wording of an item (whatever its case, marks and spelling) is that item. Any other question is read word by word:
every word has to be accounted for, as a notion of the item, as a slip of the finger for one, or as a word that any
question may hold ("could you tell me"). One word about something else, and the question is not taken: "What color is the
car?" shares all but one word with a question of an item. Items that `lexicon` knows no notions of are compared by the
rare words of their wordings.

A yes/no question about an option ("Is her hair blond?") is the yes/no item of that thing where there is one, else the
choice that has the option. With a negation ("is she not smiling?") a bare yes could be taken either way; the match says
so, and is answered in words. Questions that name two items, are in another language or ask what no face answers match
nothing.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from heapq import nlargest

from facemllm.serve.asked.lexicon import lexicon
from facemllm.tasks.base import Item, Question, Task
from facemllm.tasks.paraphrases import normal

_LEXICON = lexicon()
MAX_WORDS = 60
"""Longer texts are no question about one item."""
ENOUGH = 0.78
"""Least similarity of a match, of 1."""
MARGIN = 0.15
"""Least distance to the second best item."""
_MAX_CHARS = 2000
_ASIDE = 0.95
"""Similarity of a question that stands beside a sentence about nothing that is known."""
_UNANSWERABLE = "unanswerable"
_NEGATION = re.compile(
    r"\b(?:not|no|non|never|without|isnt|arent|doesnt|dont|hasnt|havent|wasnt|didnt|cant|lacks?|lacking|hatless|missing)\b"
)
_NO_NEGATION = re.compile(
    r"\b(?:yes or no|yes no|no or yes|or no\w*(?: \w+)?|or without|whether or not|if not|no \w+(?: \w+)* or \w+"
    r"|i (?:am not|do not|can ?not|could not|did not|have no)|no idea|not sure)\b"
)
_YES_NO = re.compile(
    r"^(?:(?:please|so|and|ok|okay|hey|hi|well) )*(?:is|are|am|was|were|does|do|did|has|have|would|isnt|arent|doesnt|can|could)\b"
)
_MEDIUM = _LEXICON.words["MEDIUM"].replace(" ", "|")
_THE = "(?:(?:the|this|that|these|those|my|our|a|an|your|attached|provided|uploaded|following|whole|current|given) )*"
_IN_PICTURE = re.compile(
    rf"\b(?:in|from|on|at|by|for|inside|within|with|of|see|using|given|person|man|woman|based on) {_THE}(?:{_MEDIUM})\b"
    rf"|^{_THE}(?:{_MEDIUM})\b(?! (?:is|was|are)\b)|\b{_THE}(?:{_MEDIUM})(?: is)? of (?=an? )"
    rf"|\b(?:does|do|did|can|could|whether|if|that) {_THE}(?:{_MEDIUM})(?= (?:show|contain|depict|feature|have|shows)\b)"
)
_ABOUT_PICTURE = re.compile(
    r"\b(?:age|colors?|tone|hue|description|caption|summary|shade|rotation|turn|tilt|angle|portrayal|sketch) (?:of|for|to) "
    rf"{_THE}(?:{_MEDIUM})\b|\b(?:describe|caption|summari[sz]e|portray|sketch) "
)
_PURPOSE = re.compile(
    r"\bfor (?:\w+ ){0,3}?(?:reports?|forms?|records?|files?|notes?|survey|study|paperwork|id|application|documentation|profile"
    r"|database|dataset|research|project|homework|article|audit|log|system|spreadsheet|table|purposes|reference|badge"
    r"|catalogue?|archive|stats|statistics)\b"
)
_PARTS = re.compile(r"[.;:!?\n,]+")
_ASKS = re.compile(
    r"^(?:and |but |so )?(?:what|which|who|whose|how|where|when|why|is|are|does|do|did|has|have|can|could|will|would|was|tell|say"
    r"|name|give|describe)\b"
)
_POINTS_BACK = re.compile(r"\b(?:its?|that|those|these|they|their|them|there)\b")


@dataclass(frozen=True)
class Match:
    """The item's `question`, the taught `wording` that is given to the model, and how near it is to what was asked (1 for
    a wording of the item). `option` is the value of a choice that a yes/no question is about; `negated` tells that the
    question holds a negation."""

    question: Question
    wording: str
    similarity: float
    option: str | None = None
    negated: bool = False

    def reply(self, item: Item, value: str, text: str) -> str:
        """The words of an answer to what was asked. `text` says the answer's `value`: it stays as it is, unless an
        option was asked for ("yes", or "no, sad"), or a yes would be doubtful (a claim: "a hat cannot be seen")."""
        if self.negated:
            return item.claims.get(value, text)
        if self.option is None:
            return text
        return "yes" if value == self.option else f"no, {text}"


@dataclass(frozen=True)
class _Read:
    """A question as it was read: its words, the notions they stand for, how many words are about something else."""

    words: tuple[str, ...]
    notions: frozenset[str]
    strange: float


class Matcher:
    """Knows the questions of some tasks. Pure: nothing is loaded, every answer depends on the text alone."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        """The task of unanswerable questions has nothing to match: whatever matches no item is one."""
        taught = [
            (task.question(item.name), item) for task in tasks if task.name != _UNANSWERABLE for item in task.items
        ]
        self._wordings: dict[str, tuple[Question, str]] = {}
        self._signs: list[tuple[Question, tuple[frozenset[str], ...], frozenset[str]]] = []
        self._rare: list[tuple[Question, tuple[frozenset[str], ...]]] = []
        named: set[str] = set()
        for question, item in taught:
            for text in item.wordings:  # where two tasks ask alike, the one named first answers
                self._wordings.setdefault(normal(text), (question, text))
            if item.name in named:
                continue
            named.add(item.name)
            if item.name in _LEXICON.signs:
                self._signs.append((question, *_sign(item.name, item.form)))
            else:
                said = {_rare_words(normal(text).split()) for text in (*item.templates, *item.unseen)}
                self._rare.append((question, tuple(words for words in said if words)))
        counts = Counter(word for _, said in self._rare for word in frozenset().union(*said))
        self._weights = {word: math.log(1 + len(self._rare) / count) for word, count in counts.items()}
        self._most = max(self._weights.values(), default=1.0)
        self._first = tuple(dict.fromkeys(question.templates[0] for question, _ in taught))

    def match(self, text: str) -> Match | None:
        """The item that a text asks for; None if it asks for none, for several, or for something else."""
        plain = _plain(text)
        if plain is None:
            return None
        if found := self._wordings.get(normal(text)):
            return self._found(*found, 1.0, plain, self._read(plain))
        read = self._read(plain)
        if best := self._best(read):
            return self._found(best[1], best[1].templates[0], best[0], plain, read)
        return self._aside(text)

    def suggestions(self, text: str, count: int = 3) -> list[str]:
        """Questions that can be asked, at most so many, those nearest to the text first."""
        near: list[str] = []
        if (plain := _plain(text)) is not None:
            read = self._read(plain)
            scored = [(_nearness(read, signs, beside), question) for question, signs, beside in self._signs]
            scored += [(self._overlap(_rare_words(read.words), said), question) for question, said in self._rare]
            near = [q.templates[0] for score, q in sorted(scored, key=lambda one: -one[0]) if score > 0]
        return list(dict.fromkeys([*near, *self._first]))[:count]

    def about_faces(self, text: str) -> bool:
        """Whether a free answer is reasonable: the text is English, speaks of a face or person, and of nothing else that
        is known not to be part of one."""
        if (plain := _plain(text)) is None:
            return False
        words = set(plain.split())
        return not words.isdisjoint(_LEXICON.face) and words.isdisjoint(_LEXICON.elsewhere)

    def _found(self, question: Question, wording: str, similarity: float, plain: str, read: _Read) -> Match:
        return Match(question, wording, similarity, _option(question, plain, read.words), _negated(plain))

    def _aside(self, text: str) -> Match | None:
        """The match of the one part of a text that asks, beside parts that ask nothing and speak of nothing known."""
        parts = [part.strip() for part in _PARTS.split(text) if part.strip()]
        if not 1 < len(parts) <= _MAX_PARTS:
            return None
        found: Match | None = None
        others = []
        for part in parts:
            if (plain := _plain(part)) is None:
                return None
            read = self._read(plain)
            if not found and not _POINTS_BACK.search(plain) and (best := self._best(read)):
                found = self._found(best[1], best[1].templates[0], _ASIDE * best[0], plain, read)
            else:
                others.append((plain, read))
        quiet = all(
            not read.notions - _LEXICON.soft - _LEXICON.persons - {"WHICH"}
            and (not read.strange or not _ASKS.match(plain))
            and _LEXICON.elsewhere.isdisjoint(read.words)
            for plain, read in others
        )
        return found if quiet else None

    def _read(self, plain: str) -> _Read:
        text = " ".join(self._spelt(word) for word in plain.split())
        text = text if _ABOUT_PICTURE.search(text) else _IN_PICTURE.sub(" ", text)
        text = _PURPOSE.sub(" ", text)
        for pattern, word in _LEXICON.phrases:
            text = pattern.sub(word, text)
        words = text.split()
        notions: set[str] = set()
        known: list[str] = []
        strange = 0.0
        for place, word in enumerate(words):
            if word in ("you", "your", "u", "yours", "yourself"):
                strange += not _asked_of_you(words, place)
                continue
            known.append(word)
            if (found := _LEXICON.notions.get(word)) is not None:
                notions |= found
            elif word in self._weights:
                continue
            elif word in _LEXICON.elsewhere:
                strange += 2
            elif not word.isdigit() and not (word.endswith("ly") and len(word) > len("only")):
                strange += 1
        return _Read(tuple(known), _settled(notions, known, text), strange)

    def _spelt(self, word: str) -> str:
        """The word, or the one it is a slip of the finger for."""
        if word in _LEXICON.notions or word in self._weights:
            return word
        if word[-1] == "s" and (word[:-1] in _LEXICON.notions or word[:-1] in _LEXICON.elsewhere):  # "the mans hair"
            return word[:-1]
        return word if (meant := _LEXICON.meant(word)) is None else normal(meant)

    def _best(self, read: _Read) -> tuple[float, Question] | None:
        """The best item and its similarity, if it is similar enough and no other nearly as much. The more precise
        questions, those compared by words, come first."""
        own = _rare_words(read.words)
        precise = [(self._overlap(own, said), question) for question, said in self._rare]
        signed = [(_similarity(read, signs, beside), question) for question, signs, beside in self._signs]
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


_MAX_PARTS = 6
_FOR_KINDS = frozenset({"WHICH", "KIND", "DESCRIBE", "STYLE", "LOOKLIKE"})
"""What asks for more than whether a thing is there."""


def _sign(item: str, form: str) -> tuple[tuple[frozenset[str], ...], frozenset[str]]:
    """Notions that ask for an item, and those that may stand beside."""
    signs, beside = _LEXICON.signs[item]
    free = beside | _LEXICON.soft
    free = free - _FOR_KINDS if form == "boolean" else free | {"WHICH"}
    return signs, free


def _similarity(read: _Read, signs: Sequence[frozenset[str]], beside: frozenset[str]) -> float:
    """The share of what a question speaks of that an item accounts for; 0 where it does not ask for the item. Soft
    notions that the item accounts for weigh nothing."""
    held = frozenset().union(*(sign for sign in signs if sign <= read.notions))
    if not held:
        return 0.0
    own = held | (read.notions & beside - _LEXICON.soft - {"WHICH"})
    return len(own) / (len(own) + len(read.notions - own - beside) + read.strange)


def _nearness(read: _Read, signs: Sequence[frozenset[str]], beside: frozenset[str]) -> float:
    """How much of an item's notions a question holds, whatever else it speaks of."""
    hard = read.notions - _LEXICON.soft - _LEXICON.persons
    return max((len(sign & hard) / len(sign) for sign in signs), default=0.0) + 0.1 * len(hard & beside)


def _settled(found: set[str], words: Sequence[str], text: str) -> frozenset[str]:
    """The notions that are meant. Persons ("the girl's hair") are asked for only where nothing else is, and somebody is
    said to be one; shades of hair are no sunglasses, straight hair is no direction."""
    found = set(found)
    if found - _LEXICON.soft - _LEXICON.persons or found & {"DESCRIBE", "LOOKLIKE"} or not _predicated(text):
        found -= _LEXICON.persons
    if found & {"DESCRIBE", "LOOKLIKE"} and not found - _LEXICON.soft and not _PERSONS.isdisjoint(words):
        found.add("PERSON")
    if "shades" in words and found & {"HAIR", "EYE"}:
        found = (found - {"EYEWEAR"}) | {"COLOR"}
    if "straight" in words and "HAIR" in found:
        found.add("TEXTURE")
    if not _WHICH.isdisjoint(words) and _WHETHER.search(text) is None:
        found.add("WHICH")
    return frozenset(found)


_PERSONS = frozenset(
    f"person he she him her they them individual subject sitter someone one {_LEXICON.words['MAN']}"
    f" {_LEXICON.words['CHILD']}".split()
)
_WHICH, _WHETHER = frozenset({"what", "which", "how"}), re.compile(r"\bwhether\b|\bif (?!you|any|so|possible)")
_SOMEBODY = f"(?:{_LEXICON.words['MAN']} {_LEXICON.words['CHILD']})".replace(" ", "|")
_SAID_TO_BE = re.compile(
    rf"\b(?:a|an|as|sure|he or|underage|old) {_SOMEBODY}\b|\b{_SOMEBODY} (?:or|and|vs|versus)\b|\bhe or she\b|\b(?:fe)?male\b|\badult\b"
)
_OWNED = re.compile(
    rf"\b(?:have|has|having|had|with|wants?|loves?|needs?|likes|meet|met|for) (?:a|an|any) {_SOMEBODY}\b"
)


def _predicated(text: str) -> bool:
    """Whether somebody is said to be a man, a child; not whether somebody has one, nor what one does."""
    return (text.count(" ") < 2 or _SAID_TO_BE.search(text) is not None) and _OWNED.search(text) is None


def _plain(text: str) -> str | None:
    """Plain lower-case words of an English text; None for other letters, too many words, or none."""
    text = unicodedata.normalize("NFKC", text[:_MAX_CHARS])
    if any(char.isalpha() and not char.isascii() for char in text):
        return None
    plain = normal(text)
    return plain if plain and plain.count(" ") < MAX_WORDS else None


def _negated(plain: str) -> bool:
    return _NEGATION.search(_NO_NEGATION.sub(" ", plain)) is not None


def _option(question: Question, plain: str, words: Sequence[str]) -> str | None:
    """The value of the one option that a yes/no question is about."""
    options = _LEXICON.options.get(question.item)
    if question.form != "choice" or not options or " or " in plain or not _YES_NO.match(plain):
        return None
    own = set(words)
    named = {value for value, said in options.items() if not own.isdisjoint(said)}
    if question.item == "hair_color" and own & {"dark", "light", "darker", "lighter"}:
        named = {"Dark_Brown_Hair"} if named == {"Brown_Hair"} and "dark" in own else set()
    if question.item == "beard" and "full" in own:
        named = {"Full_Beard"}
    value = named.pop() if len(named) == 1 else None
    return value if any(option.value == value for option in question.options) else None


def _asked_of_you(words: Sequence[str], place: int) -> bool:
    """Whether a `you` is the one who is asked ("can you tell"), not the one who is asked about ("how old are you")."""
    after = words[place + 1] if place + 1 < len(words) else ""
    before = words[place - 1] if place else ""
    return after in _LEXICON.asked or before == "thank" or (before in ("would", "do") and after == "")


@cache
def _content(word: str) -> str:
    """What a word means to a comparison by words: itself without the mark of the plural; nothing for a plain one."""
    notions = _LEXICON.notions.get(word)
    if notions is not None and (not notions or (notions <= _LEXICON.soft and word not in ("bushy", "full"))):
        return ""
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _rare_words(words: Iterable[str]) -> frozenset[str]:
    return frozenset(filter(None, map(_content, words)))
