"""Questions of benchmarks: several pictures, options of the question's own, letters, and two ways to read an answer.

A row of `conversations` that `ingest/benchmarks.py` made becomes a `Problem`, which is put in the benchmark's own words
(`Benchmark.prompt`) and read twice:

- `Benchmark.mark`: the benchmark's own rule, faults included, so that its published figures compare.
  FaceXBench (aggregate_results.py): the first single-letter word that is the capital letter of an option, else the
  first option whose text the answer contains. "A man" is therefore option A.
  Face-Human-Bench (output_final_answer.py): an answer of one character; else a capital letter A to D before one of
  `. ) , :`, if all such agree; else it asks GPT-3.5 which option is meant. Nobody is asked here: an answer that is an
  option's text, as its judge is shown, is that option, and any other is none.
- `read`: ours, one rule for all. A letter counts where it is plainly given as one; an article ("A man", "it is a man")
  never is. Else the one option that is named. Two answers, hedges and denials are none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from facemllm.errors import UserError
from facemllm.tasks.spoken import last_word, spoken

LONGEST = 2000
"""Characters of an answer that are read; a longer one is none."""

_LISTED = "\nOptions:\n"
_WORD = re.compile(r"\b[A-Za-z]\b")
_BEFORE_MARK = re.compile(r"([ABCD])[.。)）,，:：]")
_LONE = re.compile(r"\W*(?:option\s+)?\(?([a-j])\)?\W*", re.IGNORECASE)
_LEADING = re.compile(r"\W*\(?([A-J])(?:\)|[.,:](?=\s|$)|\s+[-–]\s)|\W*\(([a-j])\)")
_GIVEN = re.compile(
    r"\b(?i:answer|option|choice)(?:\s+(?:is|would be|should be))?\s*:?\s*(?:[Oo]ption\s+)?[*_\"'(\[{]*"
    r"(?:([B-HJ])\b(?!['’])|([AI])(?=\s*(?:[^\w\s]|because\b|since\b|$)))",
)
_BRACKETED = re.compile(r"\(([A-J])\)")
_UNSURE = re.compile(
    r"\b(?:not|no|neither|nor|none|never|without|either|or|maybe|perhaps|possibly|might|may|could|unsure|unclear|cannot"
    r"|can't|difficult|impossible|wrong|incorrect|except|but|however)\b|n't\b|\?"
)
_NUMBERED = re.compile(r"\d").search


@dataclass(frozen=True)
class Problem:
    """A question of a benchmark. `options` and `answer` are texts, `pictures` how many it shows; `place` is where it
    stands in the benchmark's own table (category first), None where its own evaluation leaves it out; `same` names what
    is asked of one picture in several versions."""

    benchmark: Benchmark
    task: str
    text: str
    options: tuple[str, ...]
    answer: str
    pictures: int
    place: tuple[str, ...] | None
    same: str

    @property
    def prompt(self) -> str:
        """The words in which the benchmark asks."""
        return self.benchmark.prompt(self.text, self.options)

    @property
    def listed(self) -> str:
        """The same with the options as words, for models whose options are scored by likelihood."""
        return listed(self.text, self.options)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's own rules. `mark` gives the option that an answer means, by number; `place` of a task and template;
    `levels` says whether its figure is the mean over its levels, or over all questions."""

    name: str
    title: str
    prompt: Callable[[str, Sequence[str]], str]
    mark: Callable[[str, Sequence[str]], int | None]
    place: Callable[[str, str], tuple[str, ...] | None]
    levels: bool


def listed(text: str, options: Sequence[str]) -> str:
    """A question with its options as words, as a conversation holds it."""
    return text + _LISTED + "\n".join(f"- {option}" for option in options)


def of_row(row: Mapping[str, Any]) -> Problem:
    """The problem of a row of `conversations`. Raises UserError when it is none of a benchmark's."""
    benchmark, (turn, *more) = BENCHMARKS.get(row["source"]), row["turns"] or [None]
    text = next((part["text"] for part in row["messages"][0]["content"] if part["type"] == "text"), "")
    if benchmark is None or turn is None or more or not turn["options"] or turn["answer"] not in turn["options"]:
        raise UserError(
            f"conversation {row['conversation_id'][:12]} (source {row['source']}) is no question of "
            f"{' or '.join(BENCHMARKS)}; import the benchmark with `facemllm import`"
        )
    options = tuple(turn["options"])
    kind, _, number = str(turn["template"]).rpartition("/")
    variant = str(turn["task"]).rpartition("_")[2]
    return Problem(
        benchmark=benchmark,
        task=turn["task"].removeprefix(f"{row['source'].replace('-', '_')}_"),
        text=text.removesuffix(listed("", options)),
        options=options,
        answer=turn["answer"],
        pictures=len(row["images"]),
        place=benchmark.place(turn["task"], turn["template"]),
        same=f"{kind.removesuffix(f'_{variant}') if benchmark.levels else kind}/{number}",
    )


def read(text: str, options: Sequence[str]) -> int | None:
    """The option that an answer plainly gives, by number; None when it gives none, or more than one."""
    if len(text) > LONGEST:
        return None
    said = last_word(spoken(text)).strip()
    plain, texts = _plain(said), [_plain(option) for option in options]
    if plain in texts:
        return texts.index(plain)
    if found := _LONE.fullmatch(said):
        return _number(found[1], options)
    start = _LEADING.match(said)
    letters = [start[1] or start[2]] if start else []
    letters += [one or other for one, other in _GIVEN.findall(said)] + _BRACKETED.findall(said)
    numbers = {_number(letter, options) for letter in letters}
    rest = _plain(said[start.end() :]) if start else plain
    named = {texts.index(rest)} if rest in texts else _named(rest, texts)
    if letters:
        doubted = named is None or len(numbers) > 1 or _gainsaid(said)
        return None if doubted or (named and named != numbers) else numbers.pop()
    return named.pop() if named and len(named) == 1 else None


def _gainsaid(said: str) -> bool:
    """Whether a letter is denied or one of two: "not B", "(A) or (B)"."""
    return re.search(r"\b(?:not|neither|either|or|except|isn't)\s+(?:option\s+)?\(?[A-J]\b", said) is not None


def _number(letter: str, options: Sequence[str]) -> int | None:
    number = ascii_uppercase.index(letter.upper())
    return number if number < len(options) else None


def _plain(text: str) -> str:
    """Lower-case words, one space between them; signs that end or wrap a text are none of it."""
    words = re.sub(r"\s+", " ", re.sub(r"[*_`\"“”]", "", text)).strip().lower()
    return words.strip(" .,:;!-–()[]")


def _named(said: str, options: Sequence[str]) -> set[int] | None:
    """The options that words name, each whole and none within a longer one. None when they are hedged or denied, unless
    the words begin with it ("no, it is not"); and where options have numbers, when the words have others."""
    found, left, opens = set(), said, False
    for number in sorted(range(len(options)), key=lambda n: -len(options[n])):
        pattern = rf"(?<![\w.]){re.escape(options[number])}(?!\w|[.,]\d)"
        if re.search(pattern, left):
            if _UNSURE.fullmatch(options[number]) and not re.search(rf"\A{pattern}|{pattern}\Z", said):
                return None  # "no" is an answer where one begins or ends, else a word
            found.add(number)
            opens = opens or re.match(rf"{pattern}\s*[.,;:]", said) is not None
            left = re.sub(pattern, " ; ", left)
    others = any(map(_NUMBERED, options)) and _NUMBERED(left)
    return None if found and (others or (_UNSURE.search(left) and not opens)) else found


def _facexbench_prompt(text: str, options: Sequence[str]) -> str:
    instruction = "Please answer the question and provide only the correct option letter, e.g., A, B, C, D."
    shown = (f"({letter}) {option}" for letter, option in zip(ascii_uppercase, options, strict=False))
    return "\n".join((text, instruction, *shown))


def _facexbench_mark(text: str, options: Sequence[str]) -> int | None:
    letters, said = ascii_uppercase[: len(options)], text.strip()
    if letter := next((one for one in _WORD.findall(said) if one in letters), None):
        return letters.index(letter)
    return next((number for number, option in enumerate(options) if option.strip() in said), None)


_CATEGORIES = ("bias_fairness", "attributes_expression", "face_localization", "fas_deepfakes", "tools_use")


def _facexbench_place(task: str, template: str) -> tuple[str, ...] | None:
    """Category and task; of files in its form that are not its own, the task alone."""
    own = task.removeprefix("facexbench_")
    category = next((name for name in _CATEGORIES if own.startswith(f"{name}_")), None)
    return (own,) if category is None else (category, own.removeprefix(f"{category}_"))


def _face_human_bench_prompt(text: str, options: Sequence[str]) -> str:
    shown = (f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False))
    return "\n".join((f"Question: {text}", *shown, "Please select the correct answer from the options above."))


def _face_human_bench_mark(text: str, options: Sequence[str]) -> int | None:
    letters = ascii_uppercase[: len(options)]
    given = {text} if len(text) == 1 else set(_BEFORE_MARK.findall(text))
    if len(given) == 1:
        (letter,) = given
        return letters.index(letter) if letter in letters else None
    plain = [_plain(option) for option in options]
    return plain.index(_plain(text)) if _plain(text) in plain else None


_SUBSETS: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("face", "attribute", "compound"): ("face_attribute_compound_original", "face_attribute_compound_cropped"),
    **{
        ("face", "age", f"{n}-year-interval"): (f"face_age_basic_{n}_original", f"face_age_basic_{n}_cropped")
        for n in (15, 10, 5)
    },
    ("face", "expression", "basic"): ("face_expression_basic_original", "face_expression_basic_cropped"),
    ("face", "expression", "compound"): ("face_expression_compound_cropped",),
    ("face", "attack", "digital_attack"): (
        "face_attack_digital_expression_swap_cropped",
        "face_attack_digital_identity_swap_cropped",
    ),
    ("face", "attack", "physical_attack"): (
        "face_attack_physical_paper_cropped",
        "face_attack_physical_replay_cropped",
    ),
    ("human", "attribute", "compound"): ("human_attribute_compound_boxed", "human_attribute_compound_cropped_cropped"),
    ("human", "action", "basic"): ("human_action_basic_boxed",),
    ("human", "spatial_relation", "count"): tuple(
        f"human_spatial_relation_count_{most}_original" for most in ("10", "100", "100plus")
    ),
    ("human", "spatial_relation", "relative_location"): ("human_spatial_relation_location_boxed",),
    ("human", "social_relation", "occupation"): ("human_social_relation_occupation_boxed",),
    ("human", "social_relation", "social_relationship"): ("human_social_relation_relationship_boxed",),
}
"""Face-Human-Bench's subsets by level (score.py), without those that match people."""
_PLACES = {subset: (*levels, subset) for levels, subsets in _SUBSETS.items() for subset in subsets}


BENCHMARKS: Mapping[str, Benchmark] = {
    "facexbench": Benchmark(
        name="facexbench",
        title="FaceXBench",
        prompt=_facexbench_prompt,
        mark=_facexbench_mark,
        place=_facexbench_place,
        levels=False,
    ),
    "face-human-bench": Benchmark(
        name="face-human-bench",
        title="Face-Human-Bench",
        prompt=_face_human_bench_prompt,
        mark=_face_human_bench_mark,
        place=lambda task, template: _PLACES.get(task.removeprefix("face_human_bench_")),
        levels=True,
    ),
}
"""By the key of their source in the ledger."""
