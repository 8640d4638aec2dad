"""The measured half of a model card."""

import re

from huggingface_hub import ModelCard

from facemllm.report import card
from facemllm.settings import load
from tests import evaluation_example as example


def text(evaluation, costs=None, *overrides):
    return card.card(load("laptop", list(overrides)), "a" * 64, evaluation, {}, ["render"], costs)


def test_the_card_says_what_was_measured():
    said = text(example.METRICS, example.COST, "cost.price_per_hour=3.6")
    results = said.split("## Results")[1].split("## ")[0]
    assert "| **attributes** | accuracy | 0.88 | 0.86 – 0.9 |" in results
    assert "zero_shot" not in results
    for part in (
        "Attributes in no training conversation (Wearing_Earrings), asked all the same: balanced_accuracy 0.62",
        "chance 0.5",
        "| attributes | gender | female | 140 | 0.86 (0.83–0.89) |",
        "| attributes | skin_tone | 8-10 | 12 | too few people |",
        "A gap is shown in 1 of 2 comparisons",
        "| attributes | gender | female – male | 0.14 (0.09–0.19) | < .001 |",
        "Logical relations broken by the answers: 0.031 (0.011–0.051); by the labels: 0 (",
        "(in brackets what chance gives a calibrated model): attributes 0.061 (0.012).",
        "Captions that contradict an answer: 0.12 (0.1–0.14); by the labels: 0.01 (",
        "Of the likeliest option, whatever the model writes: 0.7 (0.68–0.72).",
        "Change of mean balanced accuracy on blur pictures: -0.15 (-0.17–-0.13).",
        "Change of mean balanced accuracy without the map of face parts: -0.03 (-0.05–-0.01).",
        "beside 550 of 560 faces: exact, since the renderer drew them",
        "Scores of characteristics, read beside the text: 0.9 (0.88–0.92) right, the text 0.86 (0.84–0.88)",
        "| align | CPU, 2 threads, bf16 | 160.2 | 76,800 | 2,764,800 | 3.4e+12 | 1,300,000,000 | 0.1602 |",
    ):
        assert part in said


def test_the_card_says_what_the_figures_are_about():
    settings = load("laptop")
    said = card.card(settings, "a" * 64, example.METRICS, {"specialize": "b" * 64}, ["render"])
    assert "says nothing about real photographs" in said
    assert "Not for identifying" in said
    assert "| attributes · eye_color | balanced_accuracy | 0.18 | 0.15 – 0.21 | 560 |" in said
    assert f"| specialize | `{'b' * 64}` |" in said
    assert "What all of these allow: train a model on it; measure a model on it; put a model trained on it" in said
    other = card.card(settings, "a" * 64, example.METRICS, {}, ["celeba", "fairface"])
    assert "| CelebA (CelebFaces Attributes) | celeba-dataset-release-agreement" in other
    assert "What all of these allow: train a model on it; measure a model on it." in other
    assert "renderer" not in other
    assert len(card.short(settings, "a" * 64, example.METRICS, ["render"])) <= card.SHORT


def test_hubs_read_the_metrics_of_the_card():
    read = ModelCard(text(example.METRICS, example.COST))
    assert (read.data.pipeline_tag, read.data.model_name) == ("image-text-to-text", "face-mllm")
    assert "synthetic-data" in read.data.tags
    found = {(one.dataset_config, one.metric_type): one for one in read.data.eval_results}
    values = {("attributes", "balanced_accuracy"): 0.81, ("attributes", "accuracy"): 0.88}
    values |= {("closed_mean", "balanced_accuracy"): 0.8}
    assert {name: found[name].metric_value for name in values} == values
    assert found["age", "mae"].metric_name == "mean error, years"
    measured_on = {(one.dataset_name, one.dataset_split, one.dataset_revision) for one in found.values()}
    assert measured_on == {("render", "test", "cd" * 32)}
    assert read.text.lstrip().startswith("# face-mllm")
    # a card without metrics has a sound header, too
    nameless = {"value": 0.5, "low": None, "high": None, "n": 1}
    read = ModelCard(text({"tasks": {"age": example.figure(None, None, None, metric="mae"), "gender": nameless}}))
    assert not read.data.eval_results
    assert read.data.model_name == "face-mllm"


def test_the_limits_are_those_the_figures_show_and_what_was_not_measured_is_left_out():
    limits = text(example.METRICS).split("## Limits")[1].split("## ")[0]
    assert "- Not shown to be better than a constant answer: attributes eye_color." in limits
    assert "the surest gap: attributes by gender, female – male: 0.14 (0.09–0.19)." in limits
    assert "counted as wrong: attributes 1.3%, age 1.3%." in limits
    bare = text({"tasks": {}})
    for title in ("Zero-shot", "Groups of people", "What can be relied on", "Cost"):
        assert f"## {title}" not in bare
    assert "## Limits" in bare


def test_names_of_groups_are_words_and_nothing_else():
    odd = "a|b\n# <b>x"
    kind = example.kind({odd: example.group(0.5, 30)}, example.gap(odd, "c", 0.4, 0.001))
    said = text({"tasks": {}, "fairness": {"gender": {"skin_tone": kind}}})
    assert r"| gender | skin_tone | a\|b \# \<b\>x | 30 |" in said
    assert r"| gender | skin_tone | a\|b \# \<b\>x – c | 0.4 (" in said
    assert r"the surest gap: gender by skin_tone, a\|b \# \<b\>x – c:" in said


def test_no_gap_is_told_with_what_could_have_been_seen():
    kind = example.kind({"a": example.group(0.5, 30)}, example.gap("a", "c", 0.01, 0.9))
    said = text({"tasks": {}, "fairness": {"gender": {"skin_tone": kind}}})
    assert "A gap is shown in 0 of 1 comparisons (a task by a kind of group). Minimum detectable difference" in said
    assert "from the surest pair of groups to the least sure: gender 0.08–0.08." in said


KEPT = {"p", "p_holm", "degrees", "error", "own_error", "growth"}
"""Figures of tests, which say whether a gap is shown: they keep their values."""
NAMES = ("SHA-256", "1-3", "4-7", "8-10", "within_5", "3 × 5")


def numbered(value, paths, path=""):
    """The same metrics, but every number in them another one; `paths` says which number stands where."""
    if isinstance(value, dict):
        return {k: v if k in KEPT else numbered(v, paths, f"{path}.{k}") for k, v in value.items()}
    if isinstance(value, list):
        return [numbered(each, paths, f"{path}[]") for each in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    number = 10_001 + 7 * len(paths) if isinstance(value, int) else round(0.101 + 0.001 * len(paths), 3)
    paths[number] = path
    return number


def written(number):
    """The ways in which a card writes a number."""
    return {f"{number:.3g}", f"{number:.4g}", f"{number:,}", str(number), f"{number:.1%}"[:-1]}


def test_every_number_of_the_card_is_one_of_the_metrics_the_costs_or_the_decision():
    paths = {}
    metrics, costs = numbered(example.METRICS, paths, "metrics"), numbered(example.COST, paths, "cost")
    checks = [
        {
            "kind": "threshold",
            "key": "age",
            "value": 1.0,
            "low": 1.0,
            "high": 1.0,
            "limit": 1.0,
            "asked": 1.0,
            "default": 1.0,
        },
        {
            "kind": "budget",
            "key": "price",
            "value": 1.0,
            "low": None,
            "high": None,
            "limit": 1.0,
            "asked": 1.0,
            "default": 1.0,
        },
    ]
    checks = [{**numbered(check, paths, f"checks.{check['key']}"), "passed": False, "reason": "x"} for check in checks]
    worse = numbered({"value": 1.0, "low": 1.0, "high": 1.0, "limit": 1.0}, paths, "worse")
    loosened = [{"key": "promote.thresholds.age", **numbered({"value": 1.0, "default": 1.0}, paths, "loosened")}]
    decision = {"passed": False, "checks": checks, "loosened": loosened}
    decision["champion"] = {"version": 4711, "worse": [{"task": "age", **worse}]}
    settings = load("laptop")
    made = card.card(
        settings, "a" * 64, metrics, {}, ["render"], costs, decision=decision, code={"commit": "b" * 40, "dirty": False}
    )
    _, _, body = made.split("---\n", 2)
    known = {text for number in paths for text in written(number)}
    known |= {"4711", str(settings.seed), "95"}  # the version, the seed, "95 % interval"
    known |= {"1", "2"}  # gaps shown, of so many compared: counted, not stated
    known |= {".001", "4.0", "1.0"}  # "p < .001", licences
    body = re.sub(r"`[^`]*`", "", body)  # digests, names of files
    for name in (*NAMES, "CC0-1.0", "CC0"):
        body = body.replace(name, "")
    stray = [
        token for token in re.findall(r"(?<![\w.])-?\.?\d[\d,.]*(?:e[+-]\d+)?", body) if token.rstrip(".,") not in known
    ]
    assert stray == []
    # and the figures of every task, the gaps, the costs are there
    for path in (
        "metrics.tasks.attributes.value",
        "metrics.tasks.age.low",
        "checks.age.limit",
        "worse.value",
        "loosened.value",
    ):
        (number,) = [number for number, at in paths.items() if at == path]
        assert written(number) & set(re.findall(r"[\d.,]+", body)), path
    in_header = {one.metric_value for one in ModelCard(made).data.eval_results}
    assert in_header <= set(paths)
    assert {paths[number] for number in in_header} == {
        f"metrics.{path}.value"
        for task, entry in example.TASKS.items()
        for path in (f"tasks.{task}", *(f"tasks.{task}.also.{other}" for other in entry["also"]))
    } | {"metrics.closed_mean.value"}
