"""`facemllm leaderboard`: three small models and an endpoint on the same questions, killed in the middle, one broken;
and a benchmark answered by real models, several pictures and all."""

import json
import signal
import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

from facemllm import settings
from facemllm.cli.main import app
from facemllm.tables import PREDICTIONS, open_table
from tests import benchmark_trees as trees
from tests.fake_endpoint import FakeEndpoint
from tests.waiting import wait_until

pytestmark = pytest.mark.integration

FACES = 8  # of the test split
LESS = ["evaluate.bootstrap=100", "evaluate.min_group=2", "evaluate.max_new_tokens=3"]
LESS += ["annotate.vision_language.max_tokens=3", "annotate.endpoint.third_party=false"]
WORDS = ["What about gender? Answer with one of these and nothing else: a woman, a man. What about caption?"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models of random weights: a base, one like it with other weights, and one more."""
    from facemllm.model.pretrained import save_model
    from facemllm.model.tiny import build_tiny

    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "tuned", "theirs")):
        save_model(*build_tiny(settings.load("laptop").model, WORDS, ["a woman", "a man"], seed), folder / name)
    return folder


def command(tmp_path, table, listed, *more):
    path = tmp_path / "models.yaml"
    path.write_text(yaml.safe_dump({"models": listed}))
    arguments = [f"storage.home={tmp_path / 'home'}", *LESS]
    overrides = [part for one in arguments for part in ("--set", one)]
    return ["leaderboard", str(path), str(table), str(tmp_path / "out"), *overrides, *more]


def ran(command):
    return CliRunner().invoke(app, command)


def listed(models, fake):
    return [
        {"name": "base", "kind": "ours", "where": str(models / "base")},
        {"name": "tuned", "kind": "ours", "where": str(models / "tuned"), "fine_tuned_from": "base"},
        {"name": "theirs", "kind": "hub", "where": str(models / "theirs")},
        {
            **{"name": "afar", "kind": "endpoint", "where": fake.base_url, "model": "m"},
            **{"input_price": 1, "output_price": 10, "fine_tuned_from": "theirs"},
        },
    ]


def test_three_models_and_an_endpoint_before_and_after_fine_tuning(models, conversations_table, tmp_path):
    table = conversations_table()
    with FakeEndpoint(answer=lambda body: "a woman", latency_s=0.2) as fake:
        rows = listed(models, fake)
        arguments = command(
            tmp_path, table, [*rows, {"name": "gone", "kind": "hub", "where": str(tmp_path / "nowhere")}]
        )
        started = [sys.executable, "-m", "facemllm", *arguments]
        process = subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: fake.completed.total() >= 3, process, 600)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
        kept = sorted((tmp_path / "out" / "answers").glob("[0-9a-f]*"))
        assert len(kept) == 3, "base, tuned and theirs"
        before = {path: path.stat().st_mtime_ns for path in kept}
        stopped = ran([*arguments, "--json"])
        assert stopped.exit_code == 1, "one model has no folder"
        assert {path: path.stat().st_mtime_ns for path in kept} == before, "they are not asked again"
        assert fake.received.total() <= 2 * FACES + 16, "nor is what was answered before the kill"
        asked = fake.received.total()
        again = ran(command(tmp_path, table, rows))
        assert again.exit_code == 0, again.stderr[-2000:]
        assert fake.received.total() == asked
    board = json.loads(stopped.stdout)
    assert [row["name"] for row in board["models"]] == ["base", "tuned", "theirs", "afar", "gone"]
    base, tuned, theirs, afar, gone = board["models"]
    assert "nowhere" in gone["error"]
    assert (base["way"], tuned["way"], theirs["way"], afar["way"]) == ("likelihood", "likelihood", "written", "written")
    assert list(base["figures"]) == ["overall", "caption", "gender"]
    assert afar["figures"]["gender"]["value"] == 0.5, "balanced accuracy of one answer to all"
    assert (afar["cost"]["price"], afar["cost"]["tokens_in"]) == (pytest.approx(16 * 1500e-6), 900.0)
    assert base["cost"]["parameters"] == tuned["cost"]["parameters"] > 10**6
    assert base["cost"]["operations"] > 10**6
    assert all(row["cost"]["questions"] == 2 * FACES and row["cost"]["seconds"] > 0 for row in (base, theirs, afar))
    pairs = {(row["name"], row["from"]): row["figures"] for row in board["differences"]}
    assert set(pairs) == {("tuned", "base"), ("afar", "theirs")}
    assert all("p_holm" in entry and "verdict" in entry for figures in pairs.values() for entry in figures.values())
    page = (tmp_path / "out" / "leaderboard.md").read_text()
    assert "| afar | fine-tuned from theirs | written |" in page
    assert "leaderboard on" in again.stdout
    assert "training-free" in again.stdout


def test_models_that_answered_in_two_ways_are_not_judged(models, conversations_table, tmp_path):
    table = conversations_table()
    rows = [
        {"name": "theirs", "kind": "hub", "where": str(models / "theirs")},
        {"name": "tuned", "kind": "ours", "where": str(models / "tuned"), "fine_tuned_from": "theirs"},
    ]
    found = ran(command(tmp_path, table, rows, "--json"))
    assert found.exit_code == 0, found.stderr[-2000:]
    ((pair,)) = json.loads(found.stdout)["differences"]
    assert {entry["verdict"] for entry in pair["figures"].values()} == {"answered in two ways, not judged"}


def test_a_benchmark_by_real_models(models, tmp_path):
    tree = trees.facexbench(tmp_path / "tree", each=1)
    trees.imported("facexbench", tree, tmp_path / "table", tmp_path / "home")
    with FakeEndpoint(answer=lambda body: "The answer is (B).") as fake:
        found = ran(command(tmp_path, tmp_path / "table", listed(models, fake), "--json"))
    assert found.exit_code == 0, found.stderr[-2000:]
    board = json.loads(found.stdout)
    base, tuned, theirs, afar = board["models"]
    assert board["benchmark"] == "FaceXBench"
    assert afar["figures"]["overall"]["value"] == afar["figures"]["overall, own rules"]["value"] == 1.0
    assert {row["way"] for row in board["models"]} == {"written"}
    assert all(row["n"] == 22 and row["not_answered"] == 0.0 for row in (base, tuned, theirs))
    assert [row["figures"]["overall"]["verdict"] for row in board["differences"]][1] == "better"
    for folder in (tmp_path / "out" / "answers").iterdir():
        rows = list(open_table(folder / "predictions", PREDICTIONS).iterate())
        assert all(row["raw"] is not None for row in rows), "also with several pictures"
        metrics = json.loads((folder / "metrics.json").read_text())
        assert ("likelihood" in metrics["figures"][""]) == any(row["scores"] for row in rows)
