"""What a text says once disguises are taken off: look-alike letters, invisible characters, digits for letters, marks or
spaces between letters, encodings. Nothing is decided here: each reading of a text is given as plain words."""

from __future__ import annotations

import base64
import binascii
import codecs
import html
import re
import unicodedata
from collections.abc import Iterator
from urllib.parse import unquote

_DEEP = 2
"""Encodings within encodings that are undone."""

_ALIKE = {
    "a": "аᴀαɑ",
    "b": "ЬвВβ",
    "c": "сϲⅽ",
    "d": "ԁⅾ",
    "e": "еёεє",
    "f": "ғ",
    "g": "ɡց",
    "h": "һнհᏂ",
    "i": "іıɩιɪї",
    "j": "јϳ",
    "k": "кκᴋ",
    "l": "ⅼӏ",
    "m": "мⅿʍ",
    "n": "пηո",
    "o": "оοσօø",
    "p": "рρ",
    "q": "ԛ",
    "r": "гᴦɾ",
    "s": "ѕꜱ",
    "t": "тτᴛ",
    "u": "υս",
    "v": "νѵⅴ",
    "w": "ԝωшѡᏔꮃ",
    "x": "хχⅹ",
    "y": "уγүყ",
    "z": "ᴢʐ",
}
"""Letter -> those of other scripts that look like it, most of them Cyrillic or Greek."""
_FROM_ALIKE = str.maketrans({char: letter for letter, chars in _ALIKE.items() for char in chars})
_DIGITS = str.maketrans("01345789@$€£!|+", "oieastbgaseliit")
_TO_LATIN = {"ı": "i", "ł": "l", "ø": "o", "đ": "d", "æ": "ae", "œ": "oe", "ß": "ss"}
_VOWEL_MARKS = re.compile("[\u064b-\u0652\u0640\u0670]")
_ENCODED = re.compile(r"(?<![A-Za-z0-9+/=_-])[A-Za-z0-9+/_-]{12,}={0,2}")
_HEX = re.compile(r"(?<![0-9a-fA-F])(?:[0-9a-fA-F]{2}[ :]?){8,}")
_APART = re.compile(r"(?<!\w)(?:\w[\W_]{1,3}){3,}\w(?!\w)")
_INSIDE = re.compile(r"(?<=[^\W\d_])[^\w\s'’]+(?=[^\W\d_])|(?<=[^\W\d_])_+(?=[^\W\d_])")
_LEET = re.compile(r"[0-9@$€£!|+]")
_JOINTS = re.compile(r"[_.\-]+|(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[^\W\d_])(?=\d)|(?<=\d)(?=[^\W\d_])")
_CAMEL = re.compile(r"\b[A-Za-z][a-z]+(?:[A-Z][a-z]+)+\b")
_CLAUSE, _MOST_CLAUSES = re.compile(r"[;:!?\n]+(?=\s*\w)|[.,](?=\s+\w)"), 12
_COMMON = {"the", "a", "an", "is", "are", "does", "do", "what", "which", "who", "how", "of", "this", "that"}
_COMMON |= {"in", "on", "to", "and", "it", "tell", "me"}
"""English that is not back to front holds one of these."""


def readings(text: str) -> Iterator[tuple[str, str]]:
    """Readings of a text, the plainest first: words in lower case with single spaces, and
    the same without spaces where letters stood apart, else nothing."""
    given: set[tuple[str, str]] = set()
    for depth, layer in _layers(text, _DEEP):
        clear = _clear(layer)
        for written in _written(clear):
            one = plain(written)
            apart = _APART.search(written) is not None or _INSIDE.search(written) is not None or depth > 0
            found = one, one.replace(" ", "") if apart else ""
            if found not in given and one:
                given.add(found)
                yield found


def apart(name: str) -> str:
    """The words of a name in code: "isGay2" and "is_Gay_2" as "is Gay 2"."""
    return " ".join(_JOINTS.sub(" ", name).split())


def plain(text: str) -> str:
    """Lower-case words of any script; Latin letters without accents, a possessive s as a word of its own."""
    text = "".join(map(_base, unicodedata.normalize("NFKC", text).casefold()))
    text = _VOWEL_MARKS.sub("", text)
    text = re.sub(r"(?<=\w)['’`´]s\b", " s", text)
    text = re.sub(r"n['’`´]t\b", "n t", text)
    kept = (char if char.isalnum() or unicodedata.category(char)[0] == "M" else " " for char in text)
    return " ".join("".join(kept).split())


def _base(char: str) -> str:
    if char.isascii():
        return char
    first = unicodedata.normalize("NFD", char)[0]
    return first if first.isascii() else _TO_LATIN.get(char, char)


def _clear(text: str) -> str:
    """Without characters that are not to be seen, in the usual form of its letters."""
    text = unicodedata.normalize("NFKC", text)
    if text.isascii():
        return text
    shown = "".join(
        char for char in text if unicodedata.category(char) not in ("Cf", "Cc", "Co", "Cn") or char in "\n\t"
    )
    return re.sub("[\u0300-\u036f\u0488\u0489\u20d0-\u20f0\ufe00-\ufe0f]", "", unicodedata.normalize("NFC", shown))


def _written(text: str) -> Iterator[str]:
    """The text, and what it is when letters and marks are taken for the letters they look like."""
    yield text
    if "\n" in text:  # within a word, too
        yield text.replace("\n", "")
    if len(clauses := _CLAUSE.split(text)) > 1:
        yield from clauses[:_MOST_CLAUSES]
    if _CAMEL.search(text):
        yield _CAMEL.sub(lambda name: apart(name[0]), text)
    alike = text if text.isascii() else text.casefold().translate(_FROM_ALIKE)
    if alike != text.casefold():
        yield alike
    if _LEET.search(alike):
        undone = " ".join(map(_unmasked, alike.rstrip("?!. ").split()))
        yield undone
        alike = undone
    if _INSIDE.search(alike):
        yield _INSIDE.sub("", alike)
    if _APART.search(alike):
        yield _APART.sub(lambda run: re.sub(r"[\W_]+", "", run[0]), alike)


def _unmasked(word: str) -> str:
    """A word with letters for its digits and signs, if it has any letter."""
    return word.translate(_DIGITS) if any(map(str.isalpha, word)) else word


def _layers(text: str, deep: int) -> Iterator[tuple[int, str]]:
    """The text and what is encoded in it: base64, hexadecimal, percent and HTML escapes, rot13, back to front."""
    yield _DEEP - deep, text
    if not deep:
        return
    inner: list[str] = []
    if "%" in text or "&" in text or "\\" in text:
        inner.append(html.unescape(unquote(text)))
        if "\\u" in text or "\\x" in text:
            inner.append(re.sub(r"\\[ux]([0-9a-fA-F]{4}|[0-9a-fA-F]{2})", lambda m: chr(int(m[1], 16)), text))
    inner += (said for found in _ENCODED.findall(text) if (said := _decoded(found)))
    inner += (said for found in _HEX.findall(text) if (said := _hexed(found)))
    if text.isascii() and _COMMON.isdisjoint(text.lower().split()):
        inner.append(text[::-1])
        inner.append(codecs.encode(text, "rot13"))
    for one in inner:
        if one != text:
            yield from ((depth, found) for depth, found in _layers(one, deep - 1 if len(inner) < 12 else 0))


def _decoded(text: str) -> str | None:
    if not any(char.isupper() for char in text) and not any(char.isdigit() for char in text):
        return None
    bare = text.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        data = base64.b64decode(bare + "=" * (-len(bare) % 4))
    except (binascii.Error, ValueError):
        return None
    return _words(data)


def _hexed(text: str) -> str | None:
    digits = re.sub(r"[ :]", "", text)
    return _words(bytes.fromhex(digits[: len(digits) // 2 * 2]))


def _words(data: bytes) -> str | None:
    try:
        said = data.decode()
    except UnicodeDecodeError:
        return None
    return said if said.isprintable() or all(c.isprintable() or c.isspace() for c in said) else None
