"""A question read word by word: which notions its words stand for, and how many words are about something else."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Container, Sequence
from dataclasses import dataclass

from facemllm.serve.asked.lexicon import LEXICON
from facemllm.tasks.paraphrases import normal

MAX_WORDS = 60
"""Longer texts are no question about one item."""
_MAX_CHARS = 2000
_NEGATION = re.compile(
    r"\b(?:not|no|non|never|without|isnt|arent|doesnt|dont|hasnt|havent|wasnt|didnt|cant|lacks?|lacking|hatless"
    r"|missing|nobody|nothing|nowhere|neither|nor|absent|absence|free of|clear of|devoid of|bare ?head(?:ed)?"
    r"|beardless|hairless|unadorned|false|wrong|untrue|incorrect|mistaken|fail(?:s|ed|ing)?|other than|anything but"
    r"|anything else|instead of|rather than|except|lies?|lied|lying|refus(?:e|es|ed|ing) to|deny|denies|denied"
    r"|doubt(?:s|ed|ful)?|unlikely|impossible|hardly|barely|gone|removed|took off|taken off"
    r"|forehead (?:is )?(?:\w+ )?(?:bare|exposed|uncovered|visible|clear|seen)"
    r"|(?:bare|exposed|uncovered|clear|see (?:the|his|her|their)) forehead)\b"
)
_NO_NEGATION = re.compile(
    r"\b(?:yes or no|yes no|no or yes|or no\w*(?: \w+)?|or without|whether or not|if not|no \w+(?: \w+)* or \w+"
    r"|i (?:am not|do not|can ?not|could not|did not|have no)|no idea|not sure)\b"
)
"""Where a negation denies nothing of the face."""
_YES_NO = re.compile(
    r"(?:(?:please|so|and|ok|okay|hey|hi|well) )*(?:is|are|am|was|were|does|do|did|has|have|would|isnt|arent|doesnt|can"
    r"|could)\b(?!.*\bor\b)"
)
_MEDIUM = LEXICON.words["MEDIUM"].replace(" ", "|")
_THE = "(?:(?:the|this|that|these|those|my|our|a|an|your|attached|provided|uploaded|following|whole|current|given) )*"
_BEFORE = "in|from|on|at|by|for|inside|within|with|of|see|using|given|person|man|woman|based on"
_IN_PICTURE = re.compile(
    rf"\b(?:{_BEFORE}) {_THE}(?:{_MEDIUM})\b"
    rf"|^{_THE}(?:{_MEDIUM})\b(?! (?:is|was|are)\b)|\b{_THE}(?:{_MEDIUM})(?: is)? of (?=an? )"
    rf"|\b(?:does|do|did|can|could|whether|if|that) {_THE}(?:{_MEDIUM})"
    r"(?= (?:show|contain|depict|feature|have|shows|convey|express|reveal|suggest|present|radiate|give)\b)"
)
"""The picture as the place where something is seen, which says nothing."""
_ABOUT_PICTURE = re.compile(
    r"\b(?:age|colors?|tone|hue|description|caption|summary|shade|rotation|turn|tilt|angle|portrayal|sketch)"
    rf" (?:of|for|to) {_THE}(?:{_MEDIUM})\b|\b(?:describe|caption|summari[sz]e|portray|sketch) "
)
_PURPOSE = re.compile(
    r"\bfor (?:\w+ ){0,3}?(?:reports?|forms?|records?|files?|notes?|survey|study|paperwork|id|application|documentation"
    r"|profile|database|dataset|research|project|homework|article|audit|log|system|spreadsheet|table|purposes|reference"
    r"|badge|catalogue?|archive|stats|statistics|website|site|blog|page|newspaper|magazine|museum|exhibition|readers?|users?|album|brochure"
    r"|listing|feed|post)\b"
)
_PERSONS = frozenset(
    f"person he she him her you they them individual subject sitter someone one {LEXICON.words['MAN']}"
    f" {LEXICON.words['CHILD']}".split()
)
_SOMEBODYS = _PERSONS - {"you", "one", "they", "them"} | {"his", "their", "hers", "face"}
_OF_FACES = frozenset(["MAN", "FACE"])
_SOMEBODY = f"(?:{LEXICON.words['MAN']} {LEXICON.words['CHILD']})".replace(" ", "|")
_SAID_TO_BE = re.compile(
    rf"\b(?:a|an|as|sure|he or|underage|old) ({_SOMEBODY})\b"
    rf"|\b({_SOMEBODY}) (?:or|and|vs|versus) (?:an? )?({_SOMEBODY})\b"
    r"|\b((?:fe)?male|adult)\b"
)
_WORN_SHADES = re.compile(r"\b(?:behind|by|in|with|under|through|wear\w*) (?:\w+ )?shades\b")
_OWNED = re.compile(
    r"\b(?:have|has|having|had|with|wants?|loves?|needs?|likes|meet|met|for"
    rf"|(?!showing|depicting|seeing|being|viewing)\w+ing) (?:a|an|any) {_SOMEBODY}\b"
)
_WHICH, _WHETHER = frozenset({"what", "which", "how"}), re.compile(r"\bwhether\b|\bif (?!you|any|so|possible)")
_YOU = frozenset({"you", "your", "u", "yours", "yourself"})
_POSE = frozenset(["TURN", "FACING", "LOOK", "HEAD", "FACE", "TILT", "YAW", "ROLL", "DIRECTION", "NOSE"])
_FRAGMENT = 2
"""Of so few words a question needs no "is it": "man or woman?"."""
_ASIDE, _FOREIGN, _FAR = 0.25, 1.0, 2.0
"""How much a word counts that is not known: one that tells how or what is done, one that names a thing (or is known to
tell what is done with things), and one that is known to be, or is written as, the name of something else."""
_OF_SOMEBODY = 0.5
"""What the first two count where the question is about somebody."""
_NAMES_THING = re.compile(
    r"\b(?:the|an?|this|that|these|those|my|our|your|his|her|their|its|of|some|any|no|in|on|at|with|for|s|many|from|by"
    r"|under|behind|near|to|which|what|\d+)(?: \w+)?$"
)
"""What stands before a word that names a thing."""
_THINGS = {"HAIR", "HAIRDO", "EYE", "BEARD", "EYEWEAR", "FRINGE", "HAT", "EARRING", "LIPSTICK", "EXPR", "FACE", "HEAD"}
_THINGS |= {"COLOR", "HUE", "HAIRHUE", "EYEHUE", "BLOND", "AGE", "GENDER", "MAN", "CHILD", "NOSE", "LIP"}
_THINGS |= {"DESCRIBE", "CAPTION", "MEDIUM"}
_NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]{2,}\b")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z][a-z])")


@dataclass(frozen=True)
class Reading:
    """A question's plain words, those that count, the notions they stand for, and how much of it is about something
    else (1 for a thing)."""

    plain: str
    words: tuple[str, ...]
    notions: frozenset[str]
    strange: float


def plain_words(text: str) -> str | None:
    """Plain lower-case words of an English text; None for other letters, too many words, or none."""
    if len(text) > _MAX_CHARS:
        return None
    text = unicodedata.normalize("NFKC", text)
    if any(char.isalpha() and not char.isascii() for char in text):
        return None
    plain = normal(_CAMEL.sub(" ", text))
    return plain if plain and plain.count(" ") < MAX_WORDS else None


def written_names(text: str) -> frozenset[str]:
    """Words that are written as names, with a capital though no sentence begins with them, in lower case."""
    words = text.split()
    if 2 * sum(word[0].isupper() for word in words) > len(words):
        return frozenset()
    names = [name.lower() for name in _NAME.findall(text)]
    return frozenset([*names, *(f"{name}s" for name in names)])


def read(plain: str, known: Container[str] = (), names: Container[str] = ()) -> Reading:
    """Read plain words; those in `known` are not strange, whatever they mean, and those in `names` are."""
    text = " ".join(_spelt(word, known) for word in plain.split())
    text = text if _ABOUT_PICTURE.search(text) else _IN_PICTURE.sub(" ", text)
    text = " ".join(_PURPOSE.sub(" ", text).split())
    for pattern, word in LEXICON.phrases:
        text = pattern.sub(word, text)
    words = text.split()
    notions: set[str] = set()
    kept: list[str] = []
    strange = 0.0
    far = _FAR * any(word in names and word not in words for word in plain.split())  # a phrase has swallowed it
    for place, word in enumerate(words):
        if word in _YOU:
            strange += 0.0 if _is_asked(words, place) else _FOREIGN
            continue
        kept.append(word)
        if (found := LEXICON.notions.get(word)) is not None:
            notions |= found
        elif word in LEXICON.elsewhere or word in names:
            far += _FAR
        elif word in LEXICON.doings:
            strange += _FOREIGN
        elif word not in known and not word.isdigit() and not (word.endswith("ly") and len(word) > len("only")):
            strange += _FOREIGN if _names_thing(words, place) else _ASIDE
    if not _SOMEBODYS.isdisjoint(words) or notions & _OF_FACES:
        strange *= _OF_SOMEBODY
    return Reading(plain, tuple(kept), _settled(notions, kept, text), strange + far)


def _names_thing(words: Sequence[str], place: int) -> bool:
    """Whether an unknown word names a thing of its own ("the kettle"), by where it stands; not what tells more about a
    known one ("jet black hair") nor what somebody does."""
    after = words[place + 1] if place + 1 < len(words) else ""
    if LEXICON.notions.get(after, frozenset()) & _THINGS:
        return False
    return len(words) <= _FRAGMENT or _NAMES_THING.search(" ".join(words[max(place - 2, 0) : place])) is not None


def is_negated(plain: str) -> bool:
    """Whether a question holds a negation that a bare yes would leave in doubt."""
    return _NEGATION.search(_NO_NEGATION.sub(" ", plain)) is not None


def is_yes_no(plain: str) -> bool:
    """Whether a question is answered by yes or no."""
    return _YES_NO.match(plain) is not None


def _spelt(word: str, known: Container[str]) -> str:
    """The word, or the one it is a slip of the finger for."""
    if word in LEXICON.notions or word in known:
        return word
    if word[-1] == "s" and (word[:-1] in LEXICON.notions or word[:-1] in LEXICON.elsewhere):  # "the mans hair"
        return word[:-1]
    return word if (meant := LEXICON.meant(word)) is None else normal(meant)


def _settled(found: set[str], words: Sequence[str], text: str) -> frozenset[str]:
    """The notions that are meant. Persons ("the girl's hair") are asked for only where nothing else is, and somebody is
    said to be one; shades of hair are no sunglasses, straight hair is no direction."""
    looks = bool(found & {"DESCRIBE", "LOOKLIKE"})
    if looks or found - LEXICON.soft - LEXICON.persons:
        found = found - LEXICON.persons
    elif found >= LEXICON.persons or not text.count(" ") < _FRAGMENT:
        found = (found - LEXICON.persons) | _predicated(text)
    if looks and not found - LEXICON.soft and not _PERSONS.isdisjoint(words):
        found = found | {"PERSON"}
    if "shades" in words and found & {"HAIR", "EYE"} and _WORN_SHADES.search(text) is None:
        found = (found - {"EYEWEAR"}) | {"COLOR"}
    if words and words[-1] == "right" and not found & _POSE:  # "she wears a hat, right?"
        found = found - {"SIDE"}
    if "straight" in words and "HAIR" in found:
        found = found | {"TEXTURE"}
    if not _WHICH.isdisjoint(words) and _WHETHER.search(text) is None:
        found = found | {"WHICH"}
    return frozenset(found)


def _predicated(text: str) -> frozenset[str]:
    """What somebody is said to be, a man or a child; not what somebody has, nor who does something."""
    if _OWNED.search(text) is not None:
        return frozenset()
    said = {word for found in _SAID_TO_BE.finditer(text) for word in found.groups() if word}
    return frozenset().union(*(LEXICON.notions[word] & LEXICON.persons for word in said))


def _is_asked(words: Sequence[str], place: int) -> bool:
    """Whether a `you` is the one who is asked ("can you tell"), not the one who is asked about ("how old are you")."""
    after = words[place + 1] if place + 1 < len(words) else ""
    before = words[place - 1] if place else ""
    if after in LEXICON.asked or after == "happen" or before == "thank":
        return True
    if before in ("can", "could", "would", "will") and after and after not in ("be", "feel", "have", "look", "like"):
        return True
    return (before in ("would", "will") and after == "be") or (before in ("would", "do", "can", "could") and not after)
