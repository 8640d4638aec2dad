"""The components that a platform's owner chooses from: places, MLflow's stores, mesh, quota, monitoring, backup."""

import json
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from facemllm import settings
from facemllm.serve.engine.room import Counters
from facemllm.serve.metrics import Metrics, follow_approval
from tests.unit.test_k8s import (
    ROOT,
    Document,
    documents,
    needs_kubectl,
    one,
    pods,
    rendered,
    rule_faults,
    schema_faults,
    with_components,
)

pytestmark = needs_kubectl
PLACES = {"gateway": "g", "knative": "k", "kuberay": "r", "monitoring": "m", "shared-class": "s", "disk-class": "d"}


def named(made: list[Document], kind: str) -> dict[str, Document]:
    return {d["metadata"]["name"]: d for d in made if d["kind"] == kind}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Document]:
    """The overlay `gpu` with every other component, and places of the test's own."""
    return with_components(tmp_path_factory.mktemp("made"), "istio", "kubeflow", "on-data", "kserve-0.15", **PLACES)


def test_components_render_together_and_meet_schemas_and_rules(made: list[Document]) -> None:
    new = [document for document in made if document not in documents("gpu")]  # those are held against them elsewhere
    assert {"AuthorizationPolicy", "PeerAuthentication", "RoleBinding", "CronJob"} <= {d["kind"] for d in new}
    faults = {f"{d['kind']} {d['metadata']['name']}": [*schema_faults(d), *rule_faults(d)] for d in new}
    assert {name: found for name, found in faults.items() if found} == {}
    assert len({(d["kind"], d["metadata"]["name"]) for d in made}) == len(made)
    assert {d["kind"] for d in made if d["metadata"].get("namespace") != "face-mllm"} == {"PriorityClass"}


def callers(policy: Document) -> list[str]:
    spaces = [one.get("namespaceSelector") for rule in policy["spec"]["ingress"] for one in rule["from"]]
    return [space["matchLabels"]["kubernetes.io/metadata.name"] for space in spaces if space]


def test_places_are_written_once_and_reach_policies_and_claims(made: list[Document]) -> None:
    policies = named(made, "NetworkPolicy")
    assert callers(policies["ray-among-itself"]) == ["r"]
    assert callers(policies["model-server-from-gateway"]) == ["g", "k", "k"]
    assert callers(policies["model-server-from-monitoring"]) == ["m"]
    assert {d["spec"]["storageClassName"] for d in named(made, "PersistentVolumeClaim").values()} == {"s"}
    (rule, probes) = named(made, "AuthorizationPolicy")["model-server-from-gateway"]["spec"]["rules"]
    assert rule["from"][0]["source"]["namespaces"] == ["g", "k"]
    paths = {path for to in probes["to"] for path in to["operation"]["paths"]}
    assert paths == {"/healthz", "/v2/health/live", "/v2/health/ready"}
    assert "places" not in named(made, "ConfigMap")
    claims = named(documents("dev"), "PersistentVolumeClaim").values()
    assert {claim["spec"]["storageClassName"] for claim in claims} == {"standard"}


@rendered
def test_the_policies_are_of_our_pods_and_of_no_others(overlay: str, monkeypatch: Any) -> None:
    (selected,) = one(overlay, "NetworkPolicy", "default-deny-ingress")["spec"]["podSelector"]["matchExpressions"]
    ours = [pod["metadata"]["labels"] for d in documents(overlay) for _, pod in pods(d) if "labels" in pod["metadata"]]
    ours.append(one(overlay, "InferenceService")["spec"]["predictor"]["labels"])
    monkeypatch.chdir(ROOT)
    ours.append(settings.load().cluster.labels)
    assert {labels[selected["key"]] for labels in ours} == set(selected["values"])


def test_in_a_profile_the_namespace_is_its_controllers_and_steps_get_kubeflows_rights(
    made: list[Document],
) -> None:
    assert named(made, "Namespace") == {}
    binding = named(made, "RoleBinding")["pipeline-runner-kfp"]
    assert (binding["roleRef"]["name"], binding["subjects"][0]["name"]) == (
        "kubeflow-pipelines-edit",
        "pipeline-runner",
    )


def test_in_a_mesh_mlflow_and_the_model_server_have_a_sidecar_and_say_who_may_come(
    made: list[Document],
) -> None:
    ((_, pod),) = pods(named(made, "Deployment")["mlflow"])
    labels = {"mlflow": pod["metadata"]["labels"]}
    labels["predictor"] = named(made, "InferenceService")["face-mllm"]["spec"]["predictor"]["labels"]
    assert {own["sidecar.istio.io/inject"] for own in labels.values()} == {"true"}
    for policy in named(made, "AuthorizationPolicy").values():
        wanted = policy["spec"]["selector"]["matchLabels"].items()
        assert any(wanted <= own.items() for own in labels.values())


def test_mlflow_is_upgraded_before_it_starts_and_two_of_it_can_serve() -> None:
    deployment = one("gpu", "Deployment", "mlflow")
    spec = deployment["spec"]["template"]["spec"]
    (server,) = spec["containers"]
    login = one("gpu", "ConfigMap", "mlflow-login")["data"]["basic_auth.ini"]
    assert "--app-name=basic-auth" in server["args"]
    assert "database_uri = postgresql://\n" in login
    assert "password" not in login
    upgrades = [(one["command"], one["envFrom"]) for one in spec["initContainers"]]
    assert upgrades == [
        (["mlflow", "db", "upgrade", "postgresql://"], server["envFrom"]),
        (["python", "-m", "mlflow.server.auth", "db", "upgrade", "--url=postgresql://"], server["envFrom"]),
    ]
    for container in (server, *spec["initContainers"]):
        path = {one["name"]: one.get("value") for one in container["env"]}["MLFLOW_AUTH_CONFIG_PATH"]
        assert any(path == f"{mount['mountPath']}/basic_auth.ini" for mount in container["volumeMounts"])
    assert deployment["spec"]["replicas"] > one("gpu", "PodDisruptionBudget", "mlflow")["spec"]["minAvailable"]
    assert not any("persistentVolumeClaim" in volume for volume in spec["volumes"])


def expressions(made: list[Document]) -> Iterator[str]:
    for rule in (d for d in made if d["kind"] == "PrometheusRule"):
        yield from (one["expr"] for group in rule["spec"]["groups"] for one in group["rules"])
    board = json.loads(named(made, "ConfigMap")["face-mllm-dashboard"]["data"]["face-mllm.json"])
    yield from (target["expr"] for panel in board["panels"] for target in panel["targets"])


def given() -> set[str]:
    """Names of all samples that the server gives."""
    registry = CollectorRegistry()
    Metrics(("age",), about={"name": "face-mllm"}, registry=registry).follow(Counters())
    follow_approval(lambda: "", registry)
    ends = {"counter": ["_total"], "info": ["_info"], "gauge": [""], "summary": ["_sum", "_count"]}
    ends["histogram"] = ["_bucket", "_sum", "_count"]
    return {f"{family.name}{end}" for family in registry.collect() for end in ends[family.type]}


def test_alerts_and_dashboard_ask_for_metrics_and_labels_that_there_are() -> None:
    asked = {name for text in expressions(documents("gpu")) for name in re.findall(r"\bfacemllm_\w+", text)}
    assert asked - given() == set()
    assert len(asked) >= 12
    labels = {one for text in expressions(documents("gpu")) for one in re.findall(r'(\w+)(?:=~|!~|!=|=)"', text)}
    assert labels <= {"status", "door", "end", "namespace", "deployment", "cronjob"}
    kept = {d["metadata"]["name"] for d in documents("gpu") if d["kind"] in ("Deployment", "CronJob")}
    watched = {
        name for text in expressions(documents("gpu")) for name in re.findall(r'(?:deployment|cronjob)="(.+?)"', text)
    }
    assert watched <= kept


def test_a_metric_that_is_not_there_is_noticed() -> None:
    assert not {"facemllm_queue_full_total", "facemllm_request_seconds", "facemllm_requests"} & given()


def test_each_alert_names_a_heading_of_the_runbook() -> None:
    text = (ROOT / "docs/runbook.md").read_text("utf-8")
    headings = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.+)$", text, re.M)}
    rules = [rule for group in one("gpu", "PrometheusRule")["spec"]["groups"] for rule in group["rules"]]
    assert {rule["annotations"]["runbook"] for rule in rules} - headings == set()
    assert len({rule["alert"] for rule in rules}) == len(rules)


@pytest.mark.parametrize("name", ["backup", "restore"])
def test_the_scripts_of_the_backup_are_sound(name: str) -> None:
    ((_, pod),) = pods(one("gpu", "CronJob", name))
    for container in (*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]):
        if container["command"][0] == "/bin/sh":
            subprocess.run(["/bin/sh", "-n", "-c", container["args"][0]], check=True)
    assert one("gpu", "CronJob", "restore")["spec"]["suspend"] is True
    secrets = {
        one["secretRef"]["name"] for container in pod["spec"]["initContainers"] for one in container.get("envFrom", ())
    }
    assert secrets <= {"mlflow-store", "mlflow-backup"}
