"""Makes the weights of facemllm.serve.asked.classifier anew, from the taught wordings, the lists of the tests, and
questions about other things made of `question_frames.txt`.

    .venv/bin/python tools/question_classifier.py [--without LIST] [--out FILE]

Lists that were written blind stay out (`blind_*`), so that they can measure. `--without known.csv` leaves a list out
and says how the classifier alone does on it.
"""

from __future__ import annotations

import argparse
import csv
import random
import re
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression

from facemllm import tasks
from facemllm.serve.asked import classifier
from facemllm.serve.asked.classifier import BUCKETS, NONE, Classifier, features
from facemllm.serve.asked.lexicon import LEXICON
from facemllm.serve.asked.reading import Reading, read
from facemllm.tasks.paraphrases import normal

LISTS = Path(__file__).parents[1] / "tests" / "unit" / "asked"
FRAMES = Path(__file__).with_name("question_frames.txt")
_OF_FRAME = 10
"""Questions made of each frame."""


def texts() -> list[tuple[str, str, str]]:
    """(text, item or NONE, list) of everything that may be learnt from."""
    found = []
    for name in tasks.all_names():
        for item in tasks.get(name).items:
            if item.name in LEXICON.signs or name == "unanswerable":
                label = item.name if name != "unanswerable" else NONE
                found += [(text, label, "wordings") for text in item.wordings]
    for file in sorted(LISTS.glob("*.csv")):
        if file.name.startswith("blind_"):
            continue
        for row in csv.DictReader(file.open(encoding="utf-8")):
            label = row.get("item", NONE) if "known" in file.name else NONE
            if label in LEXICON.signs or label == NONE:
                found.append((row["text"], label, file.name))
    for file in sorted(LISTS.glob("*foreign.txt")):
        if not file.name.startswith("blind_"):
            found += [(line.strip(), NONE, file.name) for line in file.open(encoding="utf-8") if line.strip()]
    return found + [(text, NONE, FRAMES.name) for text in framed(random.Random(1))]


def framed(drawn: random.Random) -> list[str]:
    """Questions about other things, or about a face in a way that no face answers: each frame some times, with words
    that are drawn, some of them unknown."""
    lines = FRAMES.read_text(encoding="utf-8").splitlines()
    words = {name: said.split("|") for name, eq, said in (line.partition("=") for line in lines) if eq}
    elsewhere = sorted(LEXICON.elsewhere)

    def unknown() -> str:
        return "".join(drawn.choice("bcdfglmnprstvz") + drawn.choice("aeiou") for _ in range(drawn.randint(2, 4)))

    def word(slot: re.Match[str]) -> str:
        chosen = {"face": [drawn.choice(words["face"])], "odd": [drawn.choice(words["odd"]), unknown()]}
        chosen["thing"] = [drawn.choice(elsewhere), drawn.choice(words["thing"]), unknown()]
        return drawn.choice(chosen[slot[1]])

    frames = [line for line in lines if "=" not in line]
    return sorted({re.sub(r"\{(\w+)\}", word, frame) for frame in frames for _ in range(_OF_FRAME)})


def _read(text: str) -> Reading:
    return read(normal(text))


def matrix(found: list[str]) -> csr_matrix:
    """Features of texts, (texts, BUCKETS)."""
    rows = [features(_read(text)) for text in found]
    ends = np.cumsum([0, *(len(buckets) for buckets, _ in rows)])
    return csr_matrix(
        (np.concatenate([v for _, v in rows]), np.concatenate([b for b, _ in rows]), ends), (len(rows), BUCKETS)
    )


def main() -> None:
    """Fit and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without", action="append", default=[])
    parser.add_argument("--out", type=Path, default=Path(classifier.__file__).with_suffix(".npz"))
    options = parser.parse_args()
    every = texts()
    learnt = [one for one in every if one[2] not in options.without]
    model = LogisticRegression(C=30, max_iter=400).fit(matrix([t for t, *_ in learnt]), [item for _, item, _ in learnt])
    np.savez_compressed(
        options.out,
        names=np.array(model.classes_.tolist()),
        weight=model.coef_.T.astype(np.float16),
        bias=model.intercept_.astype(np.float32),
    )
    kept = [one for one in every if one[2] in options.without]
    found = [Classifier(options.out).probabilities(_read(text)) for text, *_ in kept]
    for least in (0.5, 0.6, 0.7, 0.8, 0.9):
        asked = [p for p, (_, item, _) in zip(found, kept, strict=True) if item == NONE]
        taken = sum(max(p, key=p.__getitem__) != NONE and max(p.values()) >= least for p in asked)
        known = [(p, item) for p, (_, item, _) in zip(found, kept, strict=True) if item != NONE]
        right = sum(max(p, key=p.__getitem__) == item and p[item] >= least for p, item in known)
        if kept:
            print(f"at {least}: {right} of {len(known)} right, {taken} of {len(asked)} foreign ones taken")


if __name__ == "__main__":
    main()
