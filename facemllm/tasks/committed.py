"""What an answer commits to, where it says more than that: the fields of an object or a table, the ticked option, the
answer in front of its explanation, and what is left when a concession ("although it could be grey") is taken off."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

_OBJECT = re.compile(r"\{[^{}]*\}")
_ROW = re.compile(r"^[ \t]*\|(.+)\|[ \t]*$", re.MULTILINE)
_NUMBER = re.compile(r"-?[\d.]+ ?%?")
_RULE = re.compile(r"[\s|:-]+")
_BESIDE = re.compile(r"reason|expla|rationale|thought|analysis|evidence|cue|note|comment|confiden|certain|prob|score")
_TICK, _CROSS = re.compile("[✅✓✔☑]"), re.compile("[❌✗✘✖]")


def laid_out(text: str, item: str, names: Callable[[str], bool]) -> str:
    """The text of an answer that is laid out as a JSON object, a table or a ticked list: the field of the item, or of
    the answer, else all fields but reasons and confidences; the one ticked line. Where the fields are options (`names`
    tells whether a cell is one), it is the most probable one of an object, and what stands outside it, or outside the
    table, which may list them in any manner. Any other text as it is."""
    rows = [row.split("|") for row in _ROW.findall(text) if not _RULE.fullmatch(row)]
    objects = _objects(text)
    fields = [field for found in objects for field in found] or _table(rows)
    own = [(key, value) for key, value in fields if _key(item) in _key(key) or "answer" in _key(key).split()]
    outside = (_OBJECT if objects else _ROW).sub("", text).replace("```json", "").replace("```", "").strip()
    ticked = [line for line in text.splitlines() if _TICK.search(line)]
    if len(ticked) == 1 and (_CROSS.search(text) or (rows and not objects and not outside)):
        return ticked[0]
    options = sum(names(key) for key, _ in fields) if objects else 0
    if (options > 1 and not own) or (options and all(_NUMBER.fullmatch(value) for _, value in fields)):
        return f"{_most_probable(fields)}\n{outside}"
    several = len(rows) > 2 or any(len(row) > 2 for row in rows) or all(any(map(names, row)) for row in rows)
    if not own and not objects and several and sum(names(cell) for row in rows for cell in row) > 1:
        return outside
    if fields:
        named = own or [(key, value) for key, value in fields if not _BESIDE.search(_key(key))]
        return ". ".join(f"{_key(key)}: {value}" for key, value in named)
    return text


def _objects(text: str) -> list[list[tuple[str, str]]]:
    objects = []
    for found in _OBJECT.findall(text):
        try:
            fields = json.loads(found)
        except (ValueError, RecursionError):
            continue
        objects.append([(key, str(value)) for key, value in fields.items() if value is not None])
    return [fields for fields in objects if fields]


def _table(rows: list[list[str]]) -> list[tuple[str, str]]:
    return [(row[0], row[1].strip()) for row in rows[1:]] if all(len(row) == 2 for row in rows) else []


def _most_probable(fields: list[tuple[str, str]]) -> str:
    """The key of the largest of numbers that add up to 1 or 100, as ranks do not; "" when there is none, or several."""
    try:
        values = [float({"True": "1", "False": "0"}.get(value, value.rstrip("% "))) for _, value in fields]
    except ValueError:
        return ""
    whole = any(0.9 * total <= sum(values) <= 1.1 * total for total in (1, 100))
    best = [key for (key, _), value in zip(fields, values, strict=True) if value == max(values)]
    return best[0].replace("_", " ") if whole and min(values) >= 0 and len(best) == 1 else ""


def _key(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name).strip().lower()


_HEAD = re.compile(
    r"\W*(?!\d[.)])(?:(?:yes|yeah|no|nope|true|false)\b\W*[,:](?![^.;!\n]*\b(?:is|are) not (?!wear|look|smil|fac))"
    r"|[^\n]{1,40}?(?:[.!;](?=\s)|\s[-–—]+\s|—|\n|\((?=range)))",
    re.IGNORECASE,
)
_NOTE = re.compile(
    r"\n\W*(?:(?:please )?note|disclaimer|(?:keep|bear) in mind)\b"
    r"(?!.*\b(?:be|answer|option|choice|wrong|actually|or [A-H])\b)"
    r"(?=.*\b(?:feel|feelings?|guide|subjective|approximate|estimates?|identity|accurate|accuracy|vary)\b).*",
    re.IGNORECASE | re.DOTALL,
)
_WORDS = 4  # of an answer that stands before its explanation
_UNDONE = re.compile(
    r"\b(?:may|might|could|maybe|perhaps|possibly|unsure|not sure|cannot|can't|unclear|both|either|depends|wait"
    r"|actually|hold on|whether|if)\b|(?:^|[.!;\n])\W*(?:or\b|(?:no|yes|nope|sorry)\b\W*(?:[,.!;:]|$))",
    re.IGNORECASE,
)
_ALTHOUGH = r"(?:even though|although|though|while|whilst|despite|in spite of|at first|initially)"
_FIRST = [
    re.compile(rf"(?:^|(?<=[.!]\s))\W*{_ALTHOUGH}\b[^.!?]*{end}", re.IGNORECASE) for end in (r"?,(?: but)?\s", r",\s")
]
_REFLECTED = re.compile(r"^.*\bon (?:reflection|second thoughts?|(?:a )?closer (?:look|inspection))\W+", re.I | re.S)
_OPEN = r"(?=[^.!?\n]*\b(?:could|may|might|possib\w*|perhaps|maybe|question|certain|sure|difficult|hard)\b)"
_LAST = re.compile(rf"[,;(]?\s(?:even though|although|though)\b{_OPEN}[^.!?\n]*", re.IGNORECASE)
_STANDS = re.compile(
    r"\b(?:(?:i would|i'd) (?:say|guess|estimate|go with|choose|pick|answer|lean)|most likely|probably|leaning)\b", re.I
)
_HEDGED = re.compile(rf"[,;(]\s*(?:but\b|(?=possibly|perhaps|maybe)){_OPEN}[^.!?\n]*", re.IGNORECASE)
_BUT = re.compile(r"[^\w\s]+\s+(?:but|however)\b\W*", re.IGNORECASE)
_STRUCK = re.compile(r"^(?:\W*[Nn]ot \(?(?:[B-H]|A(?! [a-z]))\b\W*(?:and |or |nor )?)+")  # "Not a woman" strikes none
_BEST = re.compile(
    r"(?:^|.*[.,;!\n])\s*(?:but |so |and |which makes )*([^.,;!\n]+?) (?:is|seems|looks|fits)"
    r" (?:the )?(?:more|most|best)(?: (?:likely|probable|plausible|match|fit|answer|choice|option))?\W*",
    re.IGNORECASE | re.DOTALL,
)
_SENTENCE = re.compile(r"(?<=[.!;\n])")
_DENIAL = re.compile(r"(?:\b(?:not?|without)|n't)\b.*\bn?or\b", re.IGNORECASE)
_ASKED = re.compile(r"\(?(?:please )?(?:answer (?:with )?)?yes or no\)?\W*(?=\w)", re.IGNORECASE)


def committed(text: str) -> Iterator[tuple[str, str]]:
    """Parts of a text that may be all it commits to, each with the rest that must not name another answer."""
    if note := _NOTE.search(text):
        yield text[: note.start()], note.group()
    head = _HEAD.match(text)
    if head and len(re.findall(r"[\w-]+", head.group())) <= _WORDS and not _UNDONE.search(text[head.end() :]):
        yield head.group().rstrip(" (:,;-–—\n"), text[head.end() :]
    if best := _BEST.fullmatch(text):
        yield best[1], text[: best.start(1)]
    sentences = _SENTENCE.split(text)
    yield "".join(one for one in sentences if _UNDONE.search(one) or not _DENIAL.search(one)), ""
    text = _LAST.sub("", text)
    text = _HEDGED.sub("", text) if _STANDS.search(text) else text
    yield text, ""
    yield from ((pattern.sub("", text), "") for pattern in (*_FIRST, _REFLECTED, _STRUCK, _ASKED))


def conceded(text: str) -> tuple[str, str] | None:
    """What stands before and behind the first "but" of a text; None when it has none."""
    but = _BUT.search(text)
    return None if but is None else (text[: but.start()], text[but.end() :])


_LETTER = re.compile(
    r"(?<![Nn]ot )(?<!than )\b(?:[B-H]|A(?! [a-z]))\b"
    r"(?!\)? (?:is|was) (?:wrong|incorrect|not|ruled out|excluded|unlikely))"
)


def letters(text: str) -> set[str]:
    """Letters of options that a text gives, but for those that it strikes out."""
    return set(_LETTER.findall(text))
