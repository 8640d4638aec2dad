"""The components that a platform's owner chooses from: places, MLflow's stores, mesh, quota, monitoring, backup."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from facemllm import settings
from facemllm.serve.engine.room import Counters
from facemllm.serve.metrics import Metrics, follow_approval
from facemllm.signing.policy import parse_policy
from facemllm.workflow.pods import on_cluster
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
PLACES = {"gateway": "g", "knative": "k", "kuberay": "r", "shared-class": "s", "disk-class": "d", "profile": "small"}
PLACES |= {"home": "/workspace/home", "runs": "/workspace/home/runs"}


def named(made: list[Document], kind: str) -> dict[str, Document]:
    return {d["metadata"]["name"]: d for d in made if d["kind"] == kind}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Document]:
    """The overlay `gpu` with every other component, and places of the test's own."""
    return with_components(tmp_path_factory.mktemp("made"), "istio", "kubeflow", "on-data", **PLACES)


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


def test_in_a_namespace_of_another_name_the_rights_are_its_own_accounts(tmp_path: Path) -> None:
    overlay = shutil.copytree(ROOT / "k8s", tmp_path / "k8s") / "overlays/gpu/kustomization.yaml"
    overlay.write_text(overlay.read_text("utf-8") + "\nnamespace: team-a\n", "utf-8")
    command = ["kubectl", "kustomize", str(overlay.parent)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    moved = list(yaml.load_all(text, yaml.CSafeLoader))
    bindings = named(moved, "RoleBinding").values()
    subjects = [(d["metadata"]["namespace"], one["namespace"]) for d in bindings for one in d["subjects"]]
    assert set(subjects) == {("team-a", "team-a")}
    assert set(named(moved, "Namespace")) == {"team-a"}


def test_places_are_written_once_and_reach_policies_and_claims(made: list[Document]) -> None:
    policies = named(made, "NetworkPolicy")
    assert callers(policies["ray-among-itself"]) == ["r"]
    assert callers(policies["model-server-from-gateway"]) == ["g", "k", "k"]
    assert {d["spec"]["storageClassName"] for d in named(made, "PersistentVolumeClaim").values()} == {"s"}
    assert "places" not in named(made, "ConfigMap")
    claims = named(documents("dev"), "PersistentVolumeClaim").values()
    assert {claim["spec"]["storageClassName"] for claim in claims} == {"standard"}


def test_what_starts_runs_and_releases_has_the_profile_and_the_image_of_the_overlay(made: list[Document]) -> None:
    for name in ("reconcile", "on-data"):
        ((_, pod),) = pods(named(made, "CronJob")[name])
        (container,) = pod["spec"]["containers"]
        profile, image = (word.rpartition("=")[2] for word in container["args"][:2])
        assert (profile, image) == ("small", container["image"])
        sets = [word.removeprefix("--set=") for word in container["args"] if word.startswith("--set=")]
        on_cluster(profile, [one for one in sets if one != settings.ON_CLUSTER])


def test_the_backup_is_of_the_folders_that_places_name(made: list[Document]) -> None:
    of_profile, _ = on_cluster("paper-7b", [])
    theirs = {"STORE": str(of_profile.home), "RUNS": str(of_profile.runs)}
    own = {"STORE": PLACES["home"], "RUNS": PLACES["runs"]}
    for written, folders in ((documents("gpu"), theirs), (made, own)):
        for name in ("backup", "restore"):
            ((_, pod),) = pods(named(written, "CronJob")[name])
            for container in (*pod["spec"]["initContainers"], *pod["spec"]["containers"]):
                given = {one["name"]: one["value"] for one in container.get("env", ())}
                assert container["name"] == "database" or given.items() >= folders.items()
                assert "/workspace" not in " ".join(container.get("args", ()))


def test_production_has_places_of_its_own_and_lets_prometheus_in(tmp_path: Path) -> None:
    folder = shutil.copytree(ROOT / "k8s/production", tmp_path / "production")
    written = yaml.safe_load((folder / "places.yaml").read_text("utf-8"))
    written["data"] = {"gateway": "g", "knative": "k", "monitoring": "m"}
    (folder / "places.yaml").write_text(yaml.safe_dump(written), "utf-8")
    command = ["kubectl", "kustomize", str(folder)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    production = list(yaml.load_all(text, yaml.CSafeLoader))
    (policy,) = named(production, "ConfigMap")["face-mllm-policy"]["data"].items()
    assert policy == ("policy.yaml", (folder / "policy.yaml").read_text("utf-8"))
    assert parse_policy(yaml.safe_load(policy[1]), "policy").keys == {}, "nobody decides until somebody is listed"
    policies = named(production, "NetworkPolicy")
    assert callers(policies["model-server-from-gateway"]) == ["g", "k", "k"]
    assert callers(policies["model-server-from-monitoring"]) == ["m"]
    assert "places" not in named(production, "ConfigMap")
    # what Prometheus asks is there, and it is let in where it asks
    monitor = one("gpu", "PodMonitor")["spec"]
    assert monitor["namespaceSelector"]["matchNames"] == [*named(production, "Namespace")]
    admitted = policies["model-server-from-monitoring"]["spec"]
    assert monitor["selector"] == admitted["podSelector"]
    ports = [port["port"] for rule in admitted["ingress"] for port in rule["ports"]]
    assert [asked["portNumber"] for asked in monitor["podMetricsEndpoints"]] == ports


@rendered
def test_the_policies_are_of_our_pods_and_of_no_others(overlay: str, monkeypatch: Any) -> None:
    (selected,) = one(overlay, "NetworkPolicy", "default-deny-ingress")["spec"]["podSelector"]["matchExpressions"]
    ours = [pod["metadata"]["labels"] for d in documents(overlay) for _, pod in pods(d) if "labels" in pod["metadata"]]
    ours.append({"app.kubernetes.io/component": "serving"})  # staging's, which a release applies
    monkeypatch.chdir(ROOT)
    ours.append(settings.load().cluster.labels)
    assert {labels[selected["key"]] for labels in ours} == set(selected["values"])


def test_in_a_profile_the_namespace_is_its_controllers_and_steps_get_kubeflows_rights(
    made: list[Document],
) -> None:
    assert named(made, "Namespace") == {}
    binding = named(made, "RoleBinding")["pipeline-runner-kfp"]
    assert binding["roleRef"]["name"] == "kubeflow-pipelines-edit"
    assert [subject["name"] for subject in binding["subjects"]] == ["pipeline-runner", "trainer", "releaser"]


def test_in_a_mesh_mlflow_has_a_sidecar_and_says_who_may_come(made: list[Document]) -> None:
    ((_, pod),) = pods(named(made, "Deployment")["mlflow"])
    labels = pod["metadata"]["labels"]
    assert labels["sidecar.istio.io/inject"] == "true"
    policies = [*named(made, "AuthorizationPolicy").values(), *named(made, "PeerAuthentication").values()]
    assert len(policies) == 2
    for policy in policies:
        assert policy["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_what_writes_to_mlflow_by_a_manifest_has_its_login(made: list[Document]) -> None:
    """KFP's steps get theirs from `cluster.steps`."""
    ((_, tools),), ((_, reconcile),) = (
        pods(named(made, kind)[name]) for kind, name in (("Deployment", "tools"), ("CronJob", "reconcile"))
    )
    for pod in (tools, reconcile):
        (container,) = pod["spec"]["containers"]
        given = {one["name"]: one["valueFrom"]["secretKeyRef"] for one in container["env"] if "valueFrom" in one}
        logins = {name: (from_["name"], from_["key"]) for name, from_ in given.items()}
        assert logins == {
            "MLFLOW_TRACKING_USERNAME": ("face-mllm-mlflow", "username"),
            "MLFLOW_TRACKING_PASSWORD": ("face-mllm-mlflow", "password"),
        }


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
