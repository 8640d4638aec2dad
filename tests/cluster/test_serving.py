"""Releases to KServe, end to end: signed decisions, a store in S3, and real model servers behind stand-ins of KServe
and of Kubernetes' API. Each pod runs its containers' own commands, the first one to its end, then the server."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from facemllm import tasks
from facemllm.errors import UserError
from facemllm.model.inference import Predictor, Query
from facemllm.model.pretrained import save_model
from facemllm.model.tiny import build_tiny
from facemllm.promote import registry as promoted
from facemllm.promote import releases
from facemllm.serve import deploy, reconcile, release
from facemllm.serve.kserve.rendering import DIGEST
from facemllm.serve.kserve.target import KServe
from facemllm.serve.probe import Probe
from facemllm.settings import Settings, load
from facemllm.signing import local, manifest
from facemllm.tasks.answers import answer
from tests.approved import ADA, Home, Registry, evaluation_of
from tests.asked import phrases
from tests.cluster.pods import Clients, ServingPod, secret
from tests.integration.conftest import bucket as bucket
from tests.kserve_controller import KServe as Controller
from tests.kubernetes_server import Cluster, serving
from tests.pictures import encode
from tests.refusing import refuses

PRODUCTION = ("face-mllm-production", "face-mllm")


@pytest.fixture
def settings(tmp_path: Path, bucket: Any) -> Settings:
    sets = [f"storage.home={tmp_path / 'home'}", "serve.target=kserve", "cluster.serving.models=s3://faces/models"]
    sets += [f"promote.decisions={tmp_path / 'decisions'}", "cluster.serving.reach=public"]
    sets += ["serve.canary.min_requests=10", "serve.canary.max_p95_ratio=50", "serve.canary.step_seconds=0"]
    return load("ci", [*sets, "promote.model_name=face-mllm"])


@pytest.fixture
def cluster(settings: Settings, tmp_path: Path, monkeypatch: Any) -> Iterator[tuple[Cluster, Controller]]:
    made = Cluster()
    made.kinds["coordination.k8s.io", "leases"] = ("v1", "Lease")
    for name in (PRODUCTION[0], "kserve"):
        made.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    metadata = {"name": "inferenceservice-config", "namespace": "kserve"}
    data = {"deploy": json.dumps({"defaultDeploymentMode": "Knative"})}
    made.put({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    keys = {f"AWS_{name}": os.environ[f"AWS_{name}"] for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "ENDPOINT_URL")}
    for namespace in (PRODUCTION[0], "face-mllm"):
        secret(made, namespace, "face-mllm-models", keys)
    numbers = iter(range(1000))
    controller = Controller(made, lambda body: ServingPod(made, body, tmp_path / f"pod-{next(numbers)}"))
    with serving(made) as address:
        made.kubeconfig(tmp_path / "kubeconfig", address, "admin")
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        yield made, controller
        controller.close()


def built(folder: Path, seed: int) -> Path:
    words = [t for name in tasks.all_names() for q in tasks.get(name).questions() for t in q.templates]
    save_model(*build_tiny(load("ci").model, words + phrases(), phrases(), seed), folder)
    return folder


def probes_of(model: Path) -> list[Probe]:
    """What evaluation would have answered to closed questions about one face, computed here."""
    picture = Image.radial_gradient("L").resize((96, 96)).convert("RGB")
    data = encode(np.asarray(picture))
    predictor, found = Predictor.load(model, threads=1), []
    for question in tasks.get("attributes").questions()[:12]:
        query = Query(question.templates[0], tuple(option.text for option in question.options))
        scored = predictor.score([picture], [[query]])[0][0]
        said = answer(question, scored.probabilities, scored.greedy)
        found.append(Probe(data, question.templates[0], said.text, said.value))
    return sorted(found, key=lambda probe: probe.value is None)


def test_from_staging_over_the_canary_to_a_rollback(
    settings: Settings, cluster: tuple[Cluster, Controller], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api, controller = cluster
    local.policy(settings)
    home, mlflow = Home(settings), Registry(monkeypatch)
    home.person(ADA, "requester", "approver")
    about = {"name": "face-mllm-policy", "namespace": PRODUCTION[0]}
    policy = {"policy.yaml": settings.policy_file.read_text("utf-8")}
    api.put({"apiVersion": "v1", "kind": "ConfigMap", "metadata": about, "data": policy})
    first = built(tmp_path / "models" / "1", 0)
    folders, digests = {1: first}, dict[int, str]()
    for number in (2, 3, 4):
        shutil.copytree(first, folders.setdefault(number, tmp_path / "models" / str(number)))
        (folders[number] / "notes.json").write_text(json.dumps({"version": number}), "utf-8")
    expected = {number: probes_of(first) for number in folders}
    first_one, *others = expected[3]  # it passes its proof, and fails its trial
    said = ["yes" if one.value == "no" else "no" for one in others]
    changed = [replace(one, answer=text, value=text) for one, text in zip(others, said, strict=True)]
    expected[3] = [first_one, *changed]
    for number, folder in folders.items():
        digests[number] = manifest.of(folder).digest
        mlflow.add(number, digests[number])
    by_evaluation = {evaluation_of(number): probes for number, probes in expected.items()}
    monkeypatch.setattr("facemllm.serve.release.probes_of", lambda store, evaluation, count: by_evaluation[evaluation])
    monkeypatch.setattr("facemllm.serve.release.model_dir", lambda settings, version: folders[version.version])
    monkeypatch.setattr(deploy, "parity_of", lambda *_: lambda url: None)
    allowed = SimpleNamespace(require=lambda *_: None, sources_of_model=lambda folder: [])
    monkeypatch.setattr("facemllm.serve.release.ledger", allowed)

    def object_() -> Any:
        return api.get("InferenceService", PRODUCTION[1], PRODUCTION[0])

    def serves(number: int) -> None:
        found = object_()
        assert found["metadata"]["annotations"][DIGEST] == digests[number]
        info = httpx.get(f"{found['status']['url']}/info", trust_env=False, timeout=60).json()
        assert (info["digest"], info["version"]) == (digests[number], str(number))
        assert info["authorized"]["approvals"][0]["person"] == ADA
        assert promoted.champion(settings).digest == digests[number]  # type: ignore[union-attr]
        assert "champion" in mlflow.versions[number].aliases

    staged = deploy.deploy(settings, folders[1], digests[1], "1", expected[1][0])
    assert httpx.get(f"{staged.url}/info", trust_env=False, timeout=60).json()["authorized"] is None
    refuses("may not be served", release.switch, settings, 1, "release")
    assert object_() is None

    home.approve(folders[1], 1)
    endpoint = release.switch(settings, 1, "release")
    serves(1)
    home.approve(folders[2], 2)
    with Clients(endpoint.predict_url, {"instances": [expected[1][0].instance]}) as clients:
        release.switch(settings, 2, "release")
        serves(2)
        home.approve(folders[3], 3)
        message = refuses("production serves version 2 again", release.switch, settings, 3, "release")
        assert "at 10 % of the requests it was worse" in message
        assert "differ from evaluation's" in message
        serves(2)
        assert len(clients.statuses) > 20
        assert set(clients.statuses) == {200}
    assert reconcile.due(settings) is None, "a model that failed its trial waits for a new approval"

    home.approve(folders[4], 4)
    ended: list[str] = []

    def poll() -> None:
        try:
            due, _ = reconcile.reconcile(settings)
            ended.append(due.digest if due else "nothing")
        except UserError as error:
            ended.append(str(error))

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(poll) for _ in range(2)]
        time.sleep(2)
        api.away = 4
        api.expire()
        for one in running:
            one.result()
    assert digests[4] in ended
    assert any("another release is under way" in one or one == "nothing" for one in ended), ended
    poll()
    assert ended[-1] == "nothing"
    serves(4)
    statements = [(one.decision, one.model) for one in releases.in_force(home.decisions)]
    assert statements.count(("release", digests[4])) == 1

    back = release.former(settings)
    assert back.digest == digests[2]
    release.switch(settings, back.version, "rollback", "complaints")
    serves(2)
    last = [(one.decision, one.model) for one in releases.in_force(home.decisions)]
    assert last == [
        *[("release", digests[1]), ("release", digests[2]), ("release", digests[3]), ("rollback", digests[2])],
        *[("release", digests[4]), ("rollback", digests[2])],
    ]
    percents = controller.service(*PRODUCTION).percents
    assert [one for one in percents if one not in (None, 0, 10, 50, 100)] == []
    assert KServe(settings).serving().version == "2"  # type: ignore[union-attr]
    print(f"{len(controller.service(*PRODUCTION).revisions)} revisions; shares applied: {percents}")
