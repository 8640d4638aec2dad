"""Names under which MLflow keeps an evaluation, its tables and its figures."""

import json

import pytest

from facemllm.report import plots
from facemllm.scoring import figures
from tests import evaluation_example as example

FLAT = figures.evaluation_metrics(example.METRICS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attributes/balanced_accuracy", 0.81),
        ("attributes/refused", 0.002),
        ("attributes/minimum_detectable_difference", 0.031),
        ("attributes/also/accuracy", 0.88),
        ("attributes/Wearing_Hat/balanced_accuracy_low", 0.96),
        ("attributes/baseline_constant", 0.5),
        ("attributes/eye_color/baseline_constant", 0.17),
        ("zero_shot/Wearing_Earrings/balanced_accuracy", 0.62),
        ("closed_mean/balanced_accuracy", 0.8),
        ("fairness/attributes/gender/female", 0.86),
        ("fairness/attributes/gender/largest_gap/value", 0.14),
        ("fairness/attributes/gender/largest_gap/p_holm", 0.0004),
        ("fairness/gaps/shown", 1.0),
        ("fairness/gaps/compared", 2.0),
        ("consistency/model/value", 0.031),
        ("consistency/truth/value", 0.0),
        ("consistency/unseen/agreement/low", 0.91),
        ("consistency/captions/model/value", 0.12),
        ("consistency/captions/truth/value", 0.01),
        ("calibration/attributes/ece", 0.061),
        ("calibration/attributes/expected", 0.012),
        ("zero_shot/also/by_likelihood", 0.7),
        ("slices/profile/closed_mean/value", 0.7),
        ("disturbed/blur/change/high", -0.13),
        ("combinations/Eyeglasses with Dark_Brown_Hair/all/value", 0.7),
        ("combinations/Eyeglasses with Dark_Brown_Hair/difference/high", -0.18),
        ("generation/agreement/value", 0.97),
        ("generation/by_task/attributes/value", 0.98),
        ("generation/unreadable", 0.01),
        ("generation/both_unreadable", 0.004),
    ],
)
def test_every_number_has_its_stable_name(name, value):
    assert FLAT[name] == value


def test_what_is_unknown_or_too_much_is_no_metric():
    assert not [name for name in FLAT if "8-10" in name]  # too few people
    assert not [name for name in FLAT if "female x 1-3" in name]  # groups of two kinds at once stand in the table
    assert all(isinstance(value, float) for value in FLAT.values())
    assert not [name for name in figures.task_metrics(example.TASKS, items=False) if "Wearing" in name]
    assert "t/balanced_accuracy_low" not in figures.task_metrics({"t": example.figure(0.9, None, None)})
    assert figures.evaluation_metrics({"tasks": {}}) == {"fairness/gaps/compared": 0.0, "fairness/gaps/shown": 0.0}
    assert figures.numbers({"a": float("nan"), "b": None, "c": "x"}) == {}
    odd = {"tasks": {}, "fairness": {"age": {"age_band": example.kind({"<18 & co": example.group(0.5, 90)})}}}
    assert "fairness/age/age_band/_18 _ co" in figures.evaluation_metrics(odd)  # MLflow refuses such characters


def test_tables_have_a_row_a_figure_a_group_and_a_gap():
    tables = figures.tables(example.METRICS, [])
    results = [(r["task"], r["item"], r["metric"]) for r in tables["results"]]
    assert results[:2] == [("attributes", "", "balanced_accuracy"), ("attributes", "", "accuracy")]
    assert {"task": "attributes", "kind": "skin_tone", "group": "8-10"}.items() <= tables["fairness"][4].items()
    gaps = [(r["task"], r["a"], r["b"]) for r in tables["fairness_gaps"]]
    assert gaps == [("attributes", "female", "male"), ("attributes", "1-3", "4-7")]
    assert set(figures.tables({"tasks": {}}, [])) == set()
    columns = figures.columns(tables["results"])
    assert len({len(column) for column in columns.values()}) == 1
    uneven = {"a": example.figure(0.5, 0.4, 0.6), "b": {"metric": "mae", "value": 1.0, "baselines": {"constant": 2.0}}}
    assert figures.columns(figures.results(uneven))["pixels"] == [0.4, None]


def test_sampled_answers_do_not_depend_on_order():
    named = [{"task": f"t{n % 2}", "sample_id": f"{n * 37 % 1009:04d}"} for n in range(1000)]
    rows = [dict.fromkeys(figures.ANSWERS, "") | row for row in named]
    sample = figures.sample_answers(rows, per_task=5)
    assert sample == figures.sample_answers(reversed(rows), per_task=5)
    assert [row["task"] for row in sample] == ["t0"] * 5 + ["t1"] * 5
    least = sorted(row["sample_id"] for row in rows if row["task"] == "t0")[:5]
    assert [row["sample_id"] for row in sample[:5]] == least


def test_the_summary_tells_the_surest_gap_and_flatten_gives_text_by_dotted_name():
    values = {"a": {"b": 1, "c": None, "d": {}}, "e": "text", "f": [1, 2]}
    assert figures.flatten(values) == {"a.b": "1", "a.c": "null", "a.d": "{}", "e": "text", "f": "[1, 2]"}
    summary = figures.trust(example.METRICS)
    assert (summary["gaps"]["surest"]["task"], summary["gaps"]["surest"]["value"]) == ("attributes", 0.14)
    assert figures.trust({})["gaps"] == {"compared": 0, "shown": 0, "surest": None, "minimum_detectable_difference": {}}
    json.dumps(summary)
    assert figures.trust_metrics(summary)["fairness/gaps/shown"] == 1.0


def test_figures_are_drawn_of_whatever_there_is(tmp_path):
    drawn = plots.drawn(example.METRICS)
    assert set(drawn) == {"intervals", "fairness", "reliability", "confusion/expression.expression"}
    for name, figure in drawn.items():
        figure.savefig(tmp_path / f"{name.replace('/', '-')}.png")
    panels = [axis.get_xlabel() for axis in drawn["intervals"].axes]
    assert len(set(panels)) == len(panels)  # one a metric
    assert {"balanced_accuracy", "mae years"} < set(panels)
    fairness = [label.get_text() for label in drawn["fairness"].axes[0].get_yticklabels()]
    assert fairness == ["gender  female  (140)", "gender  male  (140)", "skin_tone  1-3  (90)", "skin_tone  4-7  (150)"]
    cells = [text.get_text() for text in drawn["confusion/expression.expression"].axes[0].texts]
    assert cells == ["30", "9", "1", "4", "60", "0"]
    nothing = plots.drawn({"tasks": {}})
    assert set(nothing) == {"intervals"}
    nothing["intervals"].savefig(tmp_path / "nothing.png")


def test_names_with_dollars_are_no_mathematics(tmp_path):
    body = {"labels": ["$a_$", "b"], "counts": [[1, 2], [3, 4]]}
    groups = {"$x_$": example.kind({"$<_$": example.group(0.5, 90)})}
    metrics = {"tasks": {"$t_$": example.figure(0.5, 0.4, 0.6)}, "fairness": {"$t_$": groups}}
    metrics |= {"calibration": {"$t_$": {"bins": [{"n": 1, "confidence": 0.5, "accuracy": 0.5}]}}}
    for figure in plots.drawn({**metrics, "confusion": {"$c_$": body}}).values():
        figure.savefig(tmp_path / "figure.png")
    curve = plots.curve([{"step": n, "loss": 1.0} for n in range(3)], {"loss": "$l_$"})
    assert b"$l_$" in plots.svg(curve)
