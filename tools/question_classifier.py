"""Makes the weights of facemllm.serve.asked.classifier anew, from the taught wordings, the lists of the tests, and
phrases and questions about other things made of `question_phrases.yaml` and `question_frames.txt`.

    .venv/bin/python tools/question_classifier.py                       # the weights that are shipped
    .venv/bin/python tools/question_classifier.py --without blind       # or first, third, fourth; writes nothing

Each author's lists measure best what was not learnt from them: `--without` leaves an author out and says how lexicon,
rules and classifiers together do on their lists.
"""

from __future__ import annotations

import argparse
import csv
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression

from facemllm import tasks
from facemllm.serve.asked import matching, policy
from facemllm.serve.asked.classifier import BUCKETS, NONE, Classifier, Features, file_of, of_item, of_refusal
from facemllm.serve.asked.disguises import plain
from facemllm.serve.asked.lexicon import LEXICON
from facemllm.serve.asked.reading import read
from facemllm.tasks.paraphrases import normal
from facemllm.tasks.wordings import written

LISTS = Path(__file__).parents[1] / "tests" / "unit" / "asked"
FRAMES, PHRASES = (Path(__file__).with_name(name) for name in ("question_frames.txt", "question_phrases.yaml"))
AUTHORS = {"own": "own_", "first": "", "blind": "blind_", "third": "third_", "fourth": "fourth_"}
DEPLOYED = ("caption", "attributes", "expression", "age", "gender", "head_pose", "unanswerable")
_ALLOWED = {"gender": "measured", "age": "measured", "expression": "measured"}
_OF_FRAME, _OF_PHRASE, _TOGETHER = 10, 5, 1500
"""Questions made of each frame, of each phrase, and of a refused and a harmless one together."""
_MADE = 0.3
"""Weight of what was made or taught, beside what somebody wrote."""
_C, _ITERATIONS = 30, 120
_BEFORE = ("please tell me ", "hi, ", "quick question: ", "so ", "ok, ", "in this photo, ", "looking at the picture, ")
_AFTER = (" please", " in the picture", " here", ", do you think", ", would you say", ", if you can tell")
_PLURAL = {"does they": "do they", "is they": "are they", "has they": "have they", "was they": "were they"}
_PLURAL |= {"they is": "they are", "they has": "they have"}


class Text(NamedTuple):
    """A question, the item it asks for (NONE: none; empty: not to be learnt from), the rule that refuses it (NONE:
    none), and who wrote it."""

    text: str
    item: str
    rule: str
    author: str


def listed(author: str) -> Iterator[Text]:
    """The lists of an author."""
    for row in _rows(f"{AUTHORS[author]}known.csv"):
        also = [one.split("/")[1] for one in (row.get("also") or "").split("|") if one]
        item = next((one for one in (row["item"], *also) if one in LEXICON.signs), "")
        yield Text(row["text"], item, NONE, author)
    yield from (Text(text, NONE, NONE, author) for text in _lines(f"{AUTHORS[author]}foreign.txt"))
    yield from (Text(row["text"], NONE, row["rule"], author) for row in _rows(f"{AUTHORS[author]}refused.csv"))
    yield from (Text(text, "", NONE, author) for text in _lines(f"{AUTHORS[author]}harmless.txt"))


def taught() -> Iterator[Text]:
    """The wordings of tasks, but for those written for training alone, which measure what is learnt here; of what a
    face does not tell, a part is refused, too."""
    for name in tasks.all_names():
        for item in tasks.get(name).items:
            own = [text for text in item.wordings if text not in written(item.name)]
            if item.name in LEXICON.signs:
                yield from (Text(text, item.name, NONE, "taught") for text in own)
            elif name == matching.UNANSWERABLE:
                yield from (Text(text, NONE, "", "taught") for text in own)


def framed(drawn: random.Random) -> list[str]:
    """Questions about other things, or about a face in a way that no face answers: each frame some times, with words
    that are drawn, some of them unknown."""
    lines = FRAMES.read_text(encoding="utf-8").splitlines()
    words = {name: said.split("|") for name, eq, said in (line.partition("=") for line in lines) if eq}
    elsewhere = sorted(LEXICON.elsewhere)

    def word(slot: re.Match[str]) -> str:
        chosen = {"face": [drawn.choice(words["face"])], "odd": [drawn.choice(words["odd"]), _unknown(drawn)]}
        chosen["thing"] = [drawn.choice(elsewhere), drawn.choice(words["thing"]), _unknown(drawn)]
        return drawn.choice(chosen[slot[1]])

    frames = [line for line in lines if "=" not in line]
    return sorted({re.sub(r"\{(\w+)\}", word, frame) for frame in frames for _ in range(_OF_FRAME)})


def phrased(drawn: random.Random) -> Iterator[Text]:
    """Questions made of the phrases: every way of asking before any thing that is asked for."""
    stored = yaml.safe_load(PHRASES.read_text(encoding="utf-8"))
    slots = {name: _split(stored[name]) for name in ("who", "whose", "thing")}
    things = [*slots["thing"], *sorted(LEXICON.elsewhere)]

    def word(slot: re.Match[str]) -> str:
        if slot[1] != "thing":
            return drawn.choice(slots[slot[1]])
        return _unknown(drawn) if drawn.random() < 1 / 3 else drawn.choice(things)

    def filled(text: str) -> str:
        text = re.sub(r"\{(who|whose|thing)\}", word, text)
        for wrong, right in _PLURAL.items():
            text = text.replace(wrong, right)
        chance = drawn.random()
        if chance < 1 / 8:
            return drawn.choice(_BEFORE) + text
        return text + drawn.choice(_AFTER) if chance < 1 / 4 else text

    def of(found: dict[str, str]) -> Iterator[str]:
        for kind in ("named", "having", "doing"):
            for thing in _split(found.get(kind, "")):
                ways = drawn.sample(stored[kind], _OF_PHRASE * (2 if "{thing}" in thing else 1))
                yield from (filled(way.replace("{n}", thing).replace("{ing}", thing)) for way in ways)
        for text in _split(found.get("asked", "")):
            yield from (filled(text) for _ in range(_OF_PHRASE * (2 if "{thing}" in text else 1)))
        yield from _split(found.get("other", ""))

    for item, found in stored["known"].items():
        yield from (Text(text, item, NONE, "phrases") for text in of(found))
    yield from (Text(text, NONE, NONE, "phrases") for text in of(stored["foreign"]))
    for rule, found in stored["refused"].items():
        yield from (Text(text, NONE, rule, "phrases") for text in of(found))
    yield from (Text(text, "", NONE, "phrases") for text in of(stored["harmless"]))


def together(found: Sequence[Text], drawn: random.Random) -> Iterator[Text]:
    """What is refused stays so beside a question that is not."""
    refused = [one for one in found if one.rule not in ("", NONE)]
    known = [one for one in found if one.item not in ("", NONE)]
    for _ in range(_TOGETHER):
        one, other = drawn.choice(refused), drawn.choice(known)
        texts = [one.text, other.text]
        drawn.shuffle(texts)
        yield Text(drawn.choice(("{} {}", "{} and {}", "{}, {}", "{} also {}")).format(*texts), "", one.rule, "phrases")


def _rows(name: str) -> Iterator[dict[str, str]]:
    with (LISTS / name).open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def _lines(name: str) -> list[str]:
    return [line.strip() for line in (LISTS / name).read_text(encoding="utf-8").splitlines() if line.strip()]


def _split(text: str) -> list[str]:
    return [one.strip() for one in text.split("|") if one.strip()]


def _unknown(drawn: random.Random) -> str:
    return "".join(drawn.choice("bcdfglmnprstvz") + drawn.choice("aeiou") for _ in range(drawn.randint(2, 4)))


def fitted(name: str, texts: Sequence[Text], label: Callable[[Text], str], features: Callable[[str], Features]) -> Any:
    """A classifier of the texts that have a label, what was made or taught weighing less."""
    labels = {(one.text, label(one)): one.author in AUTHORS for one in texts if label(one)}
    rows = [features(text) for text, _ in labels]
    ends = np.cumsum([0, *(len(buckets) for buckets, _ in rows)])
    parts = np.concatenate([values for _, values in rows]), np.concatenate([buckets for buckets, _ in rows]), ends
    weights = np.where(list(labels.values()), 1.0, _MADE)
    model = LogisticRegression(C=_C, max_iter=_ITERATIONS, tol=1e-3)
    model.fit(csr_matrix(parts, (len(rows), BUCKETS[name])), [one for _, one in labels], weights)
    return Classifier.of(model.classes_.tolist(), model.coef_.T, model.intercept_)


def measured(author: str) -> str:
    """How lexicon, rules and classifiers do on the lists of an author, in one line."""
    deployed = {(task, item.name) for task in DEPLOYED for item in tasks.get(task).items}
    matcher, rules = matching.Matcher([tasks.get(name) for name in DEPLOYED]), policy.Policy(_ALLOWED)

    def item_of(text: str) -> str | None:
        found = matcher.match(text)
        return found and found.question.item

    right = known = 0
    for row in _rows(f"{AUTHORS[author]}known.csv"):
        also = [tuple(one.split("/")) for one in (row.get("also") or "").split("|") if one]
        if items := {item for task, item in [(row["task"], row["item"]), *also] if (task, item) in deployed}:
            known += 1
            right += item_of(row["text"]) in items
    foreign, harmless = (_lines(f"{AUTHORS[author]}{name}.txt") for name in ("foreign", "harmless"))
    wrong = [refusal and refusal.rule for refusal in map(rules.refuses, harmless)]
    refused = [(row["rule"], rules.refuses(row["text"])) for row in _rows(f"{AUTHORS[author]}refused.csv")]
    by_right = sum(found is not None and found.rule == rule for rule, found in refused)
    taken = sum(item_of(text) is not None for text in foreign)
    return (
        f"{author}: known {right}/{known} right, foreign {taken}/{len(foreign)} taken, refused "
        f"{sum(found is not None for _, found in refused)}/{len(refused)} ({by_right} by the right rule), "
        f"harmless {sum(map(bool, wrong))}/{len(harmless)} refused"
    )


def main() -> None:
    """Fit and write, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without", choices=AUTHORS, help="an author whose lists are left out, and measure")
    options = parser.parse_args()
    drawn = random.Random(1)
    found = [*taught(), *(one for author in AUTHORS if author != options.without for one in listed(author))]
    found += [*(Text(text, NONE, NONE, "frames") for text in framed(drawn)), *phrased(drawn)]
    found += together(found, drawn)
    made = {
        "items": fitted("items", found, lambda one: one.item, lambda text: of_item(read(normal(text)))),
        "refusals": fitted("refusals", found, lambda one: one.rule, lambda text: of_refusal(plain(text))),
    }
    if not options.without:
        for name, one in made.items():
            one.write(file_of(name))
        return
    matching.classifier = policy.classifier = made.__getitem__  # type: ignore[attr-defined, assignment]
    print(measured(options.without))


if __name__ == "__main__":
    main()
