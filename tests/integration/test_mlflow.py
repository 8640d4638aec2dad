"""Tracking, registry, decisions and lineage against a real MLflow server."""

import json
import pickle
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from facemllm.core import digests
from facemllm.core.step import PARENT_RUN
from facemllm.core.store import Store
from facemllm.errors import UserError
from facemllm.gc import roots
from facemllm.promote import artifacts, decide, overview, registry, releases
from facemllm.promote import bundle as bundles
from facemllm.promote.decide import Who
from facemllm.promote.lineage import lineage
from facemllm.promote.records import Records
from facemllm.report import plots
from facemllm.scoring import figures
from facemllm.settings import Settings, load
from facemllm.signing import local
from facemllm.signing.authorization import authorize
from facemllm.tables import FACES, PREDICTIONS, TableWriter
from facemllm.tracking import client as mlflow_client
from facemllm.tracking import recorded
from facemllm.tracking import runs as tracking
from facemllm.workflow.runner import execute
from tests import evaluation_example
from tests.approved import ADA, Home, bundle_files
from tests.refusing import refuses

pytestmark = pytest.mark.integration

METRICS = evaluation_example.METRICS
EVALUATION = "e" * 64


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder as `save_pretrained` leaves it, with bytes of the test's own."""
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(str(tmp_path).encode() * 1000)
    (folder / "config.json").write_text("{}")
    (folder / "lineage.json").write_text('{"sources": ["render"]}')
    (folder / "sub" / "tokenizer.json").write_text("{}")
    return folder


def register(settings: Settings, model: Path, run_id: str | None = None, **gate: Any) -> registry.Version:
    passed = {"passed": True, **gate}
    return registry.register(settings, model, digests.of_tree(model), METRICS, EVALUATION, passed, run_id)


def run_of(settings: Settings, run_id: str) -> Any:
    return tracking.connect(settings).get_run(run_id)


def stored_files(settings: Settings, version: registry.Version, artifacts: Path) -> Path:
    """Folder on the server's disk with the bytes of a version."""
    model_id = version.source.removeprefix("models:/")
    location = tracking.connect(settings).get_logged_model(model_id).artifact_location
    return artifacts / location.removeprefix("mlflow-artifacts:/")


def summary(**changed: Any) -> Mapping[str, Any]:
    steps = [{"name": "ingest", "state": "done", "seconds": 1.5}, {"name": "align", "state": "cached", "seconds": None}]
    gate = {"passed": True, "reasons": []}
    cost = {"align": {"seconds": 3.0, "tokens": 10}}
    head = {"run": "r", "seconds": 9.0, "steps": steps, "gate": gate, "cost": cost, "approval": "pending"}
    return {**head, **METRICS, "model": {"digest": "a" * 64, "version": "1"}, **changed}


def test_a_pipeline_and_its_steps_are_runs(settings: Settings, tmp_path: Path, capfd: Any) -> None:
    parent = tracking.start_pipeline(settings, "nightly")
    with tracking.step_run(settings, parent, "ingest", key="k" * 64, inputs={"faces": "f" * 64}) as run:
        run.finish("0" * 64, {"figure": "6 faces", "seconds": 2.5, "cost": {"tokens": 4}})
    with pytest.raises(ZeroDivisionError), tracking.step_run(settings, parent, "align") as failing:
        raise ZeroDivisionError("first line\nsecond line")
    with pytest.raises(KeyboardInterrupt), tracking.step_run(settings, parent, "instruct") as killed:
        raise KeyboardInterrupt
    (tmp_path / "report.html").write_text("<p>report</p>")
    tracking.finish_pipeline(settings, parent, summary(), tmp_path)

    top, step = run_of(settings, parent), run_of(settings, run.run_id)
    assert step.data.tags["mlflow.parentRunId"] == parent
    expected = {"run": "nightly", "step": "ingest", "key": "k" * 64, "input.faces": "f" * 64, "output": "0" * 64}
    assert {name: step.data.tags[f"facemllm.{name}"] for name in expected} == expected
    assert (step.info.status, step.data.metrics) == ("FINISHED", {"seconds": 2.5, "cost/tokens": 4.0})
    assert run_of(settings, failing.run_id).info.status == "FAILED"
    assert run_of(settings, failing.run_id).data.tags["facemllm.error"] == "first line second line"
    assert run_of(settings, killed.run_id).info.status == "KILLED"
    assert top.info.status == "FINISHED"
    assert (top.data.metrics["age/mae"], top.data.metrics["age/mae_low"]) == (9.5, 8.8)
    assert (top.data.metrics["closed_mean/balanced_accuracy"], top.data.metrics["gate/passed"]) == (0.8, 1.0)
    assert top.data.metrics["cost/align/tokens"] == 10.0
    assert "step/align/seconds" not in top.data.metrics
    assert top.data.tags["facemllm.approval"] == "pending"
    files = {file.path for file in tracking.connect(settings).list_artifacts(parent)}
    assert files == {"summary.json", "report.html", "settings.yaml"}
    assert capfd.readouterr().out == ""  # stdout belongs to --json

    failed = tracking.start_pipeline(settings, "nightly")
    tracking.finish_pipeline(settings, failed, summary(steps=[{"name": "align", "state": "failed", "seconds": 1.0}]))
    assert run_of(settings, failed).info.status == "FAILED"


def test_a_result_is_named_as_long_as_its_run_is_there(settings: Settings) -> None:
    with tracking.step_run(settings, None, "ingest", key="k" * 64, inputs={"faces": "f" * 64}) as run:
        run.finish("c0" * 32, {"figure": "6 faces", "seconds": 2.5})
    assert {"f" * 64, "c0" * 32} <= named(settings)
    tracking.connect(settings).delete_run(run.run_id)
    assert not {"c0" * 32} & named(settings)


def named(settings: Settings) -> set[str]:
    return set(roots.roots([settings], Records(settings.home)).named)


def test_runs_say_what_they_are_and_where_they_come_from(settings: Settings) -> None:
    lines = ["seed=7", "train.stages.align.steps=11", "model.knowledge.enabled=true"]
    kept = {name: getattr(settings, name) for name in ("storage", "tracking", "promote")}
    chosen = load("laptop", lines).model_copy(update=kept)
    parent = tracking.start_pipeline(chosen, "nightly")
    runs = {}
    for step in ("align", "evaluate", "gate"):
        with tracking.step_run(chosen, parent, step) as run:
            runs[step] = run_of(chosen, run.run_id)
    top = run_of(chosen, parent)
    assert re.fullmatch(r"nightly \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", top.info.run_name)
    assert [run.info.run_name for run in runs.values()] == [f"{step} {top.info.run_name}" for step in runs]

    said = {"profile", "seed", "model.preset", "train.stages.align.steps", "model.knowledge.enabled"}
    where = {name for name in top.data.params if name.partition(".")[0] in ("storage", "tracking", "promote")}
    assert set(top.data.params) - where == said
    assert top.data.params["train.stages.align.steps"] == "11"
    params = runs["align"].data.params
    assert (params["steps"], params["seed"], params["trains.language"]) == ("11", "7", "frozen")
    assert {"learning_rate", "batch_images", "train.precision", "model.knowledge.tau"} <= set(params)
    heads = {name.partition(".")[0] for name in params if "." in name}
    assert heads == {"trains", "tasks", "rates", "train", "model"}  # nothing that the stage does not depend on
    assert not [name for name in params if name.startswith(("model.segmentation", "train.stages"))]
    assert {name.partition(".")[0] for name in runs["evaluate"].data.params} == {"profile", "seed", "evaluate"}
    assert "promote.champion_margin" in runs["gate"].data.params
    whole = tracking.connect(chosen).download_artifacts(parent, "settings.yaml")
    assert yaml.safe_load(Path(whole).read_text("utf-8")) == chosen.model_dump(mode="json")

    tags, own = top.data.tags, runs["align"].data.tags
    assert (tags["mlflow.source.name"], tags["mlflow.source.type"]) == ("pipeline.py", "LOCAL")
    assert (own["mlflow.source.name"], own["mlflow.source.type"]) == ("components/train.py", "LOCAL")
    if commit := tracking.commit():
        expected = (commit.removesuffix("+changes"), str(commit.endswith("+changes")).lower())
        assert (own["mlflow.source.git.commit"], own["mlflow.source.git.dirty"]) == expected
    on_cluster = tracking.join_pipeline(settings, "a run of a cluster")
    assert run_of(settings, on_cluster).data.tags["mlflow.source.type"] == "JOB"


def test_the_experiment_is_model_training(settings: Settings) -> None:
    client = tracking.connect(settings)
    name, kind = tracking.KIND
    old = client.create_experiment(settings.tracking.experiment)  # as an earlier release left it
    assert tracking.experiment_id(settings, client) == old
    assert client.get_experiment(old).tags[name] == kind
    client.set_experiment_tag(old, name, "genai_development")
    tracking.experiment_id(settings, client)
    assert client.get_experiment(old).tags[name] == "genai_development"  # whoever chose another keeps it
    other = settings.model_copy(update={"tracking": settings.tracking.model_copy(update={"experiment": f"{old}-new"})})
    new = tracking.experiment_id(other, client)
    assert client.get_experiment(new).tags[name] == kind
    expected = f"{settings.tracking.uri}/#/experiments/{new}/runs?workflowType=machine_learning"
    assert tracking.experiment_url(other) == expected


def test_tables_are_datasets_of_the_runs_that_read_them(settings: Settings, tmp_path: Path) -> None:
    with TableWriter(tmp_path / "table", FACES) as writer:
        writer.write([{"image_id": "1", "image": {"bytes": b"x", "path": None}, "source": "render", "split": "train"}])
    digest = writer.manifest["digest"]
    Store(settings.home).keep("k", tmp_path / "table", digest, {"step": "reformat"})
    parent = tracking.start_pipeline(settings, "r")
    read: dict[str, Any] = {}
    for step, inputs in {"align": {"conversations": digest}, "gate": {"evaluation": digest}}.items():
        with tracking.step_run(settings, parent, step, inputs=inputs) as run:
            read[step] = run_of(settings, run.run_id).inputs.dataset_inputs
    steps = [{"name": "reformat", "state": "cached", "seconds": None, "digest": digest}]
    tracking.finish_pipeline(settings, parent, summary(steps=steps))
    for found, context in ((read["align"], "training"), (run_of(settings, parent).inputs.dataset_inputs, "training")):
        ((dataset, tags),) = ((one.dataset, one.tags) for one in found)
        assert (dataset.name, dataset.digest, dataset.source_type) == ("conversations", digest[:12], "local")
        assert json.loads(dataset.source) == {"uri": str(settings.home / "store" / digest)}
        assert json.loads(dataset.profile) == {"num_rows": 1}
        assert [(tag.key, tag.value) for tag in tags] == [("mlflow.data.context", context)]
    assert read["gate"] == []


def test_the_note_leads_to_the_report_and_to_runs_that_were_recalled(settings: Settings, tmp_path: Path) -> None:
    with tracking.step_run(settings, tracking.start_pipeline(settings, "r"), "align") as trained:
        pass
    (tmp_path / "model").mkdir()
    Store(settings.home).keep("k", tmp_path / "model", "a" * 64, {"step": "align", "run_id": trained.run_id})
    steps = [
        {"name": "align", "state": "cached", "seconds": 3.0, "digest": "a" * 64, "figure": "loss 1.5 | 10 steps"},
        {"name": "deploy", "state": "done", "seconds": 1.0, "digest": "a" * 64, "figure": "http://host"},
    ]
    (tmp_path / "report.html").write_text("<p>report</p>")
    again = tracking.start_pipeline(settings, "r")
    tracking.finish_pipeline(settings, again, summary(steps=steps), tmp_path)
    run = run_of(settings, again)
    pages = f"#/experiments/{run.info.experiment_id}/runs"
    view = "?workflowType=machine_learning"
    assert run.data.tags["mlflow.note.content"].splitlines() == [
        f"[Report]({pages}/{again}/artifacts/report.html{view})",
        "",
        "| step | state | |",
        "|---|---|---|",
        f"| [align]({pages}/{trained.run_id}{view}) | recalled | loss 1.5 / 10 steps |",
        "| deploy | done | http://host |",
    ]


def test_a_step_that_only_acts_is_no_run(
    settings: Settings, model: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(settings, model)
    parent = tracking.start_pipeline(settings, "r")
    monkeypatch.setenv(PARENT_RUN, parent)
    assert execute("await_approval", settings, version="1") == "pending"
    experiments = [run_of(settings, parent).info.experiment_id]
    nested = tracking.connect(settings).search_runs(experiments, f"tags.`mlflow.parentRunId` = '{parent}'")
    assert list(nested) == []


def test_runs_of_a_killed_process_are_reaped(settings: Settings) -> None:
    alive = tracking.start_pipeline(settings, "night")
    dead = tracking.start_pipeline(settings, "night")
    other = tracking.start_pipeline(settings, "another")
    client = tracking.connect(settings)
    for run_id in (dead, other):
        client.set_tag(run_id, "facemllm.process", "elsewhere/1/1.00")
    assert tracking.reap(settings, "night") == [dead]
    statuses = [run_of(settings, run_id).info.status for run_id in (alive, dead, other)]
    assert statuses == ["RUNNING", "KILLED", "RUNNING"]


def test_training_curves_and_tables_come_back(settings: Settings) -> None:
    with tracking.step_run(settings, None, "align") as run:
        curve = pickle.loads(pickle.dumps(run.curve_logger()))
        for step in range(1, 1201):
            curve(step, {"train/loss": 1 / step, "train/rate": 0.1})
        assert curve.flush()
        curve(1200, {"train/loss": 7.0})
        assert curve.flush()
        run.log_table(figures.SAMPLES, {"image_id": ["a", "b"], "probability": [0.5, None]})
        run.finish("0" * 64, {"seconds": 1.0})
    rows = [{"image_id": "a", "probability": 0.5}, {"image_id": "b", "probability": None}]
    assert recorded.table(settings, run.run_id, figures.SAMPLES) == rows
    assert recorded.table(settings, run.run_id, figures.RELATIONS) == []
    points = recorded.curve(settings, run.run_id)
    assert (len(points), points[0]) == (1200, {"step": 1, "train/loss": 1.0, "train/rate": 0.1})
    assert points[-1]["train/loss"] == 7.0  # logged again after a restart: the later one counts


def test_every_part_of_an_evaluation_is_kept(settings: Settings, tmp_path: Path) -> None:
    answer = {"image_id": "i", "task": "age", "answer": "30", "parsed": "31"}
    with TableWriter(tmp_path / "predictions", PREDICTIONS) as table:
        table.write({"sample_id": f"{n:064x}", **answer} for n in range(90))
    with tracking.step_run(settings, None, "evaluate") as run:
        run.log_evaluation(METRICS, tmp_path, plots.drawn(METRICS))
    client = tracking.connect(settings)
    assert client.get_run(run.run_id).data.metrics == figures.evaluation_metrics(METRICS)
    kept = {Path(file.path).name for file in client.list_artifacts(run.run_id, "evaluation")}
    assert kept >= {"fairness.json", "fairness_gaps.json", "fairness.png", "reliability.png", "confusion"}
    assert kept >= {"results.json", "answers.json", "intervals.png", "metrics.json"}
    assert len(recorded.table(settings, run.run_id, "evaluation/fairness")) == 9
    assert len(recorded.table(settings, run.run_id, "evaluation/answers")) == 60
    results = recorded.table(settings, run.run_id, "evaluation/results")
    assert [row["item"] for row in results if row["task"] == "zero_shot"][-1] == "Wearing_Earrings"


def test_the_same_bytes_are_one_version(settings: Settings, model: Path) -> None:
    parent = tracking.start_pipeline(settings, "r")
    assert registry.champion(settings) is None
    first = register(settings, model, parent)
    assert (first.version, first.gate, first.evaluation) == (1, "passed", EVALUATION)
    assert first.aliases == ("candidate",)
    assert first.digest == digests.of_tree(model)
    assert "Not for identifying people" in first.description
    client = tracking.connect(settings)
    assert "model_card.md" in {file.path for file in client.list_artifacts(parent)}
    logged = client.get_logged_model(first.source.removeprefix("models:/"))
    assert (str(logged.status), logged.source_run_id) == ("READY", parent)
    assert {"age/mae", "attributes/balanced_accuracy"} <= {metric.key for metric in logged.metrics}
    assert register(settings, model, parent).version == 1

    (model / "config.json").write_text('{"other": 1}')
    second = register(settings, model)
    assert [(v.version, v.aliases) for v in registry.versions(settings)] == [(2, ("candidate",)), (1, ())]
    assert registry.find_version(settings, "candidate") == second
    assert registry.find_version(settings, "v1").digest == first.digest
    registry.set_alias(settings, 1, "champion")
    assert registry.champion(settings) is None, "nothing was released"
    for unknown in ("7", "nobody", "", "../1"):
        refuses("there are 2, 1, candidate, champion", registry.find_version, settings, unknown)


def test_a_version_has_a_signature_and_no_code(settings: Settings, model: Path, mlflow_server: Any) -> None:
    version = register(settings, model)
    held = stored_files(settings, version, mlflow_server.artifacts)
    assert {path.name for path in held.iterdir()} == {path.name for path in model.iterdir()} | {artifacts.MLMODEL}
    address = f"{mlflow_server.uri}/model-versions/get-artifact"  # where the version's page reads its schema
    asked = requests.get(address, {"path": "MLmodel", "name": version.name, "version": "1"}, timeout=30)
    stored = yaml.safe_load(asked.text)
    signature = {name: json.loads(stored["signature"][name]) for name in ("inputs", "outputs")}
    assert [(one["name"], one["type"]) for one in signature["inputs"]] == [("image", "binary"), ("question", "string")]
    assert [one["name"] for one in signature["outputs"]] == ["answer", "value"]
    assert not stored.get("flavors")


def test_a_refused_model_and_other_bytes_are_not_registered(settings: Settings, model: Path) -> None:
    refuses("bytes do not match", registry.register, settings, model, "0" * 64, METRICS, EVALUATION, {"passed": True})
    with pytest.raises(UserError, match=r"the gate refused model .*: age too high"):
        register(settings, model, passed=False, reasons=["age too high"])
    refuses("none is registered yet", registry.find_version, settings, 1)
    register(settings, model)
    refuses("the gate refused", register, settings, model, passed=False, reasons=["age too high"])
    marked = registry.find_version(settings, 1)
    assert (marked.gate, marked.aliases) == ("refused", ())
    assert register(settings, model).gate == "passed"


@pytest.mark.parametrize("left", ["part uploaded", "whole", "damaged"])
def test_a_half_done_registration_is_completed(settings: Settings, model: Path, left: str) -> None:
    client = tracking.connect(settings)
    tags = {registry.DIGEST: digests.of_tree(model)}
    orphan = client.create_logged_model(tracking.experiment_id(settings, client), "m", tags=tags).model_id
    if left == "part uploaded":
        client.log_model_artifacts(orphan, str(model / "sub"), "sub")
    else:
        client.log_model_artifacts(orphan, str(model))
        client.finalize_logged_model(orphan, "READY")
    if left == "damaged":
        (model.parent / "odd.txt").write_text("not of the model")
        client.log_model_artifact(orphan, str(model.parent / "odd.txt"))
    version = register(settings, model)
    assert (version.source == f"models:/{orphan}") == (left != "damaged")
    assert digests.of_tree(registry.fetch(settings, 1, model.parent / "out")) == version.digest


def test_only_the_registered_bytes_are_fetched(
    settings: Settings, model: Path, mlflow_server: Any, tmp_path: Path
) -> None:
    version = register(settings, model)
    out = registry.fetch(settings, "candidate", tmp_path / "deep" / "out")
    assert digests.of_tree(out) == version.digest
    assert registry.fetch(settings, 1, out) == out
    held = stored_files(settings, version, mlflow_server.artifacts)
    (held / "model.safetensors").write_bytes(b"tampered")
    before = set(tmp_path.rglob("*"))
    refuses("not those registered", registry.fetch, settings, 1, tmp_path / "again")
    shutil.copy(model / "model.safetensors", held)
    (held / "extra.py").write_text("import os")
    refuses("not those registered", registry.fetch, settings, 1, tmp_path / "again")
    shutil.rmtree(held)
    with pytest.raises(UserError):
        registry.fetch(settings, 1, tmp_path / "again")
    assert set(tmp_path.rglob("*")) == before


@pytest.fixture
def home(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Home:
    """Who decides; and bundles that hold what is asked here, in place of an evaluation's."""
    local.policy(settings)
    made = Home(settings)
    made.person(ADA, "requester", "approver")

    def collect(settings: Settings, version: registry.Version) -> bundles.Bundle:
        named = {"name": version.name, "version": version.version, "digest": version.digest}
        files = bundle_files(version.digest, model=named, evaluation={"digest": version.evaluation})
        return bundles.Bundle(files, json.loads(files["bundle.json"]))

    monkeypatch.setattr(bundles, "collect", collect)
    return made


def stored(settings: Settings, model: Path) -> registry.Version:
    """The model registered, and in the store."""
    version = register(settings, model)
    shutil.copytree(model, settings.home / "store" / version.digest)
    return version


def test_mlflow_mirrors_decisions_and_decides_nothing(settings: Settings, model: Path, home: Home) -> None:
    version = stored(settings, model)
    decide.request(settings, 1)
    made = decide.decide(settings, "candidate", "approve", "figures hold", Who(ADA))
    tags = registry.find_version(settings, 1).tags
    assert tags[decide.APPROVAL].startswith(f"approved by {ADA} until 2")
    assert tags[decide.STATEMENT] == made.id
    row = overview.list_versions(settings)[0][0]
    assert (row["state"], row["by"], row["gate"], row["aliases"]) == ("approved", [ADA], "passed", ("candidate",))

    client = tracking.connect(settings)
    client.set_model_version_tag(version.name, "1", decide.APPROVAL, "rejected by somebody")
    client.set_model_version_tag(version.name, "1", registry.GATE, "refused")
    assert decide.state(settings, 1) == "approved"
    assert authorize(version.digest, home.decisions, local.policy(settings)).approvals[0].person == ADA
    client.set_model_version_tag(version.name, "1", registry.DIGEST, "b" * 64)
    assert decide.state(settings, 1) == "pending"
    client.set_registered_model_alias(version.name, "champion", "1")
    assert registry.champion(settings) is None
    assert (
        "alias champion was moved to version 1; by signed releases nothing was"
        in overview.list_versions(settings)[1][0]
    )


def test_a_model_that_mlflow_lost_is_named(settings: Settings, model: Path, home: Home) -> None:
    version = stored(settings, model)
    decide.request(settings, 1)
    made = decide.decide(settings, 1, "approve", "figures hold", Who(ADA))
    releases.record(settings, home.decisions, "release", made.bundle, version.digest, "")
    champion = registry.champion(settings)
    assert champion is not None
    assert (champion.name, champion.version, champion.digest) == (version.name, 1, version.digest)
    tracking.connect(settings).set_model_version_tag(version.name, "1", registry.DIGEST, "b" * 64)
    assert registry.champion(settings) == champion, "MLflow has no say in it"
    refuses(
        f"MLflow has no version of model {version.digest[:12]} any more", registry.of_digest, settings, version.digest
    )


def test_lineage_of_a_version_reaches_its_runs(settings: Settings, model: Path, tmp_path: Path) -> None:
    digest = digests.of_tree(model)
    with tracking.step_run(settings, None, "specialize") as run:
        pass
    shutil.copytree(model, tmp_path / "result")
    facts = {"step": "specialize", "inputs": {"conversations": "c" * 64}, "run_id": run.run_id}
    Store(settings.home).keep("k", tmp_path / "result", digest, {**facts, "commit": tracking.commit()})
    register(settings, model)
    found, version = lineage(settings, "candidate"), f"{settings.promote.model_name}/1"
    assert found.roots == [version]
    assert found.nodes[version].facts["aliases"] == ["candidate"]
    assert {"version", "specialize", "evaluate"} <= {node.kind for node in found.nodes.values()}
    assert found.nodes[digest].facts["run_id"] == run.run_id
    assert tracking.commit() is None or f"commit:{tracking.commit()}" in found.nodes
    assert lineage(settings, digest[:10]).roots == [version]
    storage = settings.storage.model_copy(update={"home": str(tmp_path / "h2")})
    elsewhere = settings.model_copy(update={"storage": storage})
    assert digest in lineage(elsewhere, "1").nodes


@contextmanager
def no_server() -> Iterator[int]:
    with socket.socket() as bound:  # bound, not listening: refuses
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@contextmanager
def server(answer: bytes = b"") -> Iterator[int]:
    """One that says this to whatever it is asked, or hangs."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        connection.recv(1000)
                        connection.sendall(answer)

        if answer:
            threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]


PAGE = b"HTTP/1.1 200 OK\r\nContent-Length: 34\r\n\r\n<html>a router's login page</html>"


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (no_server, "no MLflow server at http://127.0.0.1:.*facemllm services up"),
        (server, "does not answer within 1 s; .*facemllm services up"),
        (partial(server, PAGE), "what answers at .* is not MLflow"),
        (partial(server, b"SSH-2.0-OpenSSH_9.2\r\n"), "does not speak HTTP as MLflow does"),
    ],
)
def test_what_is_no_mlflow_is_told_in_one_line(there: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.invalid:3128")
    monkeypatch.setattr(mlflow_client, "PROBE_S", 1.0)
    with there() as port:
        settings = load("laptop", [f"services.mlflow_port={port}"])
        began = time.monotonic()
        with pytest.raises(UserError, match=message) as refused:
            tracking.start_pipeline(settings, "r")
    assert time.monotonic() - began < 6
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("address", ["localhost:5000", "http://[", "http://no such host/", "foo://host"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    settings = load("laptop")
    settings = settings.model_copy(update={"tracking": settings.tracking.model_copy(update={"uri": address})})
    with pytest.raises(UserError):
        tracking.connect(settings)


def test_a_server_lost_in_between_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with no_server() as port:
        address = f"http://127.0.0.1:{port}"
        run = tracking.StepRun(address, "0" * 32, mlflow_client.open_client(address))
        with pytest.raises(UserError, match=f"MLflow at {address}: ") as lost:
            run.log_metrics({"a": 1.0})
    assert "\n" not in str(lost.value)


def test_a_server_that_goes_by_another_name_says_so_at_once(
    settings: Settings, mlflow_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, known = mlflow_server.uri.rsplit(":", 1)[1], socket.getaddrinfo
    resolve = lambda host, *more, **named: known("127.0.0.1" if host == "mlflow.team" else host, *more, **named)  # noqa: E731
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    named = settings.tracking.model_copy(update={"uri": f"http://mlflow.team:{port}"})
    with pytest.raises(UserError, match=f"--allowed-hosts mlflow.team:{port}"):
        tracking.connect(settings.model_copy(update={"tracking": named}))
