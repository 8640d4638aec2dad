"""Two runs side by side: which evaluations are meant, what is refused, and that a difference is told the right way."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from facemllm.cli import main as cli
from facemllm.errors import UserError
from facemllm.evaluate import compare as room
from facemllm.report.terminal import page, shown, write_page
from facemllm.scoring.paired import BETTER, SAME, WORSE, by_task, by_verdict, judged
from facemllm.settings import Settings, load
from facemllm.tables import open_table
from facemllm.tracking import client as mlflow_client
from tests import evaluation_example as example
from tests.pages import HOSTILE, Page
from tests.scored import write_conversations, write_evaluation

RUN_ID = "0123456789abcdef0123456789abcdef"


def unregistered(name: str) -> str:
    """A registry that knows no version."""
    raise UserError(f"no version {name}")


def compare(settings: Settings, first: str, second: str, conversations: Path | None = None) -> dict[str, Any]:
    return room.compare(settings, first, second, unregistered, conversations)


def judged_example(names: tuple[str, ...] = ("laptop", "ablation")) -> dict[str, Any]:
    """The hand-made comparison as `compare` would give it."""
    groups = {
        task: {kind: {name: judged(part) for name, part in parts.items()} for kind, parts in kinds.items()}
        for task, kinds in example.COMPARISON["groups"].items()
    }
    figures = {name: judged(part) for name, part in example.COMPARISON["figures"].items()}
    return {
        **example.COMPARISON,
        "names": list(names),
        "figures": figures,
        "groups": groups,
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def settings(place: Path) -> Settings:
    chosen = [f"storage.home={place / 'home'}", f"storage.runs={place / 'runs'}", "tracking.uri=http://127.0.0.1:9"]
    return load("laptop", [*chosen, "evaluate.bootstrap=300"])


ASKED = [
    (f"i{person}", person, task, task, str(person % 70) if task == "age" else ("fear", "anger")[person // 3 % 2])
    for person in range(150)
    for task in ("expression", "age")
]


@pytest.fixture(scope="module")
def conversations(settings: Settings, place: Path) -> Path:
    """150 people asked for their expression and age, in the store."""
    groups = {f"i{person}": {"gender": "female" if person % 2 else "male"} for person in range(150)}
    made = write_conversations(place / "conversations", ASKED, groups)
    (settings.home / "store").mkdir(parents=True)
    return made.rename(settings.home / "store" / open_table(made).digest)


def evaluation(folder: Path, conversations: Path, name: str, skill: float, error: float) -> Path:
    """An evaluation of a model that names the right expression with probability `skill`."""
    draw = np.random.default_rng(len(name))
    said = [
        str(float(answer) + error) if task == "age" else answer if draw.random() < skill else "none"
        for _, _, task, _, answer in ASKED
    ]
    return write_evaluation(folder, conversations, said, name * 64)


@pytest.fixture(scope="module")
def runs(settings: Settings, conversations: Path) -> dict[str, str]:
    """Two runs, `good` and `poor`, with their evaluations in the store; digests by name."""
    digests = {}
    for name, letter, skill, error in (("good", "a", 0.95, 2.0), ("poor", "b", 0.5, 9.0)):
        digests[name] = letter * 64
        evaluation(settings.home / "store" / digests[name], conversations, letter, skill, error)
        (settings.runs / name).mkdir(parents=True)
        steps = [{"name": "align", "digest": None}, {"name": "evaluate", "digest": digests[name]}]
        summary = {"run": name, "profile": "laptop", "steps": steps}
        (settings.runs / name / "summary.json").write_text(json.dumps(summary))
    return digests


def test_a_worse_model_is_told_to_be_worse(settings: Settings, runs: dict[str, str]) -> None:
    found = compare(settings, "good", "poor")
    assert found["names"] == ["good", "poor"]
    expression, age = found["figures"]["expression"], found["figures"]["age"]
    assert expression["verdict"] == age["verdict"] == WORSE
    assert expression["difference"]["high"] < 0
    assert age["difference"]["value"] == pytest.approx(7.0)
    assert found["groups"]["expression"]["gender"]["female"]["verdict"] == WORSE
    assert by_verdict(found)[WORSE] == ["age", "expression"]
    json.dumps(found)
    for names, verdict in ((("poor", "good"), BETTER), (("good", "good"), SAME)):
        assert {entry["verdict"] for entry in compare(settings, *names)["figures"].values()} == {verdict}


def test_every_way_to_name_an_evaluation(settings, runs, monkeypatch, tmp_path) -> None:
    folder = settings.home / "store" / runs["good"]
    versions = dict.fromkeys(("3", "champion"), runs["good"])
    names = ["good", str(settings.runs / "good"), str(folder), runs["good"][:8], runs["good"], *versions]
    assert {room.find(settings, name, versions.__getitem__).folder for name in names} == {folder}

    client = SimpleNamespace(
        get_run=lambda run_id: SimpleNamespace(data=SimpleNamespace(tags=tags)),
        list_artifacts=lambda run_id: held,
        download_artifacts=lambda run_id, name: str(settings.runs / "good" / name),
    )
    monkeypatch.setattr(mlflow_client, "connect", lambda settings: client)
    tags, held = {"facemllm.step": "evaluate", "facemllm.output": runs["good"]}, []
    assert room.find(settings, RUN_ID, unregistered).folder == folder
    tags, held = {}, [SimpleNamespace(path="summary.json")]
    assert room.find(settings, RUN_ID, unregistered).folder == folder
    held = []
    with pytest.raises(UserError, match="neither a finished pipeline's nor an evaluation's"):
        room.find(settings, RUN_ID, unregistered)


def test_a_run_of_another_profile_is_found_in_its_home(settings, runs, tmp_path, monkeypatch) -> None:
    other = load("ci", [f"storage.home={tmp_path / 'elsewhere'}", f"storage.runs={settings.runs}"])
    monkeypatch.setattr(room, "load", lambda profile: settings)
    assert room.find(other, "good", unregistered).home == settings.home


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", r"no run folder .*nothing \(runs: .*\), and no version nothing; give a run's name"),
        ("no/such/folder", "holds neither metrics.json nor summary.json"),
        ("ffffff", "0 results begin with 'ffffff'"),
        ("stopped", "'stopped' did not come to its evaluation"),
        ("garbled", "cannot be read"),
        ("gone", "the store has no result dddddddddddd"),
    ],
)
def test_what_is_no_evaluation_is_refused(settings: Settings, runs: dict[str, str], name: str, said: str) -> None:
    left = (("stopped", None), ("gone", "d" * 64))
    ended = {run: {"profile": "laptop", "steps": [{"name": "evaluate", "digest": digest}]} for run, digest in left}
    for run, text in [("garbled", "{"), *((run, json.dumps(summary)) for run, summary in ended.items())]:
        (settings.runs / run).mkdir(exist_ok=True)
        (settings.runs / run / "summary.json").write_text(text)
    with pytest.raises(UserError, match=said) as refused:
        compare(settings, name, "good")
    assert "\n" not in str(refused.value)


def test_other_questions_do_not_compare(settings: Settings, runs: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.json").write_text(json.dumps({"conversations_digest": "9" * 64}))
    with pytest.raises(UserError, match=r"'good' was evaluated on conversations \w{12}, '.*other' on 999999999999"):
        compare(settings, "good", str(tmp_path / "other"))


def test_conversations_that_left_the_store_are_asked_for(settings, runs, conversations, tmp_path) -> None:
    away = conversations.rename(tmp_path / "away")
    try:
        with pytest.raises(UserError, match="give their folder with --conversations"):
            compare(settings, "good", "poor")
        assert compare(settings, "good", "poor", away)["figures"]["age"]["verdict"] == WORSE
    finally:
        away.rename(conversations)


def test_items_stand_beneath_their_tasks_and_verdicts_turn_with_the_metric() -> None:
    found = judged_example()
    order = [f"{task} {item}".strip() for task, item, _ in by_task(found["figures"])]
    beneath = ["attributes", "attributes Wearing_Hat", "attributes eye_color"]
    assert order == ["closed_mean", *beneath, "age", "expression"]
    verdicts = {name: entry["verdict"] for name, entry in found["figures"].items()}
    assert verdicts["attributes"] == BETTER
    assert verdicts["age"] == WORSE  # years of error: more is worse
    assert verdicts["expression"] == verdicts["attributes.eye_color"] == SAME


def printed(*names: str) -> list[str]:
    console = Console(width=160, file=io.StringIO(), record=True)
    for part in shown(judged_example(names)):
        console.print(part)
    return [" ".join(line.split()) for line in console.export_text().splitlines()]


def test_the_terminal_says_it_in_words() -> None:
    lines = printed("a", "[red]b")
    assert "[red]b (second) against a (first)" in lines[0]
    assert "Wearing_Hat balanced_accuracy 0.980 0.900 -0.080 -0.100 -0.060 0.010 0.031 ▼ worse" in lines
    assert "age mae (years) 9.50 11.00 +1.50 +1.48 +1.52 0.001 0.03 ▼ worse" in lines
    assert "train.workers: 1 → 2" in lines
    assert "attributes gender: female balanced_accuracy 0.860 0.800 -0.060 -0.080 -0.040 0.020 0.031 ▼ worse" in lines
    assert "gender: male" not in " ".join(lines)
    assert "1 of 2 groups show none" in " ".join(lines)
    assert "One run each: what a second run with another seed or processor differs by is not" in " ".join(lines)


def test_long_names_stand_in_the_title_alone() -> None:
    lines = printed("/a/very/long/folder/of/evaluations/" * 3, "b" * 64)
    assert "metric first second difference 95 % p (Holm) difference" in lines
    assert "age mae (years) 9.50 11.00 +1.50 +1.48 +1.52 0.001 0.03 ▼ worse" in lines


def test_the_page_is_one_escaped_file_with_everything(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", judged_example((HOSTILE, "ablation")))
    words = Page((tmp_path / "page.html").read_text()).text
    assert f"ablation against {HOSTILE}" in words
    assert "worse age" in words
    assert "train.workers 1 2" in words
    assert "Wearing Hat balanced accuracy ↑ 0.980 0.900 -0.080 [-0.100, -0.060] 0.010 0.031 ▼ worse" in words
    assert "gender: male" in words
    assert "One run each: what a second run" in words
    same = judged_example() | {"second": judged_example()["first"]}  # one model, however often it is asked
    assert "One run each" not in page(same)
    assert not any("One run each" in str(part) for part in shown(same))


def test_the_command_prints_writes_and_refuses(settings: Settings, runs: dict[str, str], tmp_path: Path) -> None:
    sets = [f"storage.home={settings.home}", f"storage.runs={settings.runs}", "evaluate.bootstrap=100"]
    options = [word for text in sets for word in ("--set", text)]
    run = CliRunner().invoke
    done = run(cli.app, ["compare", "good", "poor", "--html", str(tmp_path / "c.html"), "--json", *options])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["figures"]["age"]["verdict"] == WORSE
    assert (tmp_path / "c.html").is_file()
    page = tmp_path / "[b]" / "c.html"
    page.parent.mkdir()
    result = run(cli.app, ["compare", "good", "poor", "--html", str(page), *options])
    assert "[b]/c.html" in result.stdout.replace("\n", "")
    assert "poor (second) against good (first)" in result.stdout
    assert isinstance(run(cli.app, ["compare", "good", "none/such", *options]).exception, UserError)


def test_the_settings_that_differ_are_those_behind_both_evaluations(
    settings: Settings, runs: dict[str, str], conversations: Path
) -> None:
    assert compare(settings, "good", "poor")["settings"] is None, "nothing is remembered of either"
    keys = settings.home / "keys"
    keys.mkdir()
    for name, rate in (("good", 0.2), ("poor", 0.1)):
        stage = {"stage": {"rates": {"tower": rate}}, "train": {"workers": 1}}
        made = {"specialize": (f"{name}-model", stage, {}), "evaluate": (runs[name], {}, {"model": f"{name}-model"})}
        for step, (digest, own, inputs) in made.items():
            known = {"step": step, "digest": digest, "inputs": inputs, "settings": {"seed": 0, "step": own}}
            (keys / f"{name}-{step}.json").write_text(json.dumps({**known, "commit": "c0ffee"}))
    found = compare(settings, "good", "poor")["settings"]
    assert found == {"train.stages.specialize.rates.tower": ("0.2", "0.1")}
    assert compare(settings, "good", "good")["settings"] == {}
    shutil.rmtree(keys)
