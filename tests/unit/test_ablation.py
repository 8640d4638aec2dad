"""The ablation: which cells there are, what of them is made again, and what is said of the figures."""

import json
import math
import statistics

import pytest
from scipy import stats as scipy_stats

from facemllm import settings
from facemllm.reformat.run import reformat
from facemllm.tables import pairs
from studies.ablation import __main__ as ablating
from studies.ablation import running
from studies.ablation.__main__ import Ablation, Variant, ablate, ablation, cells, groups, numbers, shipped
from studies.ablation.report import BETTER, SAME, WORSE, drawn, page, together, words
from tests.refusing import refuses

TINY = ["model.image_size=32", "evaluate.split=test", "train.precision=fp32"] + [
    f"train.stages.{stage}.{key}"
    for stage in ("align", "instruct", "specialize")
    for key in ("steps=2", "batch_images=4", "turns_per_image=2")
]


def planned(overrides=(), seeds=(0, 1), **variants):
    found = {name: Variant(says=name, **given) for name, given in variants.items()}
    return cells("laptop", overrides, found, seeds, "table", "code")


GENTLE = {"set": ["train.stages.specialize.learning_rate=5.0e-4"]}
SCORED = {"set": ["model.knowledge.enabled=true"]}


def test_cells_come_seed_by_seed_and_variants_that_begin_alike_share_their_first_stages():
    found = planned(base={"set": []}, gentle=GENTLE, scored=SCORED)
    named = [(name, seed) for seed in (0, 1) for name in ("base", "gentle", "scored")]
    assert [(cell.variant, cell.seed) for cell in found] == named
    assert len({cell.digest for cell in found}) == 6
    base, gentle, scored = found[:3]
    assert base.keys[:2] == gentle.keys[:2]
    assert base.keys[2] != gentle.keys[2]
    assert not {*base.keys} & {*scored.keys}
    grouped = [[cell.variant for cell in group] for group in groups([base, gentle, scored])]
    assert grouped == [["base", "gentle"], ["scored"]]


def test_a_changed_setting_renames_only_what_it_touches():
    def names(*overrides):
        return {c.variant: c.digest for c in planned(overrides, base={"set": []}, scored=SCORED, seeds=[0])}

    before = names()
    assert before == names("promote.every_task=false", "train.workers=2", "evaluate.bootstrap=300")
    assert not {*before.values()} & {*names("train.stages.specialize.steps=7").values()}


def test_one_stage_is_a_selection_of_the_three_and_a_variant_that_cannot_be_is_refused_by_name():
    (cell,) = planned(one={"set": [], "stages": ["specialize"]}, seeds=[0])
    assert (cell.stages, len(cell.keys)) == (("specialize",), 1)
    refuses("in that order", planned, odd={"set": [], "stages": ["instruct", "align"]})

    refuses(r"variant odd: --set model\.knowledg=1.*did you mean", planned, odd={"set": ["model.knowledg=1"]})
    said = r"variant bare: --set .*=\{\}: an empty mapping changes nothing"
    refuses(said, planned, bare={"set": ["train.stages.align.tasks={}"]})
    for wrong in ({"baseline": "nobody"}, {"variants": {"base": {"says": "x", "set": [], "control": "nobody"}}}):
        refuses("none of the variants", Ablation.model_validate, shipped() | wrong, error=ValueError)


def test_every_shipped_variant_loads_and_says_whether_its_branches_are_on():
    assert len(ablation().variants) == 9
    found = cells("ablation", ["model.knowledge.enabled=true"], ablation().variants, [0], "t", "c")
    by_name = {cell.variant: cell.settings.model for cell in found}
    for name, mode, enabled in (("base", "none", False), ("one_stage", "none", False), ("everything", "append", True)):
        assert (by_name[name].segmentation.mode, by_name[name].knowledge.enabled) == (mode, enabled), name
    for name, correlation, logic in (("scores", False, False), ("correlation", True, False), ("logic", False, True)):
        knows = by_name[name].knowledge
        assert (knows.omega > 0, knows.logic_weight > 0) == (correlation, logic), name


def test_seeds_are_read_and_odd_ones_refused():
    for text, expected in {"": [], "0-2": [0, 1, 2], "4, 1,4": [4, 1], "7": [7]}.items():
        assert numbers(text) == expected
    for text in ("x", "3-1", "-1", "1-"):
        refuses("expected numbers", numbers, text)


def record(variant, seed, mean, age, maps=None):
    figures = {"without_map": {"closed_mean": mean, "age": age}}
    if maps is not None:
        figures["with_map"] = {"closed_mean": maps, "age": age}
    spent = {"seconds": 2.0, "processor_seconds": 1.5}
    stages = {"align": {"steps": 3, "faces": 12, "losses": {"loss": 1.0}, **spent}}
    metrics = {"closed_mean": "balanced_accuracy", "age": "mae"}
    return {"variant": variant, "seed": seed, "stages": stages, **spent, "figures": figures, "metrics": metrics}


BASE = [0.70, 0.74, 0.71, 0.75, 0.72]
GAINS = [0.031, 0.028, 0.035, 0.030, 0.027]


def compared():
    found = []
    for seed, (mean, gain) in enumerate(zip(BASE, GAINS, strict=True)):
        found.append(record("base", seed, mean, 10.0 + seed))
        found.append(record("good", seed, mean + gain, 10.5 + seed + gain))
        found.append(record("same", seed, mean + (-1) ** seed * 0.02, 10.0 + seed, maps=mean + gain))
    return together(found, "base")


def test_differences_are_paired_by_seed_and_verdicts_know_which_way_is_better():
    """And a model that takes maps is shown with and without."""
    found = compared()
    gap = found["good"]["figures"]["closed_mean"]["difference"]
    reach = scipy_stats.t.ppf(0.975, 4) * statistics.stdev(GAINS) / math.sqrt(5)
    assert gap["value"] == pytest.approx(statistics.fmean(GAINS))
    assert (gap["low"], gap["high"]) == pytest.approx((gap["value"] - reach, gap["value"] + reach))
    assert gap["p"] == pytest.approx(scipy_stats.ttest_1samp(GAINS, 0).pvalue)
    own = found["base"]["figures"]["closed_mean"]
    assert own["high"] - own["low"] > 5 * (gap["high"] - gap["low"]), "what the seeds share cancels out"
    assert "difference" not in own
    good, same = found["good"], found["same"]
    assert good["figures"]["closed_mean"]["difference"]["verdict"] == BETTER
    assert good["figures"]["age"]["difference"]["verdict"] == WORSE
    assert good["without_map"] is None
    assert same["without_map"]["closed_mean"]["difference"]["verdict"] == SAME
    assert same["figures"]["closed_mean"]["difference"]["verdict"] == BETTER
    assert same["without_map"]["closed_mean"]["value"] < same["figures"]["closed_mean"]["value"]


def test_holm_corrects_over_variants():
    records = [record("base", seed, mean, 9.0) for seed, mean in enumerate(BASE)]
    edge = [0.01, 0.02, 0.03, 0.001, 0.012]  # p about .04: one comparison of six does not bear it
    for name in "abcdef":
        gains = edge if name == "a" else [0.01, -0.01, 0.012, -0.012, 0.001]
        means = [mean + gain for mean, gain in zip(BASE, gains, strict=True)]
        records += [record(name, seed, mean, 9.0) for seed, mean in enumerate(means)]
    gap = together(records, "base")["a"]["figures"]["closed_mean"]["difference"]
    assert (gap["verdict"], gap["held"]) == (BETTER, False)
    alone = together([r for r in records if r["variant"] in ("base", "a")], "base")
    assert alone["a"]["figures"]["closed_mean"]["difference"]["held"]


def test_a_control_is_another_baseline():
    records = [record("base", seed, mean, 9.0) for seed, mean in enumerate(BASE)]
    for seed, (mean, gain) in enumerate(zip(BASE, GAINS, strict=True)):
        records += [record("good", seed, mean + gain, 9.0), record("worse", seed, mean + gain / 2, 9.0)]
    found = together(records, "base", {"worse": "good"})
    assert found["worse"]["figures"]["closed_mean"]["difference"]["verdict"] == BETTER
    assert found["worse"]["to_control"]["closed_mean"]["difference"]["verdict"] == WORSE
    assert found["good"]["to_control"] is None
    said = words(found, "base", {"worse": "good"})[-1]
    assert said.startswith("`worse` against `good`: worse in all closed questions")


def test_words_say_a_loss_as_plainly_as_a_gain_and_one_seed_shows_nothing():
    found = together([record("base", 0, 0.7, 9.0), record("good", 0, 0.9, 5.0)], "base")
    gap = found["good"]["figures"]["closed_mean"]["difference"]
    assert (gap["low"], gap["verdict"]) == (None, SAME)
    assert words(found, "base", {}) == ["`good` against `base`: too few seeds to tell."]
    said = words(compared(), "base", {})
    assert said[0] == "`good` against `base`: better in all closed questions; worse in age."
    assert "no difference shown in" not in said[0]
    assert said[1].startswith("`same` against `base`: better in all closed questions")


def test_words_name_what_no_variant_has_above_chance():
    def verdicts(*lows):
        made = {
            str(n): {"figures": {"expression": {"low": low}, "gender": {"low": 0.8}}, "to_control": None}
            for n, low in enumerate(lows)
        }
        return words(made, "0", {})[len(lows) - 1 :]

    assert verdicts(0.11, 0.142) == [
        "Expression is at chance (14.3 %) in every variant: this budget says nothing of it."
    ]
    assert verdicts(0.11, 0.15) == verdicts(0.11, None) == []


def test_the_page_holds_every_variant_and_what_it_was_made_with():
    results = {"command": "python -m studies.ablation CONVERSATIONS OUT", "baseline": "base", "controls": {}}
    results |= {"says": {"base": "plain", "good": "better", "same": "alike"}, "variants": compared()}
    results |= {"images": 40, "people": 20, "sources": ["render"], "conversations": "c" * 64, "commit": "abc"}
    results["machine"] = {"processor": "a processor", "cores": 2, "versions": {"python": "3"}}
    text = page(results, "images/ablation.png")
    for part in ("| `good` | better |", "**+3.0 [+2.6, +3.4]**\\*", "without one", "a processor", "commit abc"):
        assert part in text
    assert drawn(results["variants"], "base").axes


@pytest.fixture
def conversations(tmp_path, face_rows, faces_table):
    """Conversations about faces that differ in hair, bangs and expression."""
    rows = []
    for number, row in enumerate(face_rows(20)):
        color = ("Brown_Hair", "Black_Hair")[number % 2]
        attributes = {"Brown_Hair": False, "Black_Hair": False, "Bangs": number % 3 == 0, "Wearing_Hat": False}
        caption = f"A woman with {('brown', 'black')[number % 2]} hair."
        rows.append(row | {"attributes": pairs(attributes | {color: True}), "caption": caption})
    reformat(settings.load("laptop"), faces_table(rows), tmp_path / "conversations")
    return tmp_path / "conversations"


def test_a_killed_ablation_goes_on_and_shares_what_is_alike(conversations, tmp_path, monkeypatch):
    loaded = settings.load("laptop")
    gentle = Variant(says="gentle", set=[*ablation().variants["base"].set, *GENTLE["set"]])
    chosen = ablation().model_copy(update={"variants": {**ablation().variants, "gentle": gentle}})
    monkeypatch.setattr(ablating, "ablation", lambda: chosen)
    trained = []
    train = running._trained

    def counted(work, cell, depth, *more):
        trained.append((cell.variant, cell.stages[depth]))
        if len(trained) == 5:
            raise KeyboardInterrupt
        return train(work, cell, depth, *more)

    monkeypatch.setattr(running, "_trained", counted)
    asked = {"variants": ["gentle", "everything"], "seeds": [3], "page": tmp_path / "page.md"}
    refuses(None, ablate, "laptop", TINY, conversations, tmp_path / "out", **asked, error=KeyboardInterrupt)
    assert not (tmp_path / "page.md").exists()
    results = ablate("laptop", TINY, conversations, tmp_path / "out", **asked)
    assert trained.count(("base", "align")) == 1, "base and gentle part only at specialize"
    assert sorted(trained[4:]) == sorted([("everything", "align"), *(("everything", s) for s in loaded.stages())])
    again = ablate("laptop", TINY, conversations, tmp_path / "out", **asked)
    assert again == results
    assert len(trained) == 8
    figures = results["variants"]["everything"]
    assert figures["without_map"]
    assert 0 <= figures["figures"]["scores"]["value"] <= 1
    assert figures["figures"]["closed_mean"]["n"] == 1
    alone = ablate("laptop", TINY, conversations, tmp_path / "other", variants=["gentle"], seeds=[3])
    files = [tmp_path / name / "cells" / f"{alone['cells'][1]}.json" for name in ("out", "other")]
    one, other = (json.loads(file.read_text())["figures"] for file in files)
    assert one == other


def test_an_unknown_variant_and_a_failing_cell_are_named(conversations, tmp_path, monkeypatch):
    asked = "laptop", TINY, conversations, tmp_path / "out"
    refuses("--variants nobody: choose among base, one_stage", ablate, *asked, variants=["nobody"])
    assert not (tmp_path / "out").exists()

    def diverge(*_, **__):
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr("facemllm.train.loop.run_stage", diverge)
    refuses("variant base, seed 0: the loss is nan", ablate, *asked, variants=["base"], seeds=[0])
