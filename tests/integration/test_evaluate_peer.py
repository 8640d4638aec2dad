"""Models of others, all the way: over real HTTP with kills in between, and from a folder of transformers' own."""

import base64
import hashlib
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from facemllm import settings
from facemllm.errors import UserError
from facemllm.evaluate.models import evaluate
from facemllm.evaluate.peers import DECLINED, OUTCOMES
from facemllm.tables import PREDICTIONS, open_table
from tests.fake_endpoint import FakeEndpoint
from tests.integration.conftest import counted
from tests.waiting import wait_until

pytestmark = pytest.mark.integration

FACES = 8  # of the test split
QUESTIONS = FACES * 2 * 6  # two a face, as it is and in five disturbances


def says(body):
    """Captions all alike; of the gender the truth about half of the pictures, and no answer about others."""
    (message,) = body["messages"]
    picture, text = message["content"]
    assert text["text"].startswith("What about ")
    if "gender" not in text["text"]:
        return "a woman"
    jpeg = base64.b64decode(picture["image_url"]["url"].partition(",")[2])
    drawn = hashlib.sha256(jpeg).digest()[0] % 3
    return ("I cannot help with that.", "A woman or a man", "a woman")[drawn]


def command(fake, home, table, out, *more):
    arguments = [f"storage.home={home}", "annotate.endpoint.parallel=4", "evaluate.bootstrap=100"]
    overrides = [part for one in arguments for part in ("--set", one)]
    doors = ["evaluate", "some-model", str(table), str(out), "--base-url", fake.base_url, *overrides, *more]
    return [sys.executable, "-m", "facemllm", *doors]


def started(*args):
    return subprocess.Popen(command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(arguments):
    return subprocess.run(arguments, capture_output=True, text=True, check=False)


@pytest.fixture
def table(conversations_table):
    return conversations_table()


def test_an_endpoint_gets_the_same_report_and_is_asked_each_thing_once(table, tmp_path):
    home, out = tmp_path / "home", tmp_path / "out"
    with FakeEndpoint(answer=says, latency_s=0.05) as fake:
        for moment, ending in ((9, signal.SIGKILL), (30, signal.SIGINT)):
            process = started(fake, home, table, out)
            wait_until(lambda moment=moment: fake.received.total() >= moment, process)
            process.send_signal(ending)
            _, errors = process.communicate(timeout=30)
            assert not out.exists(), "an evaluation is whole, with its report, or absent"
            if ending == signal.SIGINT:
                assert process.returncode != 0
                assert "Traceback" not in errors
                assert not [path for path in tmp_path.glob(".out.*") if str(process.pid) in path.name]
        process = started(fake, home, table, out, "--json")
        said, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
        now = counted(home)
        assert QUESTIONS <= fake.received.total() <= now.requests == QUESTIONS + now.in_doubt
        assert (now.answered, now.in_doubt <= 4) == (QUESTIONS, True), "of the SIGKILL; the Ctrl-C waits"
        asked = fake.received.total()
        again = subprocess.run(command(fake, home, table, tmp_path / "again"), capture_output=True, check=True)
        assert fake.received.total() == asked
        assert again.stdout.decode().startswith(f"{tmp_path / 'again' / 'report.html'}: mean balanced accuracy")

    metrics = json.loads(said)
    assert (out / "metrics.json").read_bytes() == (tmp_path / "again" / "metrics.json").read_bytes()
    assert json.loads((out / "metrics.json").read_text()) == metrics
    page = (out / "report.html").read_text()
    assert "some-model" in page
    assert "gender" in page
    found = open_table(out / "predictions", PREDICTIONS)
    about = found.manifest["about"]
    assert (about["model"]["kind"], about["model"]["name"]) == ("endpoint", "some-model")
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", about["model"]["address"])
    rows = list(found.iterate())
    assert {row["model_digest"] for row in rows} == {about["model_digest"]} == {metrics["model_digest"]}
    asked = [row for row in rows if row["task"] == "gender"]
    read = {row["raw"]: row["parsed"] for row in asked}
    assert len(asked) == FACES
    assert read.get("a woman", "female") == "female"
    assert read.get("A woman or a man") is read.get("I cannot help with that.") is None
    assert metrics["tasks"]["gender"]["unreadable"] == sum(row["parsed"] is None for row in asked) / FACES
    assert all(row["scores"] is None for row in rows)
    assert sorted(p.name for p in (out / "disturbed").iterdir()) == ["blur", "dark", "jpeg", "noise", "occlusion"]
    assert not (out / "generated").exists()


def test_a_spent_budget_and_a_failing_endpoint_are_one_line_and_leave_nothing(table, tmp_path):
    with FakeEndpoint(answer=says) as fake:
        limited = command(fake, tmp_path / "home", table, tmp_path / "out", "--set", "annotate.endpoint.max_requests=5")
        stopped = ended(limited)
        assert (stopped.returncode, stopped.stdout) == (1, "")
        assert "max_requests is used up; raise it. What was answered is kept; run again to go on" in stopped.stderr
        first, bill, last = stopped.stderr.splitlines()
        assert first.startswith("to ask: 96 requests (0 of 96 are answered already), about ")
        assert "annotate.endpoint.max_requests leaves 5: too few" in first
        assert re.match(r"96 questions: .*, 91 not asked; 5 requests, 4,800 tokens$", bill)
        assert last.startswith("error: evaluation stopped: ")
        assert fake.received.total() == 5
        fake.default = "401"
        stopped = ended(command(fake, tmp_path / "other", table, tmp_path / "out"))
        assert stopped.returncode == 1
        assert "the endpoint refuses every request (401" in stopped.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["conversations", "home", "other"]


def test_an_endpoint_that_misbehaves_in_every_polite_way_leaves_every_question_accounted_for(table, tmp_path, capsys):
    """It is asked until its quota is used up, and then on."""
    arguments = [f"storage.home={tmp_path / 'home'}", "evaluate.bootstrap=100", "annotate.vision_language.model=m"]
    arguments += [
        "annotate.endpoint.parallel=1",
        "annotate.endpoint.input_price=1",
        "annotate.endpoint.output_price=10",
    ]
    script = ["gzip", "error:503", "good", "flagged", "silent", "thinks", "429:0.01", "text:A woman or a man.", "cut"]
    script += [
        "error:content_filter",
        "text:I cannot help with that.",
        "text:<think>A man? No.</think>A woman.",
        "nousage",
    ]
    with FakeEndpoint(answer=says, script=[*script, "quota"]) as fake:
        chosen = settings.load("laptop", [*arguments, f"annotate.endpoint.base_url={fake.base_url}"])
        with pytest.raises(UserError, match=r"evaluation stopped: .*\(429: You exceeded .* quota or credit is used up"):
            evaluate(chosen, "m", table, tmp_path / "out", endpoint=True)
        assert not (tmp_path / "out").exists()
        ((before, stopped),) = [capsys.readouterr().err.splitlines()]
        assert re.fullmatch(
            r"to ask: 96 requests \(0 of 96 .*\), about [\d,]+ tokens at most, price 0\.\d\d; no .*", before
        )
        assert (fake.script, stopped.split("; ")[0].split(", ")[-1]) == ([], f"{QUESTIONS - 8} not asked")
        fake.script = [*script, *script]
        metrics = evaluate(chosen, "m", table, tmp_path / "out", endpoint=True)
        before, said = capsys.readouterr().err.splitlines()
    assert before.startswith("to ask: 88 requests (8 of 96 are answered already), about ")
    bill = json.loads((tmp_path / "out" / "bill.json").read_text())
    became = bill["outcomes"]
    assert list(became) == [*OUTCOMES, "not_asked"]
    assert (bill["rows"], sum(became.values()), became["no_answer"], became["not_asked"]) == (96, 96, 0, 0)
    assert became["cut_off"] == 6, "three times two"
    assert became["declined"] >= 4, "flagged and filtered after the quota was renewed; and in words"
    assert became["unreadable"] >= 3
    rows = [row for place in (tmp_path / "out").rglob("predictions") for row in open_table(place).iterate()]
    rows += [row for place in (tmp_path / "out" / "disturbed").iterdir() for row in open_table(place).iterate()]
    assert (len(rows), sum(row["parsed"] is not None for row in rows)) == (96, became["answered"])
    assert sum(row["raw"] == DECLINED for row in rows) == 4
    paid = bill["all_runs"]
    sent = 92 + paid["in_doubt"] + paid["refused"]
    assert (paid["requests"], paid["answered"], paid["unmetered"]) == (sent, 92, 3)
    assert paid["prompt_tokens"] + paid["completion_tokens"] == 89 * 960
    tokens = bill["this_run"]["prompt_tokens"] + bill["this_run"]["completion_tokens"]
    requests, price = bill["this_run"]["requests"], bill["this_run"]["price"]
    assert said.startswith(f"96 questions: {became['answered']} answered, {became['declined']} declined, 6 cut off, ")
    assert f"0 not asked; {requests} requests, {tokens:,} tokens, cost {price:.2f}, " in said
    assert bill["prices"] == {"input": 1.0, "output": 10.0}
    assert metrics["tasks"]["gender"]["n"] == FACES


def test_missing_answers_are_no_wrong_ones(table, tmp_path):
    with FakeEndpoint(answer=says, script=["good"] * 3 + ["500"]) as fake:
        arguments = command(fake, tmp_path / "home", table, tmp_path / "out", "--set", "annotate.endpoint.retries=0")
        stopped = ended(arguments)
        assert stopped.returncode == 1
        assert re.search(r"evaluation stopped: 1 of \d+ questions got no answer .*500", stopped.stderr)
        assert not (tmp_path / "out").exists()
        again = ended(arguments)
        assert again.returncode == 0, again.stderr[-3000:]
        assert fake.received.total() == QUESTIONS + 1


def test_a_model_of_transformers_is_asked_in_words(table, tmp_path, monkeypatch):
    from facemllm.model.pretrained import save_model
    from facemllm.model.tiny import build_tiny

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    less = ["annotate.vision_language.max_tokens=5", "evaluate.bootstrap=100", "evaluate.disturbed_faces=2"]
    chosen = settings.load("laptop", [f"storage.home={tmp_path / 'home'}", *less])
    words = ["What about gender? Answer with one of these and nothing else: a woman, a man. What about caption?"]
    save_model(*build_tiny(chosen.model, words, ["a woman", "a man"], 0), tmp_path / "theirs")
    metrics = evaluate(chosen, str(tmp_path / "theirs"), table, tmp_path / "out", endpoint=False)
    rows = list(open_table(tmp_path / "out" / "predictions").iterate())
    assert len(rows) == FACES * 2
    assert all(row["raw"] is not None and row["scores"] is None for row in rows)
    assert metrics["tasks"]["gender"]["n"] == FACES
    assert "theirs" in (tmp_path / "out" / "report.html").read_text()
    (account,) = {path.parts[-1] for path in (tmp_path / "home").iterdir()}
    assert account == "annotations"
    monkeypatch.setattr("facemllm.asking.local.generate", None)  # nothing is asked again
    evaluate(chosen, str(tmp_path / "theirs"), table, tmp_path / "again", endpoint=False)
    assert (tmp_path / "again" / "metrics.json").read_bytes() == (tmp_path / "out" / "metrics.json").read_bytes()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
