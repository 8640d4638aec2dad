"""What is applied to KServe: sound by its schema, unprivileged, with the local server's flags; and who may apply it."""

import copy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from facemllm.core import servers
from facemllm.errors import UserError
from facemllm.serve import server
from facemllm.serve.kserve import rendering
from facemllm.serve.kserve.rendering import PRODUCTION, STAGING, Model
from facemllm.settings import Settings, load
from facemllm.signing.policy import parse_policy
from tests.unit.test_k8s import ROOT, needs_kubectl, pods, put, rule_faults, schema_faults
from tests.unit.test_k8s import one as document

DIGEST = "ab" * 32
ADDRESS = f"s3://face-mllm-models/models/{DIGEST}"
MODEL = Model(DIGEST, "7", ADDRESS, f"s3://face-mllm-models/models/{DIGEST}/evaluated-0.json")
PLACES = ("model", "host", "port", "grpc-port", "scratch", "answers", "evaluated", "decisions", "policy", "checkpoint")
VLLM = "{image: vllm/vllm-openai@sha256:" + "0" * 64 + ", pod: {cpu: '8', memory: 48Gi, gpus: 1, shared_memory: 8Gi}}"
SETS = ["serve.target=kserve", "cluster.serving.models=s3://face-mllm-models/models"]
SETS += ["promote.decisions=https://git.example.com/face-mllm/decisions.git"]


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def settings(profile: str = "laptop", *more: str) -> Settings:
    return load(profile, [*SETS, *more])


def rendered(chosen: Settings, stage: str = PRODUCTION, percent: int | None = 10) -> dict[str, Any]:
    predictor = rendering.predictor_of(chosen, stage, MODEL)
    about = rendering.annotations_of(MODEL, predictor)
    former = {"about": about, "predictor": predictor}
    return rendering.service(chosen, stage, about, predictor, "Knative", percent, former)


def faults(document: dict[str, Any]) -> list[str]:
    """What KServe's schema, Kubernetes' and the house rules hold against it."""
    return [*schema_faults(document), *rule_faults(document)]


def flags(container: dict[str, Any]) -> dict[str, str]:
    return dict(word.removeprefix("--").split("=", 1) for word in container["args"])


CASES = {
    "laptop": ("laptop", ()),
    "GPU": ("laptop", ("serve.device=cuda", "cluster.serving.pod.gpus=1", "cluster.serving.pod.shared_memory=1Gi")),
    "vllm": ("laptop", ("serve.engine.name=vllm", f"cluster.serving.vllm={VLLM}")),
    "paper-7b": ("paper-7b", ()),
}


@pytest.mark.parametrize("stage", [PRODUCTION, STAGING])
@pytest.mark.parametrize(("profile", "more"), CASES.values(), ids=CASES)
def test_what_is_applied_is_sound_and_the_server_takes_its_flags(profile: str, more: Any, stage: str) -> None:
    chosen = settings(profile, *more)
    document = rendered(chosen, stage)
    assert faults(document) == []
    predictor = document["spec"]["predictor"]
    for container in [*predictor["containers"][:1], *predictor.get("initContainers", [])]:
        options = server._options(container["args"])
        if options.config:
            assert server._serve_settings(options.config).max_pixels == chosen.serve.max_pixels
            assert server._serve_settings(options.config).device == chosen.serve.device
    volumes = {volume["name"] for volume in predictor["volumes"]}
    for container in [*predictor["containers"], *predictor.get("initContainers", [])]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    assert "face-mllm-workspace" not in str(document)
    assert "persistentVolumeClaim" not in str(document), "nothing of training is mounted"


def test_one_renderer_makes_the_flags_of_this_machine_and_of_the_cluster() -> None:
    chosen = settings()
    words = servers.model_server(chosen, "production-a", Path("/model"), DIGEST, "7", 1234).command[3:]
    local = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}
    cluster = flags(rendered(chosen)["spec"]["predictor"]["containers"][0])
    configs = [server._serve_settings(one["config"]) for one in (local, cluster)]
    assert configs[0].model_copy(update={"drain_s": 5.0}) == configs[1]
    shared = [{key: value for key, value in one.items() if key not in (*PLACES, "config")} for one in (local, cluster)]
    assert shared[0] == shared[1] != {}
    assert {"digest", "version", "name", "tasks", "max-new-tokens"} == set(shared[0])


def test_production_verifies_twice_and_staging_serves_its_own_pod_alone() -> None:
    predictor = rendered(settings())["spec"]["predictor"]
    (first,), (serves, *_) = predictor["initContainers"], predictor["containers"]
    verified, given = flags(first), flags(serves)
    assert verified["model"] == ADDRESS
    assert verified["copy-to"] == given["model"]
    assert given["evaluated"] == str(Path(verified["copy-to"]).parent / server.EVALUATED)
    for one in (verified, given):
        assert one["digest"] == DIGEST
        assert one["decisions"] == "https://git.example.com/face-mllm/decisions.git"
        assert one["policy"] == "/policy/policy.yaml"
    assert given["host"] == "0.0.0.0"
    secrets = [[e["name"] for e in one["env"] if "valueFrom" in e] for one in (first, serves)]
    assert "AWS_SECRET_ACCESS_KEY" in secrets[0]
    assert secrets[1] == [], "whoever faces strangers has no way to the store"
    mounted = {m["name"]: m for m in serves["volumeMounts"]}
    assert mounted["verified"]["readOnly"] is mounted["policy"]["readOnly"] is True

    staging = rendered(settings(), STAGING)
    assert "initContainers" not in staging["spec"]["predictor"]
    own = flags(staging["spec"]["predictor"]["containers"][0])
    assert (own["host"], own["model"]) == ("127.0.0.1", ADDRESS)
    assert not {"decisions", "policy"} & set(own)
    assert staging["metadata"]["labels"]["networking.knative.dev/visibility"] == "cluster-local"
    assert {one["metadata"]["namespace"] for one in (staging, rendered(settings()))} == {
        "face-mllm",
        "face-mllm-production",
    }


def test_vllm_computes_beside_our_server_which_stays_in_front() -> None:
    chosen = settings("laptop", *CASES["vllm"][1])
    predictor = rendered(chosen)["spec"]["predictor"]
    ours, vllm = predictor["containers"]
    (first,) = predictor["initContainers"]
    given = dict(word.removeprefix("--").split("=", 1) for word in vllm["args"] if "=" in word)
    assert chosen.serve.engine.vllm_url == f"http://{given['host']}:{given['port']}"
    assert given["served-model-name"] == DIGEST
    assert flags(first)["export-vllm"] == given["model"]
    assert given["dtype"] == chosen.serve.engine.vllm_dtype
    assert "--enable-scale-out" in vllm["args"]
    assert {m["name"] for m in vllm["volumeMounts"]} == {"verified", "vllm-tmp", "vllm-shm"}  # no decisions, no keys
    gpus = [container["resources"]["limits"].get("nvidia.com/gpu") for container in (ours, vllm)]
    assert gpus == [None, "1"]
    assert "ports" not in vllm


CONTAINER = "spec.predictor.containers.0"
BROKEN: dict[str, tuple[str, Any]] = {
    "misspelt": ("spec.predictor.canaryTraficPercent", 10),
    "wrong type, canary": ("spec.predictor.canaryTrafficPercent", "10%"),
    "one level too high": ("spec.canaryTrafficPercent", 10),
    "wrong type, replicas": ("spec.predictor.minReplicas", "1"),
    "misspelt in a container": (f"{CONTAINER}.volumeMount", []),
    "a quantity that is none": (f"{CONTAINER}.resources.limits.cpu", {}),
    "privileged": (f"{CONTAINER}.securityContext", {"privileged": True}),
    "writable": ("spec.predictor.initContainers.0.securityContext", {"runAsUser": 10001}),
    "no limits": (f"{CONTAINER}.resources", {"requests": {"cpu": "1", "memory": "1Gi"}}),
    "a host's folder": ("spec.predictor.volumes.0", {"name": "policy", "hostPath": {"path": "/"}}),
}


@pytest.mark.parametrize(("path", "value"), BROKEN.values(), ids=BROKEN)
def test_a_broken_copy_is_noticed(path: str, value: Any) -> None:
    document = copy.deepcopy(rendered(settings()))
    put(document, path, value)
    assert faults(document)


def production() -> list[dict[str, Any]]:
    folder = ROOT / "k8s/production"
    if shutil.which("kubectl"):
        command = ["kubectl", "kustomize", str(folder)]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    else:
        listed = yaml.safe_load((folder / "kustomization.yaml").read_text("utf-8"))["resources"]
        text = "\n---\n".join((folder / name).read_text("utf-8") for name in listed if name != "places.yaml")
    return [document for document in yaml.load_all(text, yaml.CSafeLoader) if document]


def releaser() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "k8s/components/releaser/releaser.yaml").read_text("utf-8")))


def test_productions_namespace_is_sound_and_its_account_is_there() -> None:
    made = production() + releaser()
    assert [fault for document in made for fault in [*schema_faults(document), *rule_faults(document)]] == []
    accounts = [d["metadata"]["name"] for d in production() if d["kind"] == "ServiceAccount"]
    predictor = rendered(settings())["spec"]["predictor"]
    assert accounts == [predictor["serviceAccountName"]]
    (policy,) = (d for d in production() if d["kind"] == "ConfigMap")
    volume = next(v["configMap"] for v in predictor["volumes"] if v["name"] == "policy")
    assert volume["name"] == policy["metadata"]["name"]
    assert parse_policy(yaml.safe_load(policy["data"]["policy.yaml"]), "policy.yaml").keys == {}
    networks = [d["spec"]["podSelector"].get("matchLabels", {}) for d in production() if d["kind"] == "NetworkPolicy"]
    assert all(selected.items() <= predictor["labels"].items() for selected in networks)


def test_who_releases_may_neither_read_secrets_nor_change_the_policy() -> None:
    (role,) = (d for d in production() if d["kind"] == "Role")
    assert {resource for rule in role["rules"] for resource in rule["resources"]} == {
        "inferenceservices",
        "leases",
        "events",
    }


@needs_kubectl
def test_the_job_that_releases_is_given_all_it_needs() -> None:
    ((_, pod),) = pods(document("gpu", "CronJob", "reconcile"))
    args = pod["spec"]["containers"][0]["args"]
    sets = [word.removeprefix("--set=") for word in args if word.startswith("--set=")]
    chosen = load(args[0].removeprefix("--profile="), sets)
    rendering.refuse(chosen)
    assert chosen.serve.target == "kserve"


def test_names_of_its_revisions_are_whole() -> None:
    longest = "a" * 36
    assert rendering.name_of(settings("laptop", f"promote.model_name={longest}"), PRODUCTION) == longest
    of_staging = rendering.name_of(settings("laptop", f"promote.model_name={longest}"), STAGING)
    assert len(f"latest-{of_staging}-predictor") <= 63, "a label of DNS"
    with pytest.raises(UserError, match="no name for KServe; give a-z, 0-9 and -, at most 36"):
        rendering.name_of(settings("laptop", f"promote.model_name={longest}a"), PRODUCTION)
