"""Paraphrases of a question for training alone: those of a grammar, which makes many natural wordings from a few
patterns, and those of `wordings`, written one by one.

A pattern holds alternatives, `[the|this] person`, `[please ]`. A `Topic` says by patterns how a thing is asked about:
outright ("what color is the hair"), after words that ask to be told ("what color the hair is"), and by name ("the hair
color"). Each is put behind openings, requests and endings, then written as people type: with or without a closing mark
or a capital, in British spelling, contracted, now and then with a slip of the finger. Wordings kept for evaluation are
left out, and so is whatever contains one.

Every choice is a hash of the words alone, with left and right taken for one: the paraphrases of a mirrored question are
the mirrored paraphrases.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from facemllm.core.digests import draw, drawn

LIMIT = 160
"""Most paraphrases of an item, if its topic says no other."""
_CONTAINED = 4
"""A wording of so many words must not be part of a paraphrase either; "eye color" is part of every question of it."""
_TYPOS = 16
"""One wording in so many has a slip of the finger."""
_SPARED = ("right", "wearing")
"""Words that are never mistyped: a side has to stay one that a mirror swaps, and "wearring" holds an earring."""

_OPENINGS = (
    *("in this picture, ", "in the photo, ", "looking at the photo, ", "looking at this face, ", "from the picture, "),
    *("please, ", "quick question: ", "question: ", "hi, ", "ok, ", "so ", "and ", "judging by the face, "),
)
_ENDINGS = (", please", " here", ", do you think", ", would you say", ", in your opinion", ", if you can tell")
_SHOWN = re.compile(r"\b(?:picture|photo|image|you)\b")
_FEW = 24
"""Fewer questions are put behind several openings each."""
_REQUESTS = (
    *("tell me ", "please tell me ", "can you tell me ", "could you tell me ", "can you say ", "say ", "do you know "),
    *(
        "i would like to know ",
        "i want to know ",
        "could you please say ",
        "would you tell me ",
        "decide ",
        "work out ",
    ),
    *("please say ", "let me know ", "check "),
)
_NAMING = ("name ", "state ", "give ", "please give ", "tell me ", "identify ", "please name ", "report ", "note ")
_ASKING = ("what is ", "can you tell me ", "could you name ", "what would you say is ", "would you tell me ", "")

_BRITISH = {"color": "colour", "colored": "coloured", "mustache": "moustache", "gray": "grey", "eyeglasses": "glasses"}
_CONTRACTED = {
    **{"what is": "what's", "who is": "who's", "where is": "where's", "how is": "how's", "i would": "i'd"},
    **{"is not": "isn't", "does not": "doesn't", "do not": "don't", "cannot": "can't", "are not": "aren't"},
}
_AMERICAN = {british: american for american, british in _BRITISH.items() if american != "eyeglasses"}
_FULL = {short: full for full, short in _CONTRACTED.items()}
_ANY_FULL = re.compile(rf"\b(?:{'|'.join(_CONTRACTED)})\b")
_ANY_SHORT = re.compile(rf"(?<!\S)(?:{'|'.join(_FULL)})(?!\S)")
_ANY_AMERICAN = re.compile(rf"\b(?:{'|'.join(_BRITISH)})\b")
_ANY_BRITISH = re.compile(rf"\b(?:{'|'.join(_AMERICAN)})\b")
_SIDE = re.compile(r"\b(?:left|right)\b")
_INVERTED = (
    (r"(is|are) there (.+)", r"there \1 \2"),
    (r"can (.+) be (\w+)", r"\1 can be \2"),
    (r"does (the picture|the face|the person|this person) (show|have|wear) (.+)", r"\1 \2s \3"),
    (r"do you see (.+)", r"you see \1"),
    (r"is the person (.+)", r"the person is \1"),
)
_WORDS = {
    "picture": "[picture|photo|image]",
    "the person": "[the person|this person]",
    r"which(?! of\b)": "[which|what]",
    "can be seen": "[can be seen|can be made out]",
}


@dataclass(frozen=True, kw_only=True)
class Topic:
    """How a thing is asked about, as patterns in lower case without a closing mark: `direct` questions, `clause`s that
    follow "tell me", and `noun`s with their article. `orders` are whole sentences that ask for no answer in form of a
    question ("describe the face"). `limit` is the most wordings."""

    direct: tuple[str, ...] = ()
    clause: tuple[str, ...] = ()
    noun: tuple[str, ...] = ()
    orders: tuple[str, ...] = ()
    limit: int = LIMIT


def expand(pattern: str) -> list[str]:
    """All texts of a pattern, in order; alternatives do not nest."""
    parts = re.split(r"\[([^\]]*)\]", pattern)
    choices = [part.split("|") if place % 2 else [part] for place, part in enumerate(parts)]
    choices = [[*choice, ""] if place % 2 and len(choice) == 1 else choice for place, choice in enumerate(choices)]
    return [" ".join("".join(found).split()) for found in product(*choices)]


def normal(text: str) -> str:
    """A wording without what does not tell wordings apart: case, marks, British spelling, contractions."""
    words = " ".join(re.sub(r"[^a-z0-9' ]", " ", text.casefold().replace("’", "'")).split())
    words = _ANY_SHORT.sub(lambda short: _FULL[short[0]], words).replace("'", "")
    return _ANY_BRITISH.sub(lambda word: _AMERICAN[word[0]], words)


def paraphrases(templates: Sequence[str], unseen: Iterable[str], topic: Topic | None = None) -> tuple[str, ...]:
    """Wordings of a question beside its `templates`, from its topic or, without one, from the templates' own words; all
    differ, and none is, or contains, one of `unseen`, seen as in a mirror or not."""
    topic = topic or _topic_of(templates)
    kept = _mirrored(unseen)
    groups = [sorted(set(group), key=_rank) for group in _composed(topic)]
    total = sum(map(len, groups))
    found: dict[str, None] = {}
    taken = set(templates)
    for group in groups:
        share = min(len(group), max(1, round(topic.limit * len(group) / total))) if total > topic.limit else len(group)
        for text in group:
            if not share:
                break
            typed = _typed(text)
            if typed not in taken and not _leaks(normal(text), kept) and not _leaks(normal(typed), kept):
                found[typed] = None
                taken.add(typed)
                share -= 1
    return tuple(found)


def admitted(written: Sequence[str], said: Iterable[str], unseen: Iterable[str]) -> tuple[str, ...]:
    """Those of `written`, as they stand, that say neither one another nor any of `said` again; none is, or contains,
    one of `unseen`, seen as in a mirror or not."""
    if not written:  # most items have none, and `normal` of all that is said takes long
        return ()
    taken, kept = {normal(text) for text in said}, _mirrored(unseen)
    found = []
    for text in written:
        if (words := normal(text)) not in taken and not _leaks(words, kept):
            found.append(text)
            taken.add(words)
    return tuple(found)


def _mirrored(texts: Iterable[str]) -> list[str]:
    return [normal(text) for one in texts for text in (one, _swapped(one))]


def _composed(topic: Topic) -> Iterator[list[str]]:
    """The wordings of each kind, the plain ones first; `;` marks what is no question."""
    direct = [text for pattern in topic.direct for text in expand(pattern)]
    count = 1 + _FEW // (len(direct) + 1)
    yield [f"{text}?" for text in direct]
    yield [f"{opening}{text}?" for text in direct for opening in _some(_openings(text), text, count)]
    yield [f"{text}{ending}?" for text in direct if "," not in text for ending in _some(_endings(text), text, count)]
    clauses = [text for pattern in topic.clause for text in expand(pattern)]
    yield [_asked(f"{lead}{text}") for text in clauses for lead in _some(_REQUESTS, text, 4)]
    nouns = [text for pattern in topic.noun for text in expand(pattern)]
    yield [f"{lead}{text}." for text in nouns for lead in _some(_NAMING, text, 3)]
    yield [f"{lead}{text if lead else _bare(text)}?" for text in nouns for lead in _some(_ASKING, text, 3)]
    orders = [text for pattern in topic.orders for text in expand(pattern)]
    yield [f"{text}." for text in orders]
    count = 1 + _FEW // (len(orders) + 1)
    yield [f"{opening}{text}." for text in orders for opening in _some(_openings(text)[:6], text, count)]


def _openings(text: str) -> Sequence[str]:
    return [one for one in _OPENINGS if not (_SHOWN.search(text) and _SHOWN.search(one)) and one[:6] != text[:6]]


def _endings(text: str) -> Sequence[str]:
    return [one for one in _ENDINGS if not (_SHOWN.search(text) and _SHOWN.search(one))]


def _asked(text: str) -> str:
    return f"{text}{'?' if re.match('(can|could|would|do) you ', text) else '.'}"


def _bare(noun: str) -> str:
    return re.sub(r"^(?:the|a|an) ", "", noun)


def _topic_of(templates: Sequence[str]) -> Topic:
    """What the templates alone let one vary: a word for another, and "is there ..." as "whether there is ..."."""
    plain = [text[:1].lower() + text[1:].rstrip("?.") for text in templates]
    patterns = [_varied(text) for text in plain]
    asked = [text.endswith("?") for text in templates]
    clauses = []
    for text, is_question in zip(plain, asked, strict=True):
        for pattern, clause in _INVERTED if is_question else ():
            if re.fullmatch(pattern, text) and not re.search(" (?:not|and) ", text):
                said = re.sub("haves", "has", re.sub(f"^{pattern}$", clause, text))
                clauses.append(f"[whether|if] {_varied(said)}")
    return Topic(
        direct=tuple(pattern for pattern, is_question in zip(patterns, asked, strict=True) if is_question),
        orders=tuple(pattern for pattern, is_question in zip(patterns, asked, strict=True) if not is_question),
        clause=tuple(clauses),
    )


def _varied(text: str) -> str:
    for word, pattern in _WORDS.items():
        text = re.sub(rf"\b{word}\b(?![^\[]*\])", pattern, text, count=1)
    return text


def _typed(text: str) -> str:
    """A wording as somebody types it."""
    mark, text = text[-1], text[:-1]
    spelling, contracted, slip, case, closing = drawn((2, 3, _TYPOS, 3, 4), _sideless(text), "style")
    if spelling:
        text = _ANY_AMERICAN.sub(lambda word: _BRITISH[word[0]], text)
    if contracted:
        text = _ANY_FULL.sub(lambda full: _CONTRACTED[full[0]], text)
    if not slip:
        text = _mistyped(text)
    if case:
        text = re.sub(r"\bi\b", "I", text[:1].upper() + text[1:])
    return text + (mark if closing else "")


def _mistyped(text: str) -> str:
    """The text with two letters of a longer word in wrong order, or one doubled."""
    words = [found for found in re.finditer(r"[a-z]{5,}", text) if found[0] not in _SPARED]
    if not words:
        return text
    word = words[draw(len(words), _sideless(text), "word")]
    place = word.start() + 1 + draw(len(word[0]) - 3, _sideless(text), "place")
    one, other = text[place], text[place + 1]
    slip = other + one if draw(2, _sideless(text), "slip") else one + one + other
    return text[:place] + slip + text[place + 2 :]


def _leaks(words: str, kept: Iterable[str]) -> bool:
    return any(words == one or (one.count(" ") + 1 >= _CONTAINED and f" {one} " in f" {words} ") for one in kept)


def _sideless(text: str) -> str:
    return _SIDE.sub("side", text)


def _swapped(text: str) -> str:
    sides = {"left": "right", "right": "left"}
    return _SIDE.sub(lambda side: sides[side[0]], text.lower())


def _rank(text: str) -> tuple[int, str, str]:
    return draw(2**32, _sideless(text), "rank"), _sideless(text), text


def _some(words: Sequence[str], text: str, count: int) -> list[str]:
    """So many of the words that may stand beside a text, those that follow a drawn one."""
    start = draw(len(words), _sideless(text), "beside")
    return [words[(start + step) % len(words)] for step in range(min(count, len(words)))]
