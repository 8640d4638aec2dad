"""Whatever stands in the data, no page runs it: a script in every name, reason, caption and task is words."""

import json
import re
from collections import Counter
from typing import Any

import pandas as pd
import pytest
from jinja2 import UndefinedError

from facemllm.report import card, run, terminal
from facemllm.report.kit import plain_markdown, render, table
from facemllm.scoring.paired import WORSE
from facemllm.settings import load
from facemllm.validate.balance import Reason, Share
from facemllm.validate.memory import Count, Tallies
from facemllm.validate.report import Findings
from facemllm.validate.report import page as validation_page
from facemllm.validate.suites import Outcome
from facemllm.version.ledger import Entry
from studies.ablation.report import page as ablation_page
from tests import evaluation_example as example
from tests.pages import HOSTILE, Page

NAMES = ("female", "blur", "anger", "profile", "unseen", "No_Beard", "Wearing_Earrings", "years", "attributes", "Bald")
RAW = re.compile(r"(?<!\\)<script")


def hostile(value: Any) -> Any:
    """The same data with names from outside replaced by a script."""
    text = json.dumps(value)
    for name in NAMES:
        text = text.replace(name, f"{name}{HOSTILE}")
    return json.loads(text)


def words(*names: str) -> dict[str, Any]:
    """A script under each of these names."""
    return dict.fromkeys(names, HOSTILE)


def test_the_run_page_escapes_everything() -> None:
    check = words("kind", "key", "reason") | {"passed": False}
    gate = {"passed": False, "reasons": [HOSTILE], "checks": [check]}
    rows = words("key", "name", "licence", "status") | {"uses": [HOSTILE]}
    facts = words("run", "commit", "device", "profile", "approval") | {"overrides": [HOSTILE], "sources": [rows]}
    more = {"cost": {HOSTILE: {HOSTILE: HOSTILE}}, "model": {HOSTILE: HOSTILE}}
    question = words("question", "metric", "answer", "raw") | {"score": 0.0}
    samples = [
        {"image_id": HOSTILE, "picture": "data:image/jpeg;base64,", "questions": [{**question, "parsed": parsed}]}
        for parsed in (None, HOSTILE)
    ]
    said = words("image_id", "question", "truth", "written", "likeliest") | {"task": "t", "item": "i"}
    audited = {"relation": HOSTILE, "checked": 1, "broken": 0, "rate": 0.0, "enforced": True}
    training = {
        "curves": {HOSTILE: [{"step": n, "loss": 1.0, f"loss/task/{HOSTILE}": 1.0} for n in range(3)]},
        "samples": {HOSTILE: [{**said, "probability": 1.0}]},
        "relations": [audited],
        "branches": {HOSTILE: {HOSTILE: HOSTILE}},
    }
    summary = {"gate": gate, "steps": [words("name", "digest", "figure")], **facts, **more}
    html = run.page(summary, hostile(example.METRICS), samples, training, HOSTILE)
    assert Page(html).text.count(HOSTILE) > 60
    assert not RAW.search(html)


def test_the_comparison_escapes_everything() -> None:
    def judged(found: Any) -> Any:
        if isinstance(found, dict) and "p_holm" in found:
            return {**found, "verdict": WORSE}
        return {name: judged(below) for name, below in found.items()} if isinstance(found, dict) else found

    said = {"split": HOSTILE, "settings": {HOSTILE: [HOSTILE, None]}}
    html = terminal.page(hostile({**judged(example.COMPARISON), "names": [HOSTILE, HOSTILE], **said}))
    assert Page(html).text.count(HOSTILE) > 10
    assert not RAW.search(html)


def test_the_validation_page_escapes_everything() -> None:
    outcome = Outcome(
        *("annotated", HOSTILE, HOSTILE, HOSTILE, False, 1, 1, HOSTILE),
        examples=({"row": 1, "image_id": HOSTILE, "value": HOSTILE},),
        error=HOSTILE,
    )
    texts = words("name", "homepage", "licence", "terms", "consent", "citation")
    faces = {name: [HOSTILE] for name in ("source", "gender", "ethnicity", "skin_tone", "expression", "subject_id")}
    count = Count({("gender", HOSTILE): 9}, {("gender", HOSTILE): 1}, 90, 80)
    tallies = Tallies(
        attributes=Counter({(HOSTILE, True): 1}),
        exclusive=Counter({HOSTILE: 1}),
        disagreements=Counter({HOSTILE: 1}),
        first={HOSTILE: HOSTILE},
        questions=Counter({(HOSTILE, "train"): 1}),
        answers=Counter({(HOSTILE, HOSTILE, HOSTILE): 1}),
    )
    found = Findings(
        outcomes=[outcome],
        faces=pd.DataFrame({**faces, "age": [31.0], "split": ["train"]}),
        tallies=tallies,
        ledger={HOSTILE: Entry(key=HOSTILE, uses=("train",), status="active", **texts)},
        sources=[HOSTILE, HOSTILE + HOSTILE],
        about={"ledger_refused": {HOSTILE: 3}, "contradictions": {HOSTILE: 2}},
        shares=[Share("annotation", HOSTILE, HOSTILE, 9, 1, 0.001, True)],
        filtered={"annotation": count},
        imported=3,
        refused={HOSTILE: [Reason(HOSTILE, 9, True, [HOSTILE])]},
    )
    counts = dict.fromkeys(("annotated", "conversations", "questions", "checks", "failed"), 1)
    result = {"passed": False, "critical": [HOSTILE], "warnings": [HOSTILE], "counts": counts}
    html = validation_page(result | {"tables": {"annotated": HOSTILE}, "limits": {"group_loss": 0.1}}, found)
    assert Page(html).text.count(HOSTILE) > 40
    assert not RAW.search(html)


def test_the_card_escapes_everything() -> None:
    settings = load("laptop", [f"promote.model_name=a {HOSTILE}"])
    metrics = hostile(example.METRICS)
    text = card.card(settings, "a" * 64, metrics, {HOSTILE: "b"}, ["render"], {HOSTILE: {"device": HOSTILE}})
    body = text.split("\n---\n", 1)[1]
    assert body.count(r"\<script\>") > 15
    assert not RAW.search(body.replace("`", "\\`"))


def test_the_ablation_page_escapes_everything() -> None:
    figure = {"metric": "mae", "value": 1.0, "low": None, "high": None}
    one = {"seeds": [0], "seconds": 1.0, "processor_seconds": 1.0, "without_map": None, "to_control": None}
    stages = {HOSTILE: {"steps": 3.0, "faces": 12.0}}
    results = {"command": "facemllm ablate", "baseline": "base", "controls": {}, "says": {"base": HOSTILE}}
    results |= {"variants": {"base": {**one, "stages": stages, "figures": {"age": figure}}}, "sources": [HOSTILE]}
    results |= {"images": 1, "people": 1, "conversations": "c" * 64, "commit": HOSTILE}
    results["machine"] = {"processor": HOSTILE, "cores": 2, "versions": {HOSTILE: HOSTILE}}
    text = ablation_page(results, None)
    assert text.count(r"\<script\>") == 7
    assert not RAW.search(text)


def test_a_template_that_names_what_it_is_not_given_is_refused() -> None:
    with pytest.raises(UndefinedError, match="names"):
        render("comparison.html.jinja", comparison={})


def test_markdown_keeps_a_value_in_its_cell() -> None:
    assert plain_markdown("a|b\n# *c* `d` [e](f)") == r"a\|b \# \*c\* \`d\` \[e\](f)"
    assert table([("x", "y"), ("1|2", 3)]) == "| x | y |\n| --- | --- |\n| 1\\|2 | 3 |"
