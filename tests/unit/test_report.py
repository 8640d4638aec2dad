import io
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from facemllm.report import plots, run
from facemllm.report.kit import brief, decimals, estimate, p_value, share
from facemllm.report.terminal import results_table
from facemllm.scoring.figures import measure, trust
from tests import evaluation_example as example
from tests.pages import HOSTILE, Page
from tests.pictures import encode


def figure(value, low, high, constant, pixels=0.4, metric="balanced_accuracy", **more):
    unit = "years" if metric == "mae" else ""
    more |= {"metric": metric, "higher_is_better": metric != "mae", "unit": unit}
    return example.figure(value, low, high, constant, pixels, **more)


ITEMS = {
    "eye_color": figure(0.18, 0.15, 0.21, 0.17),
    "Wearing_Earrings": figure(0.6, 0.55, 0.65, 0.5, 0.63),
    "Wearing_Hat": figure(0.98, 0.96, 0.99, 0.5),
}
TASKS = {
    "attributes": figure(0.81, 0.79, 0.83, 0.35, 0.55, items=ITEMS),
    "age": figure(9.5, 8.8, 10.1, 16.4, 12.9, metric="mae"),
}
LIMIT = {"kind": "threshold", "key": "age", "passed": True, "limit": 12, "reason": "age 9.5 is within the limit 12"}
LICENCE = {"key": "render", "name": "Drawn heads", "licence": f"CC0 {HOSTILE}", "status": "active"}
REFUSED = {"passed": False, "reasons": [f"expression 0.41 is below the threshold 0.55 {HOSTILE}"], "checks": [LIMIT]}
SUMMARY = {
    **{"run": f"morning {HOSTILE}", "profile": "laptop", "seconds": 412.0, "device": "cpu", "endpoint": None},
    "steps": [
        {"name": "ingest", "seconds": 68.2, "cached": False, "digest": "ab" * 32, "figure": "4,000 faces"},
        {"name": "annotate", "seconds": 0.1, "cached": True, "digest": "cd" * 32},
    ],
    "tasks": TASKS,
    "gate": REFUSED,
    "model": {"digest": "ef" * 32, "name": "face-mllm", "version": 3},
    "approval": {"state": "pending", "who": HOSTILE},
    "commit": "1234567+changes",
    "overrides": ["seed=3", f"promote.model_name={HOSTILE}"],
    "sources": [{**LICENCE, "uses": ["third_party"]}],
    "cost": {"align": {"seconds": 160.2, "samples": 76800, "energy": None}},
}
CURVES = {
    "align": [{"step": n, "loss": 5 / (n + 1), "learning_rate": 1e-3, "images_per_second": 400.0} for n in range(500)],
    "instruct": [],
}
for number, point in enumerate(CURVES["align"]):
    point |= {"loss/characteristics": 1 / (number + 1), "loss/task/head_pose": 2.0, "grad_norm": 1.0}
    point |= {"tokens_per_second": 9000.0, "mfu": 0.12, "memory_bytes": 1.5 * 2**30}


def sample(item, question, truth, written, likeliest=None, probability=None):
    row = {"image_id": "ab" * 32, "task": "attributes", "item": item, "question": question, "truth": truth}
    return row | {"written": written, "likeliest": likeliest, "probability": probability}


TRAINING = {
    "curves": CURVES,
    "samples": {
        "align": [
            sample("hair", "Which hair?", "Brown_Hair", "brown brown", "Brown_Hair", 0.61),
            sample("caption", "Describe it.", None, HOSTILE),
        ],
        f"second {HOSTILE}": [sample("caption", "Describe it.", None, HOSTILE)],
    },
    "pictures": {"ab" * 32: encode(np.zeros((16, 16, 3), np.uint8), "JPEG")},
    "relations": [
        {"relation": "Bald implies No_Hair", "checked": 900, "broken": 9, "rate": 0.01, "enforced": True},
        {"relation": HOSTILE, "checked": 0, "broken": 0, "rate": None, "enforced": False},
    ],
    "branches": {"segmentation": {"mode": "append", "tokens": 9}},
}


def read(summary, metrics=None, source="render"):
    """The words of a run's page."""
    return Page(run.page(summary, metrics or {}, [], {}, source)).text


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "evaluation"
    (folder / "samples").mkdir(parents=True)
    questions = [
        ("gender", "accuracy", "male", "a man", "male", 1.0),
        ("Bangs", "accuracy", "no", "yes", "yes", 0.0),
        ("age", "mae", "37.4", "about 40 years old", "41.20", 3.8),
        ("caption", "fact_f1", "gender=male", HOSTILE, "gender=male", 0.5),
        ("Hat", "accuracy", "no", "maybe a hat", None, 0.0),
        ("Chubby", "accuracy", "no", "(none of the options; likeliest perhaps yes)", None, 0.0),
    ]
    columns = ("question", "metric", "answer", "raw", "parsed", "score")
    rows = [dict(zip(columns, (f"What of {name}?", *values), strict=True)) for name, *values in questions]
    entries = []
    for index in range(6):
        Image.new("RGB", (64, 64), (40 * index, 90, 160)).save(folder / "samples" / f"{index:02d}.jpg")
        entries.append({"image": f"{index:02d}.jpg", "image_id": f"{index:064x}", "questions": rows})
    (folder / "samples" / "samples.json").write_text(json.dumps(entries))
    metrics = {"split": "test", "n_images": 560, "n_subjects": 280, "tasks": TASKS}
    metrics["closed_mean"] = figure(0.8, 0.78, 0.82, 0.33, 0.55)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


@pytest.fixture(scope="module")
def page(evaluation):
    """The page of a run with its evaluation and training."""
    run.write_report(evaluation / "report.html", SUMMARY, evaluation, TRAINING)
    return (evaluation / "report.html").read_text()


def test_report_is_one_sound_file(page):
    shown = Page(page)
    kinds = [link.split(";")[0].removeprefix("data:image/") for link in shown.links]
    assert kinds == ["svg+xml"] * 2 + ["jpeg"] * 7  # loss and its terms, then faces
    assert HOSTILE not in page
    # as words: title, heading, reason, person, override, licence, six captions, relation, stage, two samples
    assert shown.text.count(HOSTILE) == 16


@pytest.mark.parametrize(
    "said",
    [
        "say nothing about real photographs",
        "Refused",
        "expression 0.41 is below the threshold 0.55",
        "age 9.5 is within the limit 12",
        "Not shown to be learnt (interval does not clear that of a constant answer): attributes eye_color.",
        "0.810 [0.790, 0.830]",
        "9.50 [8.80, 10.10]",
        "560 images of 280 people",
        "6 min 52 s",
        " abababababab ",  # a digest is cut short
        "pending",
        "ef" * 32,
        "76,800",
        "yes ✗ wrong, truth no",
        "male ✓ right",
        "41.20 · truth 37.4 · off by 3.8",
        "unreadable: “maybe a hat”",
        "no answer (none of the options; likeliest perhaps yes) ✗; truth no",
        "400 faces/s · 9,000 tokens/s · 12% of the peak operations · 1.50 GiB · rate up to 1.0e-03",
        *("loss of characteristics", "loss of task head pose", "learning rate", "norm of the gradient"),
        "1 of 2 relations were enforced",
        "Bald implies No Hair 900 9 1.0% enforced",
        "– left out",
        "segmentation mode append",
        "Which hair? Brown Hair",
        "brown brown (Brown Hair 61.0%)",
        "question truth after align after",
        "commit of the code 1234567+changes",
        f"profile laptop, --set seed=3 , --set promote.model_name={HOSTILE}",
        f"Drawn heads render CC0 {HOSTILE} active third party",
        "age mean error, years ↓ 9.50 [8.80, 10.10] 16.40 12.90 42 % ≤ 12 560 1.3%",  # beside the gate's limit
    ],
)
def test_report_says_everything_it_must(page, said):
    assert said in Page(page).text


@pytest.fixture(scope="module")
def full():
    """The words of a report of an evaluation that has every part."""
    words = read({"run": "full", "tasks": example.TASKS, "cost": example.COST}, example.METRICS)
    assert "None" not in words
    assert "nan" not in words.lower()
    return words


@pytest.mark.parametrize(
    "said",
    [
        "Attributes held out of training: Wearing Earrings.",
        "The interval lies above chance",
        "wrong: 0.620 [0.570, 0.670] (1.3% unreadable)",
        "the likeliest option were taken whatever it writes: 0.700 [0.680, 0.720]",
        "accuracy 0.880 [0.860, 0.900]",
        "within 5 years 0.310 [0.290, 0.330]",
        *("0.2%", "0.80 years", "80 % power"),
        "A gap is shown in 1 of 2 comparisons",
        "attributes gender 0.140 [0.090, 0.190] female – male < .001",
        "skin tone -0.020 [-0.070, 0.030] 1-3 – 4-7 0.400",
        "8-10 too few people for a figure",
        "gender too few people for a figure in 2 of 2 groups",
        "female x 1-3 0.850",
        "break it in 3.1% [1.1, 5.1] of 2,000 cases, the true labels in 0.0%",
        "No Beard excludes Goatee 5.0% 0.0% 560",
        "in words that training never used 93.0% [91.0, 95.0] 79.0% [77.0, 81.0] 81.0% [79.0, 83.0] – 900",
        "81.0% [79.0, 83.0] 70.0% [68.0, 72.0] 92.0% [90.0, 94.0] 55.0% 700",
        "attributes 0.061 0.012 4,000",
        "no answers with probabilities",
        "profile 0.700 [0.680, 0.720] 40 500",
        "blurred 0.800 0.650 [0.630, 0.670] -0.150 [-0.170, -0.130] worse 100",
        "occluded too few people for a figure 3 12",
        "poor JPEG 0.800 [0.780, 0.820] 0.800 [0.780, 0.820] 0.000 [-0.020, 0.020] no change shown",
        "of kinds that training shows, too before after [95 %] change [95 %] faces blurred",
        "of kinds kept out of training before after [95 %] change [95 %] faces poor JPEG",
        "the same faces before after [95 %] change [95 %] faces without the map of face parts",
        "41 faces of 12 people show it, too few people to go by . All of it is answered right in 70.0% [68.0, 72.0]",
        "expected 90.0% [88.0, 92.0] , difference -20.0% [-22.0, -18.0] : fewer than when seen apart",
        "Dark Brown Hair 80.0% [78.0, 82.0] 95.0% [93.0, 97.0] -15.0% [-17.0, -13.0] 0.0% 60.0% 103 95",
        "Bangs with Brown Hair No face of this split shows it and is asked about all of it.",
        "the same answer in 97.0% [95.0, 99.0] of 640 questions; 1.0% of its free answers cannot be read",
        "Neither way gave an answer that can be read in 0.4%, which is no agreement",
        "contradicts the model's own answer in 12.0% [10.0, 14.0] of 900 cases, the true labels in 1.0%",
        "the caption agrees on age 12.0% 1.0% 900",
        "anger 30 9 1 happiness 4 60 0",
        "scores 90.0% [88.0, 92.0] 0.850 5,000 text 86.0% [84.0, 88.0] 0.810 5,000",
        "Both say the same in 94.0% [92.0, 96.0]",
        "(700 cases), the scores break 2.0% [0.0, 4.0] of them, the text 4.0%",
        "Bald 400 10.0% 97.0% 95.0% 0.900 0.840 98.0%",
        "at most one of Bald, Bangs 300 1.0% 2.0% 0.0%",
        "without the map of face parts",
        "a map of face parts beside 550 of 560 faces. The renderer made them",
        "align CPU, 2 threads, bf16 2 min 40 s 76,800 2,764,800 3.4 TFLOP 1.21 GiB",
        "evaluate CPU, 2 threads 20.0 s 560 – – 0.84 GiB",
        "together – 3 min 00 s – – – –",  # what one step does not tell has no sum
        "reports no energy",
    ],
)
def test_every_part_of_an_evaluation_is_told(full, said):
    assert said in full


def test_zero_shot_has_a_section_of_its_own_and_fairness_says_when_nothing_is_shown_or_compared(full):
    assert full.index("0.620 [0.570, 0.670]") > full.index("Zero-shot: attributes never seen in training")
    assert "zero shot" not in full.split("Zero-shot")[0]  # not among what was trained
    alone = {"gender": example.kind({"female": example.group(0.5, 90)})}
    assert "No two groups have enough people to be compared." in read({}, {"fairness": {"age": alone}})
    alike = {"gender": example.kind({}, example.gap("a", "b", 0.01, 0.9))}
    said = read({}, {"fairness": {"age": alike}})
    assert "A gap is shown in none of 1 comparisons" in said
    assert "Minimum detectable difference, from the surest pair of groups to the least sure: age 0.08–0.08." in said


def test_every_part_may_be_absent(monkeypatch):
    monkeypatch.setattr(plots, "svg", lambda figure: b"")  # drawn by `full`
    for part in example.METRICS:
        read({"run": part}, {**example.METRICS, part: None})


def test_a_figure_says_how_far_it_has_come():
    """Two figures that are both learnt do not look the same."""
    rows = {"Smiling": figure(0.55, 0.52, 0.58, 0.5), **ITEMS}
    words = read({"tasks": {"attributes": TASKS["attributes"] | {"items": rows}}}).split("Further metrics")[0]
    assert "eye color balanced accuracy ↑ 0.180 [0.150, 0.210] 0.170 0.400 not learnt" in words
    assert "Smiling balanced accuracy ↑ 0.550 [0.520, 0.580] 0.500 0.400 10 % 560" in words
    assert "Wearing Hat balanced accuracy ↑ 0.980 [0.960, 0.990] 0.500 0.400 96 % 560" in words
    assert "0.500 0.630 20 % below pixels" in words  # better than a constant, worse than a linear model


def test_what_is_worse_than_nothing_carries_a_warning():
    rows = {"hair color": figure(0.1, 0.08, 0.12, 0.2)}
    words = read({"tasks": {"attributes": TASKS["attributes"] | {"items": rows}}})
    assert "0.100 [0.080, 0.120] 0.200 0.400 worse than a constant answer" in words
    ways = {"statement": {"accuracy": figure(0.61, 0.6, 0.62, 0.5), "agreement": {}, "blind": 0.73, "n": 700}}
    metrics = example.METRICS | {"consistency": {"ways": ways}}
    assert "73.0% worse than without the picture 700" in read({}, metrics)
    said = results_table({"tasks": example.TASKS, "trust": trust(metrics)}).caption
    assert "worse than without the picture[/]: asked as statement, 61.0% right against 73.0%" in said
    assert "worse than without the picture" not in read({}, example.METRICS)


def test_a_gap_stands_beside_the_limit_of_the_gate_or_its_lack():
    gate = {"passed": True, "reasons": [], "checks": [{"kind": "fairness", "key": "gender", "limit": 0.2}]}
    gate["checks"][0] |= {"passed": True, "reason": "gender is fair"}
    assert "limit of the gate" not in read({}, example.METRICS)
    words = read({"gate": gate}, example.METRICS)
    assert "limit of the gate" in words
    assert "none is set" in words
    gate["checks"][0]["key"] = "attributes"
    assert "≤ 0.2" in read({"gate": gate}, example.METRICS)
    assert "loosened" not in read({"gate": gate}, example.METRICS)
    gate["checks"][0] |= {"asked": 0.2, "default": 0.15, "change": "loosened"}
    assert "gender is fair 0.2 0.15 (loosened)" in read({"gate": gate}, example.METRICS)


def test_real_data_and_a_run_without_overrides_or_gate_or_that_stopped_early():
    assert "settings profile ci, as it stands" in read({"run": "r", "profile": "ci", "overrides": []})
    assert "16.40 12.90 42 % 560 1.3%" in read({**SUMMARY, "gate": None})
    summary = {"run": "r", "profile": "ci", "steps": [], "tasks": {}, "gate": None, "model": None, "cost": {}}
    words = read(summary, source="celeba")
    said = ("come from the source 'celeba'", "has not come to the gate", "synthetic")
    assert [part in words for part in said] == [True, True, False]


def test_scales_survive_odd_figures():
    def drawn(one):
        html = run.page({"tasks": {"age": {**one, "items": {}}}}, {}, [], {}, "render")
        return html.split("<tbody>")[1]

    assert "no figure" in drawn(figure(None, None, None, None, None))
    alone = drawn(figure(0.5, None, None, None, None))
    assert 'class="point" style="left:50.0%"' in alone
    assert 'class="interval"' not in alone
    assert 'class="mark"' not in alone
    assert 'class="point"' in drawn(figure(0.0, 0.0, 0.0, 0.0, 0.0, metric="mae"))
    whole = drawn(figure(0.8, 0.7, 0.9, 0.2, 0.5))
    for mark, place in (("mark", 20), ("pixels", 50), ("point", 80)):
        assert f'class="{mark}" style="left:{place}.0%"' in whole
    assert 'class="interval" style="left:70.0%;width:20.0%"' in whole


def test_curves_survive_odd_points():
    assert plots.curve([{"step": 1, "loss": 2.0}], {"loss": ""}) is None
    points = [{"step": n, "loss": value} for n, value in enumerate([2.0, float("nan"), 2.0, None, 1.0])]
    figure = plots.curve(points, {"loss": "", "absent": "no such metric"})
    assert len(figure.axes) == 1
    assert list(figure.axes[0].lines[0].get_xdata()) == [0, 2, 4]
    assert plots.svg(figure) == plots.svg(plots.curve(points, {"loss": ""}))
    assert plots.curve_in_words(points) == "loss from 2 to 1 over 3 points"


def test_a_probability_is_never_a_bare_zero_and_every_metric_says_how_it_is_written():
    assert [p_value(p) for p in (None, 0.0, 0.0004, 0.001, 0.7)] == ["–", "< .001", "< .001", "0.001", "0.700"]
    error = measure({"metric": "mae", "unit": "years"})
    assert (error.long, error.short, error.arrow, error.digits) == ("mean error, years", "mae (years)", "↓", 2)
    within = measure({"metric": "mae", "unit": "years"}, "within_5")
    assert (within.long, within.arrow, within.digits) == ("within 5 years", "↑", 3)
    assert measure({"metric": "balanced_accuracy", "unit": "years"}).long == "balanced accuracy"


@pytest.mark.parametrize(
    ("low", "high", "most", "kept"),
    [
        (0.865, 0.882, 3, 3),  # 0.0085 would bear four
        (0.4, 0.7, 3, 2),  # 0.15
        (0.8, 0.9992, 3, 2),  # 0.0996 is 0.10
        (7.7, 9.1, 2, 2),  # 0.70
        (7.0, 9.6, 2, 1),  # 1.3
        (10.0, 40.0, 2, 0),  # 15
        (100.0, 400.0, 2, 0),
        (1.0, 1.0, 3, 3),
        (None, None, 3, 3),
    ],
)
def test_figures_have_the_digits_that_their_interval_supports(low, high, most, kept):
    assert decimals({"value": 0.5, "low": low, "high": high}, most) == kept


def test_every_way_to_write_a_figure_rounds_it_by_its_interval():
    wide = {"value": 0.55432, "low": 0.41234, "high": 0.71234}
    assert estimate(wide).striptags() == "0.55 [0.41, 0.71]"
    assert share(wide).striptags() == "55% [41, 71]"
    assert brief(wide) == "0.55 (0.41–0.71)"
    years = {"value": 8.4321, "low": 7.0321, "high": 9.6321, "metric": "mae", "unit": "years"}
    assert estimate(years, 2).striptags() == "8.4 [7.0, 9.6]"
    figure = {**years, "baselines": {"constant": 16.4, "pixels": 12.9}, "higher_is_better": False, "n": 9}
    cells = [next(iter(column.cells)) for column in results_table({"tasks": {"age": figure}}).columns]
    assert cells[2:4] == ["8.4", "7.0 9.6"]


def test_captions_are_also_shown_without_numbers():
    also = {"fact_f1_without_numbers": {"value": 0.841, "low": 0.83, "high": 0.85}}
    kinds = {"age": {"value": 0.18, "n": 540}, "beard": {"value": 0.5, "n": 100}}
    caption = figure(0.716, 0.7, 0.73, 0.3, metric="fact_f1", also=also, recall_by_kind=kinds)
    lines = results_table({"tasks": {"caption": caption}})
    assert [list(column.cells)[1] for column in lines.columns][:4] == [
        *("  also", "fact_f1_without_numbers", "0.841", "0.830 0.850")
    ]
    words = read({"run": "a", "tasks": {"caption": caption}}, {"tasks": {"caption": caption}})
    assert "F1 of facts without numbers 0.841 [0.830, 0.850]" in words
    assert "recall: age 18.0%, beard 50.0%" in words


def test_table_shows_items_beneath_tasks_and_dims_what_is_not_learnt():
    table = results_table({"tasks": TASKS, "closed_mean": figure(0.8, 0.78, 0.82, 0.33)})
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table)
    lines = [line for line in console.export_text().splitlines() if line.strip()]
    names = [line.split("  ")[0].strip() or line.split()[0] for line in lines[2:]]
    assert names == ["all closed questions", "attributes", "eye_color", "Wearing_Earrings", "Wearing_Hat", "age"]
    assert "0.180" in lines[4]
    assert "0.150 0.210" in lines[4]
    assert "mae (years)" in lines[7]
    assert [row.style for row in table.rows] == [None, None, "dim", None, None, None]


def test_table_ends_with_consistency_and_the_surest_gap():
    def caption(metrics):
        return results_table({"tasks": example.TASKS, "trust": trust(metrics)}).caption

    assert caption(example.METRICS) == (
        "broken logical relations: 3.1% (the labels 0.0%)\n"
        "captions that contradict an answer: 12.0%\n"
        "combination held out of training, Eyeglasses with Dark Brown Hair: all right in 70.0% [68.0%, 72.0%] of 41 "
        "faces of 12 people, 90.0% [88.0%, 92.0%] expected from faces that show one of them; the constant answer 0.0%; "
        "too few people to go by\n"
        "combination held out of training, Bangs with Brown Hair: no face shows it and is asked about it\n"
        "gaps between groups of people: shown in 1 of 2; "
        "the surest: attributes by gender, female – male +0.140 [+0.090, +0.190]\n"
        "minimum detectable difference: attributes 0.08–0.08"
    )
    fair = {"age": {"gender": example.kind({}, example.gap("a", "b", 0.01, 0.9))}}
    assert caption({"fairness": fair}) == (
        "gaps between groups of people: none shown in 1 comparisons\nminimum detectable difference: age 0.08–0.08"
    )
    assert caption({}) is None
    # nor does a model say anything that says nothing readable
    nothing = {"value": None, "low": None, "high": None}
    trusted = {"consistency": {"model": nothing, "truth": nothing, "captions": {"model": nothing}}, "gaps": {}}
    assert results_table({"tasks": TASKS, "trust": trusted}).caption is None
