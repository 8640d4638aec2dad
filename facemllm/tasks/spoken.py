"""What a model says to us of all that it writes: not what it thinks aloud, nor the wrapping of its answer."""

from __future__ import annotations

import re

_THINKS = r"think(?:ing)?|thoughts?|reason(?:ing)?|reflection|analysis|scratch_?pad"
_THOUGHT = re.compile(rf"[<◁\[]({_THINKS})[>▷\]].*?[<◁\[]/\1[>▷\]]", re.DOTALL | re.IGNORECASE)
_END = re.compile(rf"^.*[<◁\[]/(?:{_THINKS})[>▷\]]", re.DOTALL | re.IGNORECASE)  # its beginning stood in the prompt
_OPEN = re.compile(rf"[<◁\[](?:{_THINKS})[>▷\]].*$", re.DOTALL | re.IGNORECASE)
_ANSWER = re.compile(r"<(answer|output|response)>(.*?)(?:</\1>|$)", re.DOTALL | re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\s*\{\s*(?:\\text\w*\s*\{)?([^{}]*)\}")
_FENCE = re.compile(r"^\s*```\w*\s*\n(.*?)\n\s*```\s*$", re.DOTALL)
_CHANNEL = re.compile(r"^.*<\|channel\|>\s*final\s*<\|message\|>", re.DOTALL)
_TOKEN = re.compile(r"<\|[^|<>]{1,40}\|>")


def spoken(text: str) -> str:
    """The text without reasoning (`<think>...</think>`, also one that was never opened, or never ended), and of what
    has an answer marked in it (`<answer>`, `\\boxed{}`) the last one."""
    text = _TOKEN.sub(" ", _CHANNEL.sub("", text))
    if re.search(r"[<◁\[]/?(?:think|thought|reason|reflection|analysis|scratch)", text, re.IGNORECASE):
        text = _OPEN.sub("", _END.sub("", _THOUGHT.sub(" ", text)))
    for marked in (_ANSWER, _BOXED):
        if found := marked.findall(text):
            text = found[-1] if isinstance(found[-1], str) else found[-1][1]
    if fenced := _FENCE.match(text):
        text = fenced[1]
    return text.strip()


# What a text calls its last word. "That is my final answer." has nothing behind it, and stands for what is before.
_FINAL = re.compile(
    r"\b(?:final|ultimate) (?:answer|choice|decision|verdict|conclusion|estimate|guess)\W{0,4}"
    r"(?:\s*(?:is|would be|should be|=))?\W*(?=\S)",
    re.IGNORECASE,
)
_NOT_YET = re.compile(r"(?:\b(?:no|not|without|before|until|if|never|unable|cannot)\b|n't\b)[^.!?\n]*$", re.IGNORECASE)


def last_word(text: str) -> str | None:
    """What stands behind the last "final answer" of a text; None when it has none, or one that is taken back."""
    found = list(_FINAL.finditer(text))
    if not found or _NOT_YET.search(text[: found[-1].start()]):
        return None
    return text[found[-1].end() :] or None
