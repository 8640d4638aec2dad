import json
import math
import re
import shutil

import numpy as np
import pytest

from facemllm import settings as settings_module
from facemllm import tasks
from facemllm.errors import UserError
from facemllm.promote.gates import Difference, decide, differences, judge
from facemllm.scoring import fairness, stats
from facemllm.scoring.sheet import Answers, read_sheet
from facemllm.scoring.summary import summarise
from facemllm.settings.operations import Threshold
from facemllm.tables import CONVERSATIONS, open_table
from tests.refusing import refuses
from tests.scored import sheet_of, write_conversations, write_evaluation

TASKS = ["expression", "age", "gender"]
PEOPLE = 150


def load(*overrides):
    unseen = [f"promote.robustness.{kind}=null" for kind in ("blur", "dark", "jpeg", "noise", "occlusion")]
    unseen += ["promote.contradictions.relations=null", "promote.contradictions.captions=null"]
    rules = settings_module.load("laptop", ["evaluate.bootstrap=400", *unseen, *overrides])
    rules = rules.model_copy(update={"reformat": rules.reformat.model_copy(update={"tasks": TASKS})})
    return with_gaps(with_thresholds(rules, expression={"min": 0.55}, age={"max": 12.0}, closed_mean={"min": 0.6}))


def promoting(settings, **changes):
    return settings.model_copy(update={"promote": settings.promote.model_copy(update=changes)})


def with_gaps(settings, **gaps):
    return promoting(settings, fairness_gap=gaps or {"gender": None})


def with_thresholds(settings, **thresholds):
    bounds = {key.replace("__", "."): Threshold(**bound) for key, bound in thresholds.items()}
    return promoting(settings, thresholds=bounds)


@pytest.fixture(scope="module")
def settings():
    return load()


def asked():
    """Questions and true answers of 150 people, as `tests.scored` takes them."""
    draw = np.random.default_rng(0)
    for person in range(PEOPLE):
        for task in TASKS:
            (question,) = tasks.get(task).questions()
            options = [option.value for option in question.options]
            answer = str(draw.integers(5, 80)) if task == "age" else str(draw.choice(options))
            yield f"i{person}", person, task, question.item, answer


ASKED = list(asked())
GROUPS = {f"i{n}": {"age_band": "young" if n % 2 else "old", "skin_tone": "light"} for n in range(PEOPLE)}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_conversations(tmp_path_factory.mktemp("data") / "conversations", ASKED, GROUPS)


def evaluation(folder, table, digest, wrong=(), error=5.0, skill=0.9, seed=1, edit=None):
    """An evaluation folder of a model that is right with probability `skill` and never in tasks it has `wrong`."""
    draw = np.random.default_rng(seed)
    parsed = {}
    for place, (_, _, task, _, answer) in enumerate(ASKED):
        luck = draw.random()
        if task == "age":
            parsed[place] = str(float(answer) + error * 2 * luck)
        else:
            parsed[place] = answer if luck < (skill if task not in wrong else 0.5) else "other"
    if edit:
        edit(parsed)
    if len(parsed) < len(ASKED):
        return write_evaluation(folder, table, parsed, digest)
    sheet = read_sheet(open_table(table, CONVERSATIONS), "test")
    constant = ["40" if task == "age" else "male" for _, _, task, _, _ in ASKED]
    answers = Answers.of([parsed[int(name)] for name in sheet.sample_ids.to_pylist()])
    figures = summarise(sheet, answers, {"constant": constant}, 400, 0)
    fair = fairness.measure(load(), sheet, answers.parsed)
    return write_evaluation(folder, table, parsed, digest, fairness=fair, **figures)


@pytest.fixture(scope="module")
def good(table, tmp_path_factory):
    """The evaluation of a model that passes."""
    return evaluation(tmp_path_factory.mktemp("good") / "a", table, "aa")


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture
def metrics(good):
    return metrics_of(good)


def failed(decision):
    return {(check["kind"], check["key"]) for check in decision.checks if not check["passed"]}


def test_a_good_model_passes_alone(settings, table, good):
    found = decide(settings, table, good)
    assert found.passed, found.reasons
    assert re.search("3 thresholds are met.*no other champion", found.reasons[0])
    bounded = {("threshold", key) for key in ("expression", "age", "closed_mean")}
    checked = {(check["kind"], check["key"]) for check in found.checks}
    assert checked == bounded | {(kind, task) for task in TASKS for kind in ("constant", "unreadable")}
    assert json.loads(json.dumps(found.checks)) == found.checks
    assert "no other champion" in decide(settings, table, good, good).reasons[0]  # it is not compared with itself


def test_thresholds_refuse_with_the_figures_in_words(settings, table, tmp_path):
    folder = evaluation(tmp_path / "a", table, "aa", wrong=("expression",), error=20)
    found = decide(settings, table, folder)
    assert not found.passed
    assert failed(found) == {("threshold", "expression"), ("threshold", "age"), ("constant", "age")}
    value = metrics_of(folder)["tasks"]["expression"]["value"]
    assert f"expression {value:.4g} is below the threshold 0.55" in found.reasons
    assert any(reason.startswith("age ") and "is above the threshold 12" in reason for reason in found.reasons)


def test_a_threshold_is_reached_at_its_very_value(settings, metrics):
    value = metrics["tasks"]["expression"]["value"]
    assert judge(with_thresholds(settings, expression={"min": value}), metrics).passed
    assert not judge(with_thresholds(settings, expression={"min": value + 1e-4}), metrics).passed
    balanced = metrics["tasks"]["expression"]["items"]["balanced_accuracy"]["value"]
    assert not judge(with_thresholds(settings, expression__balanced_accuracy={"min": balanced + 1e-4}), metrics).passed


@pytest.mark.parametrize(
    ("thresholds", "match"),
    [
        ({"smile": {"min": 0.5}}, "no task 'smile'"),
        ({"expression__joy": {"min": 0.5}}, "no item 'joy'"),
        ({"age": {"min": 3}}, "less is better here, so give max"),
        ({"closed_mean": {"max": 3}}, "more is better here, so give min"),
    ],
)
def test_thresholds_that_mean_nothing_are_refused(settings, metrics, thresholds, match):
    refuses(match, judge, with_thresholds(settings, **thresholds), metrics)


def test_what_is_missing_or_undefined_fails(settings, metrics):
    gone = {**metrics, "tasks": {k: v for k, v in metrics["tasks"].items() if k != "gender"}}
    found = judge(settings, gone)
    assert failed(found) == {("present", "gender")}
    assert "gender has no figure" in found.reasons[0]
    expression, gender = metrics["tasks"]["expression"], metrics["tasks"]["gender"]
    for nothing in (None, math.nan):
        odd = {**metrics, "tasks": {**metrics["tasks"], "expression": {**expression, "value": nothing}}}
        assert failed(judge(settings, odd)) == {("threshold", "expression"), ("present", "expression")}
        for gone in ({"low": nothing}, {"baselines": {"constant": nothing}}):
            odd = {**metrics, "tasks": {**metrics["tasks"], "gender": {**gender, **gone}}}
            assert failed(judge(settings, odd)) == {("constant", "gender")}
    assert failed(judge(settings, {**metrics, "closed_mean": None})) == {("threshold", "closed_mean")}
    # an item that was never measured, though there is such an item
    absent = with_thresholds(settings, head_pose__yaw={"max": 4.0})
    assert failed(judge(absent, metrics)) == {("threshold", "head_pose.yaw")}
    assert failed(judge(settings, metrics, {})) == {("champion", task) for task in TASKS}


def test_above_constant_asks_for_the_whole_interval(settings, metrics):
    entry = metrics["tasks"]["gender"]
    entry["baselines"]["constant"] = (entry["low"] + entry["value"]) / 2
    found = judge(settings, metrics)
    assert failed(found) == {("constant", "gender")}
    assert "does not clear the constant answer" in found.reasons[0]
    assert judge(promoting(settings, above_constant=False), metrics).passed


def test_an_equal_model_passes_and_a_worse_one_is_refused(settings, table, tmp_path):
    champion = evaluation(tmp_path / "champion", table, "cc")
    equal = decide(settings, table, evaluation(tmp_path / "equal", table, "dd"), champion)
    assert equal.passed, equal.reasons
    assert [check["value"] for check in equal.checks if check["kind"] == "champion"] == [0.0, 0.0, 0.0]
    assert "no task is shown to be worse than the champion by more than the margin of 0.01" in equal.reasons[0]
    # still above every threshold and constant, but worse than what is in service
    worse = decide(settings, table, evaluation(tmp_path / "worse", table, "ee", skill=0.75, error=5), champion)
    assert failed(worse) == {("champion", "expression"), ("champion", "gender")}
    assert worse.reasons[0].startswith("expression 0.7267 is worse than the champion's 0.8867 by more than 0.01 (")
    older = decide(settings, table, evaluation(tmp_path / "older", table, "ff", error=7), champion)
    assert failed(older) == {("champion", "age")}
    better = decide(settings, table, champion, tmp_path / "worse")
    assert better.passed
    # another draw of the same skill is noise, not a loss
    assert decide(settings, table, evaluation(tmp_path / "noise", table, "gg", seed=2), champion).passed


def test_the_margin_is_a_share_of_the_champions_error(settings):
    entry = {"value": 6.0, "low": 5.0, "high": 7.0, "baselines": {"constant": 20.0}}
    entry |= {"higher_is_better": False, "items": {}, "unreadable": 0.0}
    reformat = settings.reformat.model_copy(update={"tasks": ["age"]})
    rules = promoting(settings, thresholds={}, champion_margin=0.1).model_copy(update={"reformat": reformat})

    def found(worse_by, champion):
        gap = Difference(6.0, champion, stats.Interval(worse_by, worse_by - 0.1, worse_by + 0.1))
        return judge(rules, {"tasks": {"age": entry}, "closed_mean": None}, {"age": gap}).passed

    assert found(0.5, 5.0)
    assert found(0.59, 5.0)  # the interval begins within 10 % of 5 years
    assert not found(0.65, 5.0)
    assert found(0.65, 6.0)


def test_both_must_answer_the_same_questions(settings, table, good, tmp_path):
    few = evaluation(tmp_path / "few", table, "bb", edit=lambda parsed: parsed.popitem())
    refuses("1 of 450 questions have no prediction", decide, settings, table, good, few)
    other = evaluation(tmp_path / "other", table, "bb")
    metrics = metrics_of(other)
    for change, match in (
        ({"conversations_digest": "f" * 64}, "evaluate both models on the same conversations"),
        ({"split": "validation"}, "use one split"),
    ):
        (other / "metrics.json").write_text(json.dumps(metrics | change))
        refuses(match, decide, settings, table, good, other)


@pytest.mark.parametrize("needed", ["model_digest", "conversations_digest", "predictions_digest", "split", "tasks"])
def test_metrics_that_lack_something_are_refused_in_a_line(settings, table, good, metrics, tmp_path, needed):
    folder = shutil.copytree(good, tmp_path / "a")
    for held in ([], {name: value for name, value in metrics.items() if name != needed}, {**metrics, needed: None}):
        (folder / "metrics.json").write_text(json.dumps(held))
        assert "\n" not in refuses(r"metrics\.json does not state", decide, settings, table, folder)


def test_metrics_of_other_predictions_are_refused(settings, table, good, tmp_path):
    bad = evaluation(tmp_path / "b", table, "bb", skill=0.2)
    (bad / "metrics.json").write_bytes((good / "metrics.json").read_bytes())
    refuses("does not belong to the predictions", decide, settings, table, bad)
    refuses("is not an evaluation", decide, settings, table, tmp_path)


def test_differences_are_those_of_the_figures(settings, table, good, tmp_path):
    second = evaluation(tmp_path / "b", table, "bb", skill=0.7, error=8)
    found = differences(settings, table, second, good)
    mine, yours = (metrics_of(folder)["tasks"] for folder in (second, good))
    for name in TASKS:
        gap = mine[name]["value"] - yours[name]["value"]
        worse = gap if name == "age" else -gap
        assert found[name].worse.value == pytest.approx(worse, abs=2e-6)
        assert 0 < found[name].worse.low < worse < found[name].worse.high
    assert set(found) >= {"closed_mean", "expression.balanced_accuracy", *TASKS}


def biased(parsed):
    """Right expressions of the young (odd people), wrong ones of the old."""
    for place, (_, person, task, _, _) in enumerate(ASKED):
        if task == "expression" and person % 2 == 0:
            parsed[place] = "other"


def test_an_injected_bias_is_refused_and_an_equal_model_passes(settings, table, good, tmp_path):
    rules = with_gaps(with_thresholds(settings), expression=0.25, gender=0.25)
    fair = decide(rules, table, good)
    assert fair.passed, fair.reasons
    assert "no gap between groups is shown to exceed" in fair.reasons[0]
    assert [check["key"] for check in fair.checks if check["kind"] == "fairness"] == ["expression", "gender"]
    found = decide(rules, table, evaluation(tmp_path / "biased", table, "bb", edit=biased))
    assert ("fairness", "expression") in failed(found)
    assert ("fairness", "gender") not in failed(found)
    pattern = re.compile("between (young and old|old and young).* is shown to exceed 0.25, corrected for 2 pairs")
    assert any(map(pattern.search, found.reasons))
    for limit, unlimited in ((1.0, False), (None, True)):
        free = decide(with_gaps(rules, expression=limit), table, tmp_path / "biased")
        assert free.passed is True
        assert ("no limit to: expression by age_band" in free.reasons[0]) is unlimited


def test_a_fairness_rule_fails_on_what_it_cannot_see(settings, table, metrics):
    rules = with_gaps(settings, gender=0.25)
    assert judge(rules, metrics).passed
    for blind in ({**metrics, "fairness": {}}, {k: v for k, v in metrics.items() if k != "fairness"}):
        found = judge(rules, blind)
        assert failed(found) == {("fairness", "gender")}
        assert "set promote.fairness_gap.gender to null" in found.reasons[0]
    few = load("evaluate.min_group=100")
    metrics["fairness"] = fairness.measure(few, read_sheet(open_table(table), "test"), ["male"] * 450)
    assert metrics["fairness"]["gender"]["age_band"]["groups"]["old"]["too_few"] is True
    assert failed(judge(with_gaps(few, gender=0.25), metrics)) == {("fairness", "gender")}
    refuses(r"fairness_gap\.smile: no task 'smile'", judge, with_gaps(settings, smile=None), metrics)


def people(few):
    """Expressions of 200 people of two sexes, `few` of them of the dark skin tone and never read right."""
    rows, groups = [], {}
    for person in range(200):
        rows.append((str(person), person, "expression", "expression", "happiness"))
        tone = "dark" if person < few else "light"
        groups[str(person)] = {"gender": ("female", "male")[person % 2], "skin_tone": tone}
    return sheet_of(rows, groups), ["sadness" if person < few else "happiness" for person in range(200)]


def test_a_kind_whose_groups_are_too_few_is_refused_however_well_another_compares(settings):
    rules = with_gaps(settings, expression=0.25)

    def refused(few):
        fair = fairness.measure(rules, *people(few))
        found = judge(rules, {"tasks": {}, "closed_mean": None, "fairness": fair})
        assert ("fairness", "expression") in failed(found)
        return next(check["reason"] for check in found.checks if check["kind"] == "fairness")

    reason = refused(few=19)
    counted = "(dark: 19 people, light: 181 people): no two groups have 20 people"
    assert f"cannot be compared by skin_tone {counted}" in reason
    assert "lower evaluate.min_group or set promote.fairness_gap.expression to null" in reason
    assert re.search("differs by 1 between dark and light.* is shown to exceed 0.25", refused(few=20))


def of_two_groups(people, draw, odds, others):
    """Expressions of so many women and men, read right at these odds."""
    rows = [(str(p), p, "expression", "expression", "happiness") for p in range(2 * people)]
    groups = {str(p): {"gender": ("female", "male")[p % 2]} for p in range(2 * people)}
    right = draw.random(2 * people) < np.where(np.arange(2 * people) % 2, others, odds)
    return sheet_of(rows, groups), ["happiness" if ok else "sadness" for ok in right]


@pytest.mark.parametrize(
    ("people", "odds", "power", "passed"),
    [
        (150, 0.4, "required", False),  # a gap of fifty points beyond twenty-five
        (150, 0.9, "required", True),
        (20, 0.9, "required", False),  # nothing is seen, nor could it be
        (20, 0.9, "reported", True),
        (20, 0.1, "reported", False),
    ],
)
def test_a_fairness_rule_asks_for_the_power_to_see_what_it_forbids(settings, people, odds, power, passed):
    rules = with_gaps(settings, expression=0.25)
    rules = rules.model_copy(update={"promote": rules.promote.model_copy(update={"fairness_power": power})})
    as_expected = 0
    for seed in range(10):
        fair = fairness.measure(rules, *of_two_groups(people, np.random.default_rng(seed), odds, 0.9))
        checks = judge(rules, {"tasks": {}, "closed_mean": None, "fairness": fair}).checks
        (check,) = [check for check in checks if check["kind"] == "fairness"]
        as_expected += check["passed"] is passed
        blind = check["minimum_detectable_difference"] > 0.25
        assert blind == ("too few people to tell a gap of 0.25 from none: the minimum" in check["reason"])
        assert check["minimum_refused_gap"] > max(0.25, check["minimum_detectable_difference"])
    assert as_expected >= 9


def test_gaps_of_an_earlier_version_are_tested_again(settings, metrics):
    for entry in metrics["fairness"]["gender"].values():
        for gap in entry["gaps"]:
            del gap["minimum_detectable_difference"]
    with pytest.raises(UserError, match=r"the gaps of gender were tested by an earlier version.*evaluate again"):
        judge(with_gaps(settings, gender=0.25), metrics)


def test_groups_that_are_too_few_beside_others_are_named(settings, metrics):
    for task in ("gender", "expression"):
        metrics["fairness"][task]["age_band"]["groups"]["newborn"] = {"people": 3, "too_few": True, "value": None}
    found = judge(with_gaps(settings, gender=0.25, expression=0.25), metrics)
    assert found.passed
    assert found.reasons[0].count("(too few people to judge: age_band newborn: 3 people)") == 1  # of both tasks
    for check in (check for check in found.checks if check["kind"] == "fairness"):
        assert check["too_few"] == {"age_band": {"newborn": 3}}
        assert sorted(check["groups"]) == ["old", "young"]
        assert check["reason"].endswith("; too few people to judge: age_band newborn: 3 people")
