"""What a model says to us of all that it writes: not what it thinks aloud, nor the wrapping of its answer."""

from __future__ import annotations

import re
from itertools import pairwise

_THINKS = r"think(?:ing)?|thoughts?|reason(?:ing)?|reflection|analysis|scratch_?pad"
_END = re.compile(rf"^.*[<◁\[]/(?:{_THINKS})[>▷\]]", re.DOTALL | re.IGNORECASE)
_OPEN = re.compile(rf"[<◁\[](?:{_THINKS})[>▷\]].*$", re.DOTALL | re.IGNORECASE)
_ANSWER = re.compile(r"<(answer|output|response)>(.*?)(?:</\1>|$)", re.DOTALL | re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")
_LATEX = re.compile(r"\\(?:text|math)\w*\s*\{([^{}]*)\}")
_MARGIN = re.compile(r"[ (]{0,3}(?:±|\+/-) ?\d+(?: years?)?\)?")
_CHANNEL = re.compile(r"^.*<\|channel\|>\s*final\s*<\|message\|>", re.DOTALL)
_TOKEN = re.compile(r"<\|[^|<>]{1,40}\|>")


def spoken(text: str) -> str:
    """The text behind its reasoning (`<think>...</think>`, which may begin in the prompt, or never end); of what has an
    answer marked in it (`<answer>`, `\\boxed{}`) all that is marked."""
    text = _OPEN.sub("", _END.sub("", _TOKEN.sub(" ", _CHANNEL.sub("", text))))
    text = _MARGIN.sub("", _LATEX.sub(r"\1", text)).replace("。", ". ")
    for marked in (_ANSWER, _BOXED):
        if found := marked.findall(text):
            text = ". ".join(dict.fromkeys(one if isinstance(one, str) else one[1] for one in found))
    text = text.strip()
    if text.startswith("```") and text.endswith("```"):
        kind, _, inside = text[3:-3].partition("\n")
        text = inside.strip() if kind.strip().isalnum() or not kind.strip() else text
    return text


_FINAL = re.compile(
    r"\b(?:final|ultimate) (?:answer|choice|decision|verdict|conclusion|estimate|guess)\W{0,4}"
    r"(?:\s*(?:is|would be|should be|=))?\W*(?=\w)",
    re.IGNORECASE,
)
_SO = "so|therefore|thus|hence"
_CHOSEN = (
    r"(?:(?:i(?:['’]m| am) )?going with|i(?:['’]m| am) (?:choosing|picking|selecting)"
    r"|i(?:['’](?:d|ll)| would| will)? (?:go with|choose|pick|select|answer))\b"
)
_TORN = re.compile(
    r"\b(?:could|might|or|either|maybe|perhaps|possibly|between|unsure|not sure|unclear|hard|difficult|cannot tell"
    r"|can['’]t tell|torn|both)\b",
    re.IGNORECASE,
)
_CONCLUDED = re.compile(
    rf"(?:^|[.,;:!\n])[^\w\n]{{0,9}}(?:(?:{_SO}|and|in conclusion|overall)\W{{1,3}}){{0,3}}"
    r"(?:(?:the|my) (?:(?:most )?(?:correct|right|best|closest|likely|appropriate|suitable|single) ){0,2}"
    r"(?:answer|choice|option|match|fit|guess|estimate|(?:actual|true) colou?r)\W{0,4}\s*(?:is|would be|should be|:)"
    r"|(?<=\n)\W{0,9}(?:answer|result|conclusion|(?:estimated )?age|estimate)\W{0,3}:"
    r"|(?<=[.\n])\W{0,9}(?:correct answer|best (?:single )?(?:estimate|guess|match)):"
    rf"|{_CHOSEN}"
    r"|(?:that|which) leaves(?: us with| only)?\b"
    r"|if i (?:have|had) to (?:pick|choose|guess|say|give)[^.,:;\n]{0,30}[,:]"
    rf")\W*(?=\w)|(?:→|[-=]>|[.;\n]\s{{0,9}}(?:{_SO})\b)\W{{0,9}}(?=\w{{1,20}}\W{{0,9}}\Z)",
    re.IGNORECASE,
)
_OPEN_YET = re.compile(
    r"(?:\b(?:no|not|without|before|until|if|unless|when|whether|never|unable|cannot|wrong|doubt|hard)\b|n't\b)"
    r"[^.!?\n]*\Z",
    re.IGNORECASE,
)


_TAKEN_BACK = re.compile(
    r"^.*\b(?:wait|hold on|looking again|second thoughts?"
    r"|i (?:first|initially|originally) (?:thought|leaned|considered|guessed)\b[^.!?\n]*\bbut)\b",
    re.IGNORECASE | re.DOTALL,
)
_SENTENCE = 300  # characters, of which none is longer


def last_word(text: str) -> str:
    """What stands behind the last "final answer" of a text, where it has one and does not take it back; else the text.
    "That is my final answer." has nothing behind it, and stands for what is before."""
    found = list(_FINAL.finditer(text))
    return text if not found or _open_yet(text[: found[-1].start()]) else text[found[-1].end() :]


def earlier_words(text: str) -> list[str]:
    """What stands behind each but the last "final answer" of a text, up to the next."""
    found = list(_FINAL.finditer(text))
    return [text[one.end() : following.start()] for one, following in pairwise(found)]


def concluded(text: str) -> tuple[str, str] | None:
    """What stands before and behind the last "so the answer is" of a text; None when it has none."""
    found = list(_CONCLUDED.finditer(text))
    if not found or _open_yet(before := text[: found[-1].start() + 1]):
        return None
    if re.search(_CHOSEN, found[-1].group(), re.IGNORECASE) and _TORN.search(before):
        return None
    return _TAKEN_BACK.sub("", before), text[found[-1].end() :]


def _open_yet(before: str) -> bool:
    return _OPEN_YET.search(before[-_SENTENCE:]) is not None


# Words that say nothing of the face: where an answer is taken from, that it is one, and politeness.
_PICTURE = r"(?:pictures?|images?|photos?|photographs?|portraits?|pic)"
IN_PICTURE = (
    rf"(?:(?:shown|seen|depicted|pictured) )?(?:in|from|on) (?:the|this|your) (?:(?:given|provided) )?{_PICTURE}"
)
"""Pattern of where something is to be seen, in normalised words."""

LEADING = (
    "so|therefore|thus|hence|i|m|would|d|will|must|say|think|believe|guess|estimate|conclude|choose|pick|select|go with"
    "|answer|option|choice|response|it|that|this|the|my|best|correct|right|(?:most )?likely|probably|final|short"
    "|definitely|clearly|absolutely|lean(?:ing)? towards?|match|fit|closest"
    "|certainly|is|be|should be|,|:"
)
"""Pattern of the words that lead up to an answer, in normalised words."""

_SOURCE = (
    rf"(?:(?:the|this|that|these|your|my|what|i|is|can|visual|visible|given|provided|available|facial|shown|above) )*"
    rf"(?:see|{_PICTURE}|features?|face|appearance|characteristics|information|evidence|details?|cues?|observations?"
    rf"|analysis|options|choices)(?: (?:provided|shown|given|above|visible|present|available))?(?: {IN_PICTURE})?"
    r"(?: alone)?"
)
_ASIDE = re.compile(
    rf"(?:(?:^|(?<=[.,:] ))(?:(?:looking (?:closely |carefully )?at|judging (?:by|from)|going by|according to|from"
    rf"|considering|given|after (?:looking at|examining)|among|out of|of) {_SOURCE}|{IN_PICTURE})"
    rf"|based (?:up)?on {_SOURCE}|as (?:can be seen|is visible|seen|shown) {IN_PICTURE})(?= |$)(?: ,)?"
    rf"|(?<! is)(?<! are)(?<! not) (?:{IN_PICTURE}|of (?:the|this) (?:person|individual|subject)(?: {IN_PICTURE})?)"
    rf"(?= (?:is|are|has|have|looks?|appears?|seems?|shows?|wears?|[.,:])(?: |$)|$)"
)
_HIGH = r"(?:0?\.[89]\d*|1\.0+|[89]\d(?:\.\d+)?|100)"
_POLITE = re.compile(
    r"(?:^|(?<=[.!] ))(?:sure|certainly|of course|okay|ok|great question|well)(?= [.,:])(?: [.,:])*"
    r"|(?:^|(?<=[.!] ))(?:please )?(?:let me know|feel free|(?:i )?hope (?:this|that)|here is (?:the|my)"
    r" (?:answer|analysis))\b[^.:]*"
    rf"|(?:^|(?<= ))(?:my |with )?(?:confidence|certainty)(?: level| score)?(?: is)?(?: :)? (?:high|{_HIGH})(?= |$)"
    rf"|(?<= ){_HIGH} (?:confident|sure|certain)(?= |$)"
    r"| , i (?:would say|think|believe|guess)(?= [.]|$)"
)


def without_asides(words: str) -> str:
    """Normalised words without those that say where the answer is taken from ("based on the picture"), and without
    politeness."""
    return _POLITE.sub(" ", _ASIDE.sub(" ", words))
