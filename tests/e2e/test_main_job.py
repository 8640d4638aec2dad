"""The main job on the `ci` profile, with real parts: run, run again, decide, release, kill, go on, leave nothing.

The tests share one home and are in the order a user would do things; each says what it needs of those before it.
"""

import base64
import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from facemllm.settings import load
from facemllm.workflow.steps import steps as steps_of
from tests.e2e.conftest import FOURTH_STAGE

pytestmark = pytest.mark.e2e
ACTS = {"deploy", "await_approval", "release"}
STEPS = list(steps_of(load("ci", [FOURTH_STAGE])))
DATA = ("ingest", "annotate", "reformat", "validate", "version")


@pytest.fixture(scope="module")
def project(shared: Any) -> Any:
    return shared


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def start_until(project: Any, name: str, more: tuple[str, ...], step: str) -> subprocess.Popen[bytes]:
    """Start a run and wait until the named step has progressed past a checkpoint."""
    events = project.home / "runs" / name / "events.jsonl"
    command = project.command("pipeline.py", "run", "--name", name, more=more)
    said = project.home / f"{name}.stderr"
    with said.open("wb") as stderr:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True)

    def reached() -> bool:
        assert child.poll() is None, f"the run ended before it could be stopped: {said.read_text()[-2000:]}"
        if not events.is_file():
            return False
        lines = [json.loads(line) for line in events.read_text("utf-8").splitlines()]
        done = [line for line in lines if "progress" in line and line["step"] == step]
        return any(line["progress"] >= line.get("total", 1) // 2 for line in done)

    wait_for(reached, 900, f"{step} to be half-way")
    return child


def workers(project: Any) -> list[psutil.Process]:
    """Processes of a run that must not outlive it: all but the servers that stay up, and their supervisors."""
    stay = {"facemllm.core.processes", "mlflow", "facemllm.serve.server", "facemllm.serve.local.proxy", "uvicorn"}
    stay.add("cat-file")  # by which production's server reads decisions
    return [p for p in project.processes() if not stay & set(p.info["cmdline"])]


def components(project: Any) -> list[psutil.Process]:
    return [p for p in project.processes() if "kfp.dsl.executor_main" in p.info["cmdline"]]


@pytest.fixture(scope="module")
def first(project: Any) -> dict[str, Any]:
    """The first run: its driver is killed in the middle of a stage, and the same command goes on."""
    child = start_until(project, "ci", (), "specialize")
    assert components(project)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    wait_for(lambda: not components(project), 60, "the step to end with its run")
    return project.run()


def steps(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {step["name"]: step for step in summary["steps"]}


def ask(url: str, image: bytes, question: str) -> dict[str, Any]:
    body = {"instances": [{"image": {"b64": base64.b64encode(image).decode()}, "question": question}]}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())["predictions"][0]


def a_face(project: Any, summary: dict[str, Any]) -> bytes:
    evaluation = project.home / "home" / "store" / steps(summary)["evaluate"]["digest"]
    return next((evaluation / "samples").glob("*.jpg")).read_bytes()


def test_first_run_reaches_the_approval(project: Any, first: dict[str, Any]) -> None:
    assert [step["name"] for step in first["steps"]] == list(STEPS)
    states = {name: step["state"] for name, step in steps(first).items()}
    assert states.pop("release") == "skipped"
    before = (*DATA, "align", "instruct")
    assert states == {name: "cached" if name in before else "done" for name in states}
    assert "resumed at step" in steps(first)["specialize"]["figure"]
    assert first["gate"]["passed"]
    assert first["approval"] == "pending"
    assert first["model"]["version"] == "1"
    for task in first["tasks"].values():
        assert task["low"] <= task["value"] <= task["high"]
        assert {"metric", "n", "unreadable", "baselines", "higher_is_better"} <= set(task)
        assert {"constant", "pixels"} <= set(task["baselines"])
    assert set(first["cost"]) == {"align", "instruct", "specialize", "polish", "evaluate"}
    assert set(first["tasks"]["zero_shot"]["items"]) == {"Wearing_Earrings"}
    report = (project.home / "runs" / "ci" / "report.html").read_text("utf-8")
    assert "zero_shot" in report or "zero shot" in report.lower()
    assert "polish" in report


def test_staging_answers_an_image(project: Any, first: dict[str, Any]) -> None:
    answer = ask(first["endpoint"], a_face(project, first), "Is the person wearing a hat?")
    assert (answer["task"], answer["item"]) == ("attributes", "Wearing_Hat")
    assert answer["answer"] == max(answer["scores"], key=answer["scores"].get)
    assert answer["value"] in (answer["answer"], None)


def test_everything_listens_on_loopback(project: Any, first: dict[str, Any]) -> None:
    listening = []
    for process in project.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            listening += [c for c in process.connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listening
    assert {c.laddr.ip.removeprefix("::ffff:") for c in listening} == {"127.0.0.1"}  # gRPC has one kind of sockets


def test_release_without_approval_is_refused(project: Any, first: dict[str, Any]) -> None:
    done = project.call("pipeline.py", "release", "1")
    assert done.returncode == 1
    assert "approvals are missing: 1 x approver" in done.stderr.splitlines()[-1]
    assert project.facemllm("promote", "approve", "7", "--by", "Ada Lovelace", "--reason", "x").returncode == 1


def test_rejected_version_cannot_be_released(project: Any, first: dict[str, Any]) -> None:
    done = project.facemllm("promote", "reject", "1", "--by", "Ada Lovelace", "--reason", "want a second look")
    assert done.returncode == 0, done.stderr
    refused = project.call("pipeline.py", "release", "1")
    assert refused.returncode == 1
    assert "reject by Ada Lovelace" in refused.stderr
    assert "want a second look" in refused.stderr


def test_approved_version_goes_into_production_and_all_else_is_cached(project: Any, first: dict[str, Any]) -> None:
    done = project.facemllm("promote", "approve", "1", "--by", "Ada Lovelace", "--reason", "figures are in order")
    assert done.returncode == 0, done.stderr
    summary = project.run()
    assert summary["approval"] == "approved"
    again = steps(summary)
    assert {name for name, step in again.items() if step["state"] == "done"} == ACTS
    cached = {name: step["digest"] for name, step in again.items() if step["cached"]}
    assert cached == {name: steps(first)[name]["digest"] for name in STEPS if name not in ACTS}
    assert summary["tasks"] == first["tasks"]
    staged = ask(first["endpoint"], a_face(project, first), "Which hair color?")
    assert ask(summary["endpoint"], a_face(project, first), "Which hair color?") == staged
    assert summary["endpoint"] != first["endpoint"]
    (row,) = json.loads(project.facemllm("promote", "list", "--json").stdout)["versions"]
    assert (row["state"], row["by"], row["production"]) == ("approved", ["Ada Lovelace"], True)
    statements = json.loads(project.facemllm("promote", "show", "1", "--json").stdout)["statements"]
    said = [(one["decision"], one["person"]) for one in statements]
    people = [("reject", "Ada Lovelace"), ("approve", "Ada Lovelace")]
    assert said == [("request", "pipeline"), *people, ("release", "pipeline")]
    assert "no version was released before" in project.facemllm("promote", "rollback").stderr


def test_production_starts_again_with_the_approved_bytes_alone(project: Any, first: dict[str, Any]) -> None:
    assert project.facemllm("services", "down", "production").returncode == 0
    weights = project.home / "home" / "store" / first["model"]["digest"] / "model.safetensors"
    right = weights.read_bytes()
    weights.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    refused = project.facemllm("services", "up", "production")
    assert refused.returncode == 1
    assert "refused: [digest]" in refused.stderr
    assert "model.safetensors was changed" in refused.stderr
    weights.write_bytes(right)
    again = project.facemllm("services", "up", "production")
    assert again.returncode == 0, again.stderr
    url = f"{again.stdout.strip()}/v1/models/{first['model']['name']}:predict"
    assert ask(url, a_face(project, first), "Which hair color?")


def test_interrupt_leaves_no_process_behind(project: Any, first: dict[str, Any]) -> None:
    child = start_until(project, "third", ("seed=1",), "ingest")
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=60) == 1
    assert workers(project) == []


def test_lineage_walks_back_to_the_source(project: Any, first: dict[str, Any]) -> None:
    done = project.facemllm("lineage", "1", "--json")
    assert done.returncode == 0, done.stderr
    for name in ("polish", "specialize", "instruct", "align", "reformat", "ingest"):
        assert steps(first)[name]["digest"] in done.stdout, name


def test_restore_brings_the_bytes_back(project: Any, first: dict[str, Any], tmp_path: Path) -> None:
    revision = json.loads(project.facemllm("version", "log", "--json").stdout)["revisions"][0]["sha"]
    done = project.facemllm("version", "restore", revision, str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    restored = json.loads(done.stdout)
    assert restored["conversations"] == steps(first)["reformat"]["digest"]
    assert restored["faces"] == steps(first)["annotate"]["digest"]


def test_down_leaves_none_at_all(project: Any, first: dict[str, Any]) -> None:
    assert project.facemllm("services", "down").returncode == 0
    assert project.processes() == []
