"""A recipe from several seeds: what is made, what is not made again, and what is said of a difference."""

import json
import os
import shutil
import statistics
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats as scipy_stats

from facemllm import settings
from facemllm.reformat.run import reformat
from tests.asked import with_attributes
from tests.refusing import refuses

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import repeats
from repeats_report import compared, costs, differences, facts, figures_of, markdown, means, rows, terminal

TINY = ["model.image_size=32", "train.precision=fp32", "train.threads=1", "evaluate.bootstrap=100"]
TINY += ["evaluate.baseline_pixels=8", "evaluate.generated_faces=0", "evaluate.disturbed_faces=2"]
TINY += [
    f"train.stages.{stage}.{key}"
    for stage in ("align", "instruct", "specialize")
    for key in ("steps=2", "batch_images=4", "turns_per_image=2")
]


@pytest.fixture
def conversations(face_rows, faces_table, tmp_path):
    made = with_attributes(face_rows(), "A woman with brown hair.")
    reformat(settings.load("laptop"), faces_table(made), tmp_path / "conversations")
    return tmp_path / "conversations"


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def works(conversations, out, *overrides, name="default", seeds=(0,)):
    return repeats.works(name, "laptop", [*TINY, *overrides], conversations, out, seeds, "test")


def test_a_seed_is_made_once_goes_on_where_it_was_and_has_a_specialist_of_its_seconds(
    conversations, tmp_path, monkeypatch
):
    import time

    from facemllm.train import torchrun

    trained, real = [], torchrun.train
    asked = []

    def train(stage, *given):
        if len(trained) == 1 and stage == "instruct":
            trained.append("interrupted")
            raise KeyboardInterrupt
        trained.append(stage)
        return real(stage, *given)

    monkeypatch.setattr(torchrun, "train", train)

    def here(function, *given):
        asked.append(function)
        function(*given, time.time() - 3)

    found = works(conversations, tmp_path / "out")
    refuses(None, repeats.repeat, found, None, here, error=KeyboardInterrupt)
    assert not found[0].record.exists()
    repeats.repeat(found, "specialist", here)
    assert trained == ["align", "interrupted", "instruct", "specialize"]
    made = len(asked)
    repeats.repeat(found, "specialist", here)
    assert (len(trained), len(asked)) == (4, made)

    ours, rival = repeats.records(tmp_path / "out", "test")
    assert (ours["variant"], rival["variant"]) == ("default", "specialist to default")
    assert ours["resumed"] is True
    assert list(ours["stages"]) == ["align", "instruct", "specialize"]
    assert ours["stages"]["align"]["start"] > 3, "the start of the process is in the first stage's"
    assert all(stage["operations"] > 0 and stage["faces"] == 8 for stage in ours["stages"].values())
    spent = rival["stages"]["training"]
    assert spent["start"] > 3
    assert spent["operations"] > 1e6 * spent["faces"]
    assert rival["seconds"] == pytest.approx(max(ours["seconds"], spent["start"] + 1), abs=0.01)
    metrics = json.loads((tmp_path / "out" / "default" / "seed-0" / "evaluation" / "metrics.json").read_text())
    assert (metrics["split"], metrics["seed"]) == ("test", 0)
    figures = ours["figures"]["without_map"]
    assert figures["closed_mean"] == metrics["closed_mean"]["value"]
    assert figures["attributes.eye_color"] == metrics["tasks"]["attributes"]["items"]["eye_color"]["value"]
    names = {"statements", "rewording", "disturbed: noise, kept out of training", "disturbed: blur"}
    assert names <= set(figures)
    theirs = rival["figures"]["without_map"]
    assert {"closed_mean", "age", "attributes.beard", "relations broken"} <= set(theirs)
    assert not {"caption", "statements", "zero_shot"} & set(theirs)
    page = markdown([ours, rival], "default", None)
    assert "| attributes.eye_color | default |" in page
    assert "seeds 0 went on from what was there" in page
    assert not (tmp_path / "out" / "default" / "seed-0" / "work").exists()


def test_what_was_made_otherwise_is_not_taken_for_the_same(conversations, tmp_path):
    (work,) = works(conversations, tmp_path / "out")
    work.folder.mkdir(parents=True)
    (work.folder / "key.json").write_text(json.dumps({"key": work.key}))
    assert works(conversations, tmp_path / "out") == [work]
    other = "train.stages.align.steps=3"
    refuses("was begun with other settings, data or code", works, conversations, tmp_path / "out", other)
    shutil.rmtree(work.folder)
    work.record.write_text(json.dumps({"key": work.key}))
    refuses(
        "was made with other settings, data or code; give another --name", works, conversations, tmp_path / "out", other
    )
    (same,) = works(conversations, tmp_path / "out", "promote.every_task=false")
    assert same.key == work.key
    work.record.unlink()
    (unasked,) = works(conversations, tmp_path / "out", "reformat.forms.statement=0.0")
    assert unasked.key != work.key, "training draws other questions"
    refuses("give a plain name", works, conversations, tmp_path / "out", name="../default")


def test_stages_can_be_chosen(conversations, tmp_path):
    def chosen(*stages):
        return repeats.works("once", "laptop", TINY, conversations, tmp_path, [0], "test", stages)

    (work,) = chosen("specialize")
    assert list(work.settings().stages()) == ["specialize"]
    assert work.settings().train.before("specialize") is None
    (whole,) = chosen()
    assert work.key != whole.key
    refuses("--stages polish: choose among align, instruct, specialize", chosen, "align", "polish")


def killed(begun):
    os.kill(os.getpid(), 9)


def diverged(begun):
    raise FloatingPointError("the loss is not finite")


def test_a_process_that_ends_without_a_word_or_diverges_is_one_line():
    refuses("was killed, maybe for memory; run the same command to go on", repeats._alone, killed)
    refuses("the loss is not finite", repeats._alone, diverged)


def record(variant, seed, closed, age=8.0, **more):
    figures = {"closed_mean": closed, "age": age, "attributes.eye_color": 0.3, "attributes.Bangs": 0.9}
    metrics = {"closed_mean": "balanced_accuracy", "age": "mae"}
    metrics |= {"attributes.eye_color": "balanced_accuracy", "attributes.Bangs": "balanced_accuracy"}
    stage = {"steps": 2, "seconds": 10.0 + seed, "start": 2.0, "faces": 8, "operations": 3e12}
    where = {"processor": "Xeon", "cores": 2, "versions": {"torch": "2.9"}}
    about = {"profile": "laptop", "overrides": [f"x={variant}"], "split": "test", "images": 540, "people": 270}
    return {
        **{"variant": variant, "seed": seed, "resumed": False, "seconds": 24.0, "processor_seconds": 20.0},
        **{"stages": {"align": stage, "instruct": stage}, "evaluation_seconds": 5.0, **about},
        **{"figures": {"without_map": figures}, "metrics": metrics, "machine": where, "commit": "ab" * 20, **more},
    }


FIRST, SECOND = (0.870, 0.881, 0.875), (0.884, 0.890, 0.889)
AGES = (8.1, 8.3, 8.0), (8.2, 8.2, 8.1)
RECORDS = [
    record(name, seed, closed, age)
    for name, values, ages in (("default", FIRST, AGES[0]), ("wide", SECOND, AGES[1]))
    for seed, (closed, age) in enumerate(zip(values, ages, strict=True))
]


def test_differences_are_those_of_scipy_and_corrected_over_all_figures():
    found = compared(RECORDS, "default")["wide"]["figures"]
    gap = found["closed_mean"]["difference"]
    test = scipy_stats.ttest_rel(SECOND, FIRST)
    between = test.confidence_interval()
    assert [gap[end] for end in ("value", "low", "high", "p")] == pytest.approx(
        [statistics.fmean(SECOND) - statistics.fmean(FIRST), between.low, between.high, test.pvalue]
    )
    other = scipy_stats.ttest_rel(AGES[1], AGES[0]).pvalue
    # an item's difference is always zero here, and has a p of 1
    corrected = min(1, 3 * test.pvalue)
    assert gap["p_holm"] == pytest.approx(corrected)
    assert found["age"]["difference"]["p_holm"] == pytest.approx(max(corrected, min(1, 2 * other)))
    assert "p_holm" not in found["attributes.Bangs"]["difference"]


def test_tables_hold_each_seed_mean_and_spread_and_say_how_the_recipe_was_chosen():
    head, *body = rows(RECORDS, "default")
    assert head == ["figure", "recipe", "seed 0", "seed 1", "seed 2", "mean", "sd", "against default", "p (Holm)"]
    assert body[0] == ["closed_mean", "default", "0.870", "0.881", "0.875", "0.875", "0.0055", "", ""]
    assert body[1][:2] == ["closed_mean", "wide"]
    assert body[1][7].startswith("+0.012 [")
    assert body[3][:6] == ["age (less is better)", "wide", "8.20", "8.20", "8.10", "8.17"]
    assert not any("Bangs" in row[0] for row in body)
    assert means(RECORDS, "default")[:2] == [
        ["figure", "default", "wide"],
        ["closed_mean", "0.875 (0.0055)", "0.888 (0.0032)"],
    ]
    assert costs(RECORDS)[1] == ["default", "align", "11 (10 to 12)", "2 (2 to 2)", "8", "3.0"]
    assert costs(RECORDS)[3][1:4] == ["together", "22 (20 to 24)", "4 (4 to 4)"]
    for rendered in (terminal, markdown):
        assert "Validation was looked at 7 times" in rendered(RECORDS, "default", 7)
        assert "is not stated (--looks)" in rendered(RECORDS, "default", None)
        assert "Xeon, 2 cores, commit abababababab, torch 2.9" in rendered(RECORDS, "default", None)


def test_a_difference_is_bold_where_it_stands_the_correction():
    others = [record("sure", seed, closed - 0.1 - seed / 1e5) for seed, closed in enumerate(FIRST)]
    found = compared([*RECORDS, *others], "default")
    wide, sure = (found[name]["figures"]["closed_mean"]["difference"]["p_holm"] for name in ("wide", "sure"))
    assert sure < 0.05 < wide
    head, closed, *_ = differences([*RECORDS, *others], "default")
    assert head == ["figure", "wide", "sure"]
    assert closed == ["closed_mean", "+0.012 [+0.005, +0.020]", "**-0.100 [-0.100, -0.100]**"]
    assert "Differences to" not in markdown(RECORDS[:3], "default", 0)


def test_what_does_not_compare_is_said():
    other = {"processor": "EPYC", "cores": 2, "versions": {}}
    odd = [*RECORDS, record("one", 0, 0.9, resumed=True, machine=other)]
    said = facts(odd, "default", 0)
    assert any("Not all runs are of one processor" in line for line in said)
    assert any(line.startswith("one: seeds 0 went on from what was there") for line in said)
    assert any(line.endswith("no better or worse is said: one.") for line in said)
    gap = compared(odd, "default")["one"]["figures"]["closed_mean"]["difference"]
    assert (gap["low"], gap["p_holm"]) == (None, None)


def test_figures_without_a_value_are_left_out():
    metrics = {"closed_mean": None, "tasks": {}, "disturbed": {"blur": {"after": {"value": None}, "trained": True}}}
    assert figures_of(metrics) == ({}, {})
