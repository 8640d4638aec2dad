"""The list of models, and the tables that a leaderboard becomes."""

import pytest

from facemllm import settings
from facemllm.evaluate.leaderboard import Answers, figures
from facemllm.evaluate.listed import Listed, read_list, settings_of
from facemllm.report import leaderboard as report
from tests.evaluation_example import TASKS, estimate
from tests.refusing import refuses

ENDPOINT = "{name: b, kind: endpoint, where: 'https://host/v1', model: m, input_price: 2.5, output_price: 10}"


@pytest.fixture
def listed(tmp_path):
    def write(*models):
        path = tmp_path / "models.yaml"
        path.write_text("models:\n" + "".join(f"  - {one}\n" for one in models))
        return path

    return write


def test_a_list_names_models_and_what_they_were_tuned_from(listed):
    first, second = read_list(listed("{name: a, kind: ours, where: '3', fine_tuned_from: b}", ENDPOINT))
    assert (first.where, first.fine_tuned_from, second.model) == ("3", "b", "m")
    own = settings_of(settings.load("laptop"), second).annotate
    assert (own.endpoint.base_url, own.endpoint.output_price, own.vision_language.model) == ("https://host/v1", 10, "m")
    assert own.endpoint.third_party, "what is not named stays as it is set"


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (["{name: a, kind: peer, where: x}"], r"models\.yaml: models\.0\.kind: Input should be 'ours', 'hub' or"),
        (["{name: a, kind: hub}"], r"models\.0\.where: Field required"),
        (["{name: a, kind: hub, where: x, prize: 3}"], r"models\.0\.prize: Extra inputs"),
        (["{name: a, kind: hub, where: x}"] * 2, "two models are called a"),
        (["{name: a, kind: hub, where: x, fine_tuned_from: a}"], "a is fine_tuned_from a, which is no other"),
        (["{name: a, kind: endpoint, where: x}"], "an endpoint needs it"),
        (["{name: a, kind: hub, where: x, model: m}"], "others have none"),
        (["{name: a, kind: hub, where: x, image_size: 8}"], "image_size is for models of kind ours"),
        (["{name: a, name: b}"], "'name' stands there twice"),
    ],
)
def test_a_list_of_another_form_is_refused_by_file_and_key(listed, models, said):
    refuses(said, read_list, listed(*models))


def test_no_list(tmp_path):
    refuses("cannot be read: No such file", read_list, tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("")
    refuses("Input should be a valid dictionary", read_list, tmp_path / "empty.yaml")


def row(name, tuned=None, **changed):
    cost = {"parameters": 3_750_000_000, "operations": 2.5e9, "tokens_in": None, "tokens_out": None}
    cost |= {"price": None, "seconds": 4.0, "questions": 10, "side": 112, "image_tokens": 16}
    found = figures({"closed_mean": estimate(0.8), "tasks": TASKS})
    about = {"kind": "ours", "fine_tuned_from": tuned, "way": "likelihood", "n": 10, "error": None}
    return {"name": name, **about, "figures": found, "unreadable": 0.0, "not_answered": 0.0, "cost": cost, **changed}


def test_the_tables_say_models_tasks_differences_and_failures():
    entry = {"difference": estimate(0.1), "unit": "", "higher_is_better": True, "p": 0.001, "p_holm": 0.002}
    board = {"benchmark": None, "sources": ["render"], "split": "test"}
    board["models"] = [row("tuned|1", "base"), row("base"), {"name": "gone", "fine_tuned_from": None, "error": "no."}]
    board["differences"] = [{"name": "tuned|1", "from": "base", "figures": {"age": {**entry, "verdict": "better"}}}]
    models, tasks, differences, failed = report.tables(board)
    assert [cells[:2] for cells in models.rows] == [
        ("base", "training-free"),
        ("tuned|1", "fine-tuned from base"),
    ]
    (base, _) = [dict(zip(models.head, cells, strict=True)) for cells in models.rows]
    assert (base["overall"], base["parameters"]) == ("80.0 [78.0, 82.0]", "3.75 B")
    assert (base["a question costs"], base["questions/s"]) == ("2.5 GFLOP", "2.5")
    assert ("age", "9.50 [8.80, 10.10] years", "9.50 [8.80, 10.10] years") in tasks.rows
    assert differences.rows == [("tuned|1", "base", "age", "+10.0 [8.0, 12.0]", "0.002", "better")]
    assert failed.rows == [("gone", "no.")]
    page = report.markdown([models, failed])
    assert r"| tuned\|1 | fine-tuned from base |" in page
    assert page.startswith("## leaderboard on render, split test")


def test_pictures_of_different_sizes_are_said():
    other = row("base", cost=row("base")["cost"] | {"side": 448, "image_tokens": 256})
    peer = row("peer", cost=row("peer")["cost"] | {"side": 448, "image_tokens": None})
    board = {"benchmark": None, "sources": ["render"], "split": "test", "differences": []}
    models, _ = report.tables({**board, "models": [row("tuned", "base"), other, peer]})
    pictures = {cells[0]: dict(zip(models.head, cells, strict=True))["pictures"] for cells in models.rows}
    assert pictures == {"tuned": "112 px, 16 tokens", "base": "448 px, 256 tokens", "peer": "at most 448 px"}
    assert models.notes[0].startswith(
        "tuned and base were shown pictures of different sizes (112 px, 16 tokens; 448 px"
    )
    models, _ = report.tables({**board, "models": [row("tuned", "base"), row("base")]})
    assert not models.notes


def test_how_closed_questions_were_answered(tmp_path):
    ours = Listed(name="a", kind="ours", where="x")
    assert Answers(ours, tmp_path, {"tasks": {}}).way == "likelihood"
    assert Answers(ours, tmp_path, {"benchmark": "facexbench"}).way == "written"
    assert Answers(Listed(name="a", kind="hub", where="x"), tmp_path, {}).way == "written"
