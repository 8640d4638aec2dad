"""Whether a text names somebody: by a capital within a sentence, or by where a word stands that is none of the words in
which people ask about faces. A name is of no use to a question about a face: what may be one is taken for one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import yaml

from facemllm import tasks
from facemllm.serve.asked.disguises import plain
from facemllm.serve.asked.lexicon import LEXICON
from facemllm.serve.asked.rules import rules

_WORD = re.compile(r"[^\W\d_][\w'’]*")
_ENDS_SENTENCE, _BESIDE = ".!?:;\n-*•", " \t\"'“”‘’«»()[]"
"""What stands before a sentence's first word, and what may stand between."""
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z][a-z])")
_INFLECTIONS = ("s", "es", "ed", "d", "ing", "er", "est", "ly", "ish", "y")
_MOST_OF_NAME = 4
"""Words of a text that is nothing but a name."""
_TITLE, _FOREIGN = 3, 4
"""Least words of a text that is written with capitals throughout, and of one in another language."""


def names_somebody(text: str) -> bool:
    """Whether an English question about a face names a person in it."""
    text = _CAMEL.sub(" ", text)
    words = plain(text).split()
    strange = [_is_strange(word) for word in words]
    if words and all(strange):
        return len(words) <= _MOST_OF_NAME
    if len(words) >= _FOREIGN and 2 * sum(strange) > len(words):
        return False
    return _written_as_name(text) or any(_stands_as_name(words, strange, n) for n, is_ in enumerate(strange) if is_)


def holds_strange(text: str) -> bool:
    """Whether a text, such as the name of a property, holds any word that is none of questions about faces."""
    return any(map(_is_strange, plain(text).split()))


def _written_as_name(text: str) -> bool:
    """Whether a word has a capital though no sentence begins with it."""
    within = [found[0] for found in _WORD.finditer(text) if not _begins(text[: found.start()])]
    within = [word for word in within if len(word) > 1 and not word.isupper()]
    large = [one for word in within if word[0].isupper() for one in plain(word).split()[:1]]
    titled = len(within) >= _TITLE and 2 * len(large) >= len(within)
    return any(_is_strange(word) or (not titled and word in LEXICON.elsewhere | LEXICON.no_slips) for word in large)


def _begins(before: str) -> bool:
    """Whether a sentence begins behind a text."""
    head = before.rstrip(_BESIDE)
    return not head or head[-1] in _ENDS_SENTENCE


def _stands_as_name(words: Sequence[str], strange: Sequence[bool], place: int) -> bool:
    """Whether a strange word stands where a person's name does."""
    before = words[place - 1] if place else ""
    after = words[place + 1] if place + 1 < len(words) else ""
    if after == "s" or before in _sets()["alike"]:
        return True
    if _tells_how(words[place]):
        return False
    if place + 1 < len(words) and strange[place + 1] and not _tells_how(after):
        return True
    if before in _sets()["said_of"]:
        return after in ("", "or", "if", "and", "right", "yes", "no")
    auxiliaries = _sets()["auxiliaries"]
    return before in auxiliaries or (not place and (not after or after in auxiliaries))


def _tells_how(word: str) -> bool:
    """Whether a word ends as adjectives and adverbs do."""
    return word.endswith(tuple(_sets()["endings"]))


@cache
def _sets() -> Mapping[str, frozenset[str]]:
    stored = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return {name: frozenset(words.split()) for name, words in stored.items()}


@cache
def _common() -> frozenset[str]:
    """The words of the lexicon, of nations, and of taught questions and answers."""
    items = [item for name in tasks.all_names() for item in tasks.get(name).items]
    texts = [text for item in items for text in (item.name, *item.templates)]
    texts += [text for item in items for option in item.options for text in (option.text, option.value)]
    taught = plain(" ".join({word for text in texts for word in text.replace("_", " ").split()})).split()
    own = LEXICON.elsewhere | LEXICON.doings | LEXICON.face | LEXICON.no_slips | LEXICON.asked | _sets()["common"]
    return own.union(LEXICON.notions, rules().demonyms, taught)


def _is_strange(word: str) -> bool:
    """Whether a plain word is none of the common ones, inflected or not, nor a slip for one."""
    if len(word) < 2 or not (word.isalpha() and word.isascii()) or word in _common():
        return False
    stems = [word.removesuffix(ending) for ending in _INFLECTIONS if word.endswith(ending)]
    stems += [f"{stem}e" for stem in stems]
    return _sets()["common"].isdisjoint(stems) and LEXICON.face.isdisjoint(stems) and LEXICON.meant(word) is None
