"""What `pipeline.py compile --profile X` asks a cluster for, executor by executor, and what it refuses to compile."""

import json
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import commands
from cluster.specification import specification, write_specification
from facemllm.errors import UserError
from facemllm.settings import load
from facemllm.settings.cluster import Pod
from facemllm.settings.kubernetes import bytes_of
from facemllm.workflow.pods import loading, on_cluster, pods, refuse_examples, weights

pytestmark = pytest.mark.usefixtures("quick_kfp")
DATA = ("ingest", "annotate", "reformat", "validate", "version")
STAGES, ASKING = ("align", "instruct", "specialize"), ("evaluate", "gate")
OTHERS = (*DATA, "register", "await_approval", "finish")
Size = tuple[str, str, int]
Documents = list[dict[str, Any]]


def each(names: tuple[str, ...], size: Size) -> dict[str, Size]:
    return dict.fromkeys(names, size)


PAPER_DATA: dict[str, Size] = {
    **{"ingest": ("16", "32Gi", 0), "annotate": ("16", "64Gi", 0), "reformat": ("4", "16Gi", 0)},
    **{"validate": ("4", "32Gi", 0), "version": ("4", "16Gi", 0), "register": ("4", "16Gi", 0)},
    **{"await_approval": ("500m", "2Gi", 0), "finish": ("500m", "4Gi", 0)},
}
KSERVE = each(("deploy",), ("2", "4Gi", 0))  # the model is in the server's pod, not in the step's
SMALL_OTHERS = each(OTHERS, ("2", "4Gi", 0)) | {"await_approval": ("500m", "2Gi", 0), "finish": ("500m", "4Gi", 0)}
SIZES: dict[str, dict[str, Size]] = {
    "laptop": {**SMALL_OTHERS, **each(STAGES, ("2", "8Gi", 0)), **each((*ASKING, "deploy"), ("2", "4Gi", 0))},
    "small": {**SMALL_OTHERS, **KSERVE, **each((*STAGES, *ASKING), ("4", "16Gi", 1))},
    "paper-7b": {**PAPER_DATA, **KSERVE, **each(STAGES, ("64", "384Gi", 8)), **each(ASKING, ("8", "64Gi", 1))},
    "paper-13b": {**PAPER_DATA, **KSERVE, **each(STAGES, ("64", "640Gi", 8)), **each(ASKING, ("8", "96Gi", 1))},
}
GPU_TAINT = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
BUCKET = {name: name for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION")}
TOKENS = {"username": "MLFLOW_TRACKING_USERNAME", "password": "MLFLOW_TRACKING_PASSWORD"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Documents]:
    """`compiled(profile, *overrides)`: what the command writes, each once."""
    known: dict[tuple[str, ...], Documents] = {}

    def get(profile: str, *overrides: str, release: bool = False) -> Documents:
        key = (profile, *overrides, str(release))
        if key not in known:
            file = tmp_path_factory.mktemp("spec") / "spec.yaml"
            write_specification(profile, overrides, file, release)
            known[key] = list(yaml.safe_load_all(file.read_text("utf-8")))
        return deepcopy(known[key])

    return get


def by_step(executors: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("exec-").replace("-", "_"): one for name, one in executors.items()}


def task_of(spec: dict[str, Any], step: str) -> dict[str, Any]:
    dags = [spec["root"], *spec["components"].values()]
    found = [dag["dag"]["tasks"] for dag in dags if "dag" in dag]
    return next(tasks[step.replace("_", "-")] for tasks in found if step.replace("_", "-") in tasks)


def variables(pod: dict[str, Any], kind: str) -> dict[str, dict[str, str]]:
    return {
        one[f"{kind}Name"]: {pair[f"{kind}Key"]: pair["envVar"] for pair in one["keyToEnv"]}
        for one in pod.get(f"{kind}AsEnv", ())
    }


def check(documents: Documents, profile: str, sizes: dict[str, Size]) -> None:
    """Every executor is as it must be for this profile."""
    spec, platform = documents
    containers = by_step(spec["deploymentSpec"]["executors"])
    placed = by_step(platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"])
    assert set(containers) == set(placed) == set(sizes)
    settings = load(profile)
    for step, (cpu, memory, gpus) in sizes.items():
        container, pod, task = containers[step]["container"], placed[step], task_of(spec, step)
        limits = container["resources"]
        assert container["image"] == settings.cluster.image, step
        for side in ("Request", "Limit"):
            assert (limits[f"resourceCpu{side}"], limits[f"resourceMemory{side}"]) == (cpu, memory), step
        accelerator = limits.get("accelerator", {})
        asked = (accelerator.get("resourceType"), accelerator.get("resourceCount"))
        assert asked == (("nvidia.com/gpu", str(gpus)) if gpus else (None, None)), step
        assert pod.get("tolerations", []) == ([GPU_TAINT] if gpus else []), step
        folders = {one["mountPath"]: one for one in pod.get("emptyDirMounts", ())}
        assert ("/dev/shm" in folders) == ("/tmp" in folders and step != "register") == bool(gpus), step
        assert not gpus or folders["/dev/shm"]["medium"] == "Memory", step
        (volume,) = pod["pvcMount"]
        assert (volume["constant"], volume["mountPath"]) == ("face-mllm-workspace", "/workspace"), step
        assert task.get("cachingOptions", {}) == {}, step
        assert task["retryPolicy"]["maxRetryCount"] == 2, step
        assert task["retryPolicy"]["backoffDuration"] == "60s", step
        assert float(task["retryPolicy"]["backoffFactor"]) == 2, step
        assert 0 < int(pod["activeDeadlineSeconds"]) <= 5 * 86400, step
        every = 3 * (int(pod["activeDeadlineSeconds"]) + 5 * 86400)  # each of its time, after days in a queue
        assert int(task["retryPolicy"]["backoffMaxDuration"].removesuffix("s")) > every, "Argo ends all attempts then"
        assert int(pod["activeDeadlineSeconds"]) >= (86400 if gpus == 8 else 3600), step
        secrets = variables(pod, "secret")
        assert secrets.pop("face-mllm-mlflow") == TOKENS, step
        assert secrets.pop("face-mllm-models" if step == "deploy" else "face-mllm-s3") == BUCKET, step
        if step == "annotate":
            assert secrets.pop("face-mllm-annotator") == {"key": "FACEMLLM_API_KEY"}
        if step in loading(on_cluster(profile, [])[0]):
            assert secrets.pop("face-mllm-hub") == {"token": "HF_TOKEN"}, step
        assert secrets == {}, step
        assert all(one["optional"] for one in pod["secretAsEnv"]), step
        (fetched,) = (one["value"] for one in container["env"] if one["name"] == "HF_HOME")
        assert fetched.startswith("/workspace/"), step
        homes = [one["value"] for one in container["env"] if one["name"] == "HOME"]
        assert homes == (["/workspace/login"] if on_cluster(profile, [])[0].promote.decisions else []), (
            "the login for decisions"
        )
        (run,) = pod["fieldPathAsEnv"]
        assert run == {"name": "FACEMLLM_RUN", "fieldPath": "metadata.labels['pipeline/runid']"}, step
        assert pod["podMetadata"]["annotations"] == {"sidecar.istio.io/inject": "false"}, step
        given = task["inputs"]["parameters"]
        assert given["profile"]["runtimeValue"]["constant"] == profile, step
        overrides = given["overrides"]["runtimeValue"]["constant"]
        inside = load(profile, overrides)
        assert f'cluster.image="{container["image"]}"' in overrides, "the profile in the image cannot name its digest"
        assert inside == on_cluster(profile, [])[0], step
        assert {str(inside.home), str(inside.runs)} == {"/workspace/.facemllm", "/workspace/runs"}
        assert all((one.root or "/workspace/").startswith("/workspace/") for one in inside.ingest.sources)
        assert inside.promote.wait_minutes == 0
    assert {step for step, (_, _, gpus) in sizes.items() if gpus} == (
        {*STAGES, *ASKING} if settings.train.use_gpu else set()
    )


@pytest.mark.parametrize("profile", SIZES)
def test_each_executor_of_a_profile_is_as_it_must_be(compiled: Callable[..., Documents], profile: str) -> None:
    check(compiled(profile), profile, SIZES[profile])


def test_where_a_rayjob_trains_the_task_of_a_stage_is_a_launcher(compiled: Callable[..., Documents]) -> None:
    documents = compiled("paper-7b", "train.launcher=rayjob", "train.workers=16")
    for stage in STAGES:
        container, pod = executor(documents, stage)
        limits = container["resources"]
        for side in ("Request", "Limit"):
            assert (limits[f"resourceCpu{side}"], limits[f"resourceMemory{side}"]) == ("200m", "512Mi")
        assert "accelerator" not in limits
        assert "tolerations" not in pod
        assert pod["activeDeadlineSeconds"] == str(7 * 86400), "longer than any of its jobs"
        assert task_of(documents[0], stage)["retryPolicy"]["maxRetryCount"] == 3
        assert "face-mllm-mlflow" in variables(pod, "secret")
    container, _ = executor(documents, "evaluate")
    assert container["resources"]["accelerator"]["resourceCount"] == "1"


def executor(documents: Documents, step: str) -> tuple[dict[str, Any], dict[str, Any]]:
    pod = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"][f"exec-{step}"]
    return documents[0]["deploymentSpec"]["executors"][f"exec-{step}"]["container"], pod


DAMAGE: dict[str, Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], Any]] = {
    "less memory": lambda container, pod, task: container["resources"].update(resourceMemoryLimit="4Gi"),
    "a request of less": lambda container, pod, task: container["resources"].update(resourceCpuRequest="1"),
    "no GPU": lambda container, pod, task: container["resources"].pop("accelerator"),
    "another image": lambda container, pod, task: container.update(image="face-mllm:0.0.9"),
    "no toleration": lambda container, pod, task: pod.pop("tolerations"),
    "no volume": lambda container, pod, task: pod.pop("pvcMount"),
    "another mount": lambda container, pod, task: pod["pvcMount"][0].update(mountPath="/data"),
    "no shared memory": lambda container, pod, task: pod.pop("emptyDirMounts"),
    "cached": lambda container, pod, task: task.update(cachingOptions={"enableCache": True}),
    "never again": lambda container, pod, task: task.pop("retryPolicy"),
    "never again after an hour": lambda container, pod, task: task["retryPolicy"].update(backoffMaxDuration="3600s"),
    "for ever": lambda container, pod, task: pod.pop("activeDeadlineSeconds"),
    "no secret": lambda container, pod, task: pod["secretAsEnv"].pop(),
    "a secret more": lambda container, pod, task: pod["secretAsEnv"].append(
        {"secretName": "face-mllm-annotator", "keyToEnv": [{"secretKey": "key", "envVar": "FACEMLLM_API_KEY"}]}
    ),
    "a secret that must be there": lambda container, pod, task: pod["secretAsEnv"][0].pop("optional"),
    "no environment": lambda container, pod, task: container.pop("env"),
    "no run": lambda container, pod, task: pod.pop("fieldPathAsEnv"),
    "a sidecar": lambda container, pod, task: pod["podMetadata"].pop("annotations"),
    "other settings": lambda container, pod, task: task["inputs"]["parameters"]["overrides"]["runtimeValue"].update(
        constant=["storage.home=/workspace/.facemllm"]
    ),
}


@pytest.mark.parametrize("step", ["instruct", "gate"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_broken_copy_is_noticed(compiled: Callable[..., Documents], damage: Any, step: str) -> None:
    documents = compiled("paper-7b")
    damage(*executor(documents, step), task_of(documents[0], step))
    with pytest.raises((AssertionError, KeyError, ValueError)):
        check(documents, "paper-7b", SIZES["paper-7b"])


def test_release_is_a_pipeline_of_its_own_for_one_version(compiled: Callable[..., Documents]) -> None:
    spec, _ = documents = compiled("paper-7b", release=True)
    container, pod = executor(documents, "release")
    assert list(spec["deploymentSpec"]["executors"]) == ["exec-release"]
    assert "retryPolicy" not in task_of(spec, "release"), "a trial on production that failed is not made again"
    assert list(spec["root"]["inputDefinitions"]["parameters"]) == ["version"]
    assert variables(pod, "secret") == {"face-mllm-mlflow": TOKENS, "face-mllm-models": BUCKET}
    assert "accelerator" not in container["resources"], "KServe's pods load the model"
    here = compiled("paper-7b", "serve.target=local", release=True)
    container, pod = executor(here, "release")
    assert container["resources"]["accelerator"]["resourceCount"] == "1"
    assert container["resources"]["resourceMemoryLimit"] == "64Gi"
    assert pod["tolerations"] == [GPU_TAINT]


def test_a_pod_takes_what_its_profile_says_down_to_the_last_key(compiled: Callable[..., Documents]) -> None:
    said = {
        "node_selector": {"cloud.google.com/gke-accelerator": "nvidia-h100"},
        "config_maps": {"proxy": {"env": {"url": "HTTPS_PROXY"}}},
        "secrets": {"own": {"env": {"key": "OWN_KEY"}}},
        "env": {"NCCL_DEBUG": "WARN"},
        "retries": 5,
        "backoff": {"first": "5m", "factor": 3},
        "timeout": "90m",
        "accelerator": "amd.com/gpu",
        "tolerations": [{"key": "pool", "value": "gpu", "effect": "NoExecute"}],
    }
    image = f"registry.example.com/face-mllm@sha256:{'ab' * 32}"
    overrides = (
        f"cluster.steps.align={json.dumps(said)}",
        f"cluster.image={image}",
        "cluster.image_pull_secrets=[registry]",
        "cluster.labels.team=faces",
    )
    documents = compiled("small", *overrides)
    container, pod = executor(documents, "align")
    task = task_of(documents[0], "align")
    assert container["image"] == image
    assert container["resources"]["accelerator"]["resourceType"] == "amd.com/gpu"
    assert {one["name"]: one["value"] for one in container["env"]}["NCCL_DEBUG"] == "WARN"
    assert [one["name"] for one in container["env"]] == ["HF_HOME", "HOME", "NCCL_DEBUG"], "joined with what lies below"
    assert pod["nodeSelector"]["labels"] == said["node_selector"]
    assert pod["tolerations"] == [{"key": "pool", "operator": "Equal", "value": "gpu", "effect": "NoExecute"}]
    assert variables(pod, "configMap") == {"proxy": {"url": "HTTPS_PROXY"}}
    assert variables(pod, "secret")["own"] == {"key": "OWN_KEY"}
    assert [one.get("optional", False) for one in pod["secretAsEnv"]] == [True, True, True, False]
    assert pod["imagePullSecret"][0]["secretName"] == "registry"
    assert pod["podMetadata"]["labels"]["team"] == "faces"
    assert (task["retryPolicy"]["maxRetryCount"], task["retryPolicy"]["backoffDuration"]) == (5, "300s")
    assert pod["activeDeadlineSeconds"] == "5400"
    _, other = executor(documents, "instruct")
    assert "nodeSelector" not in other


def test_a_variable_is_given_once_by_whoever_names_it_last() -> None:
    pair = {"env": {"id": "AWS_ACCESS_KEY_ID", "key": "AWS_SECRET_ACCESS_KEY"}}
    below = Pod.model_validate(
        {"env": {"HF_TOKEN": "x", "A": "1"}, "secrets": {"s3": pair, "hub": {"env": {"t": "B"}}}}
    )
    own = {"secrets": {"own": {"env": {"id": "AWS_ACCESS_KEY_ID"}}}, "config_maps": {"c": {"env": {"t": "HF_TOKEN"}}}}
    pod = Pod.model_validate({**own, "env": {"B": "2"}}).over(below)
    assert pod.env == {"A": "1", "B": "2"}
    given = {name: list(one.env.values()) for name, one in (pod.secrets or {}).items()}
    assert given == {"s3": ["AWS_SECRET_ACCESS_KEY"], "own": ["AWS_ACCESS_KEY_ID"]}
    assert Pod.model_validate(own).over(Pod()) == Pod.model_validate(own)


REFUSED: list[tuple[str, list[str], str]] = [
    ("paper-7b", ["cluster.steps.evaluate={memory: 4Gi, shared_memory: 1Gi}"], "step evaluate: cluster.steps.evaluate"),
    (
        "paper-7b",
        ["serve.target=local", "cluster.steps.models.memory=25Gi"],
        "step deploy: cluster.steps.deploy.memory: 25Gi less 8Gi",
    ),
    ("paper-7b", ["cluster.serving.models=null"], "step release: cluster.serving.models: null; give s3://"),
    ("paper-7b", ["cluster.serving.pod.memory=16Gi"], "step release: cluster.serving.pod.memory: 16Gi"),
    ("paper-7b", ["cluster.steps.train.memory=128Gi"], "step align: cluster.steps.train.memory: 128Gi less 64Gi"),
    ("paper-7b", ["cluster.steps.train.gpus=0"], "step align: cluster.steps.train.gpus: 0, and train.use_gpu is true"),
    ("paper-7b", ["cluster.steps.gate.gpus=0"], "step gate: cluster.steps.gate.gpus: 0, and train.use_gpu is true"),
    ("paper-7b", ["train.workers=16", "cluster.steps.train.memory=1000Gi"], "8, and train.workers is 16"),
    ("laptop", ["train.use_gpu=true"], "step align: cluster.steps.train.gpus: 0, and train.use_gpu is true"),
    ("small", ["storage.home=.facemllm-small"], "storage.home: .facemllm-small is relative"),
    ("small", ["storage.home=/data/store"], "storage.home: /data/store lies outside the volume, .* /workspace"),
    ("small", ["storage.runs=/workspace/../runs"], "storage.runs: /workspace/../runs lies outside the volume"),
    ("paper-7b", ["ingest.sources=[{name: laion-face, root: data/x}]"], "ingest.sources.0.root: data/x is relative"),
    (
        "paper-7b",
        ["ingest.sources=[{name: laion-face, root: /data}]"],
        "cluster.overrides.ingest.sources",
    ),
    ("small", ["version.remote=remote"], "version.remote: remote is relative"),
    ("small", ["promote.wait_minutes=30"], "step await_approval: promote.wait_minutes: 30: no pod waits for a person"),
    (
        "paper-7b",
        ["cluster.serving.models=s3:/typo/models"],
        "step release: cluster.serving.models: s3:/typo/models is",
    ),
    ("paper-7b", ["cluster.serving.models=ftp://x"], "cluster.serving.models: ftp://x is neither a folder nor s3://"),
    ("paper-7b", ["cluster.serving.models=s3://"], "cluster.serving.models: s3:// is neither"),
    ("paper-7b", ["cluster.serving.models=models"], "cluster.serving.models: models is neither .* an absolute folder"),
    ("small", ["tracking.uri=sqlite:///mlflow.db"], "tracking.uri: 'sqlite:///mlflow.db' is no address of a server"),
    ("small", ["tracking.uri=x; rm"], "tracking.uri: 'x; rm' is no address of a server; give the address of MLflow"),
    ("small", ["tracking.uri=http://[::1"], "tracking.uri: .* is no address of a server"),
    ("small", ["tracking.uri=http://mlflow:50000000"], "tracking.uri: .* is no address of a server"),
    ("small", ["cluster.serving.models=/verified"], "cluster.serving.models: /verified would hide /verified"),
    ("small", ["cluster.serving.models=/usr/"], "cluster.serving.models: /usr would hide /usr"),
    ("small", ["version.remote=gs://x"], "version.remote: gs://x is no place that the image can reach; give s3://"),
    ("small", ["tracking.uri=null"], "tracking.uri: null is a server of one pod's own"),
    ("small", ["version.repository=ssh://git@git.internal/data.git"], "version.repository: ssh:.* is relative"),
    (
        "paper-7b",
        ["ingest.sources=[{name: laion-face, root: 's3://faces/x'}]"],
        "ingest.sources.0.root: s3:.* is relative",
    ),
    ("small", ["cluster.parameters=null"], "cluster.parameters: null, so nobody knows the memory"),
    ("small", ["cluster.image=face-mllm:latest"], "cluster.image: give a tag other than latest, or a digest"),
    ("small", ["cluster.image=face-mllm"], "cluster.image: give a tag other than latest, or a digest"),
    ("small", ["cluster.image=face-mllm@sha256:abc"], "cluster.image: give a tag other than latest, or a digest"),
    ("small", ["cluster.steps.algin.gpus=1"], "cluster.steps.algin: there is no such step; did you mean 'align'"),
    ("small", ["cluster.steps.align.memory=16 GB"], "cluster.steps.align.memory"),
    ("small", ["cluster.steps.align.timeout=soon"], "cluster.steps.align.timeout"),
    ("small", ["cluster.steps.align.backoff={first: 1m, factor: 1.5}"], "cluster.steps.align.backoff.factor"),
    ("small", ["cluster.steps.align.gpu=1"], "cluster.steps.align.gpu: unknown key; did you mean 'gpus'"),
    ("small", ["cluster.steps.defaults.cpu=null"], "steps.defaults lacks cpu"),
    ("small", ["cluster.steps.align.secrets={Own: {env: {a: B}}}"], "cluster.steps.align.secrets"),
]
LONG = "a" * 70
NOT_KUBERNETES: list[tuple[str, str]] = [
    (f"cluster.labels={{team: {LONG}}}", "cluster.labels.team"),
    ('cluster.labels={"a b": "c d"}', "cluster.labels.a b"),
    ("cluster.labels={pipeline/runid: x}", "cluster.labels.pipeline/runid: pipeline/runid is Kubeflow's own"),
    ('cluster.annotations={"a b": x}', "cluster.annotations.a b"),
    ('cluster.steps.align.node_selector={pool: "a b"}', "cluster.steps.align.node_selector.pool"),
    ("cluster.steps.align.tolerations=[{value: gpu}]", "tolerations.0: Equal needs a key"),
    ("cluster.steps.align.tolerations=[{key: a, operator: Exists, value: b}]", "tolerations.0: Exists takes no value"),
    ("cluster.steps.align.memory=0", "cluster.steps.align.memory: 0 is 0 bytes"),
    ("cluster.steps.align.memory=4", "cluster.steps.align.memory: 4 is 4 bytes; give a unit"),
    ("cluster.steps.align.memory=16000000K", "cluster.steps.align.memory"),
    ("cluster.steps.align.cpu=0", "cluster.steps.align.cpu: 0 is no share of a core"),
    ("cluster.steps.align.timeout=999999999999999d", "cluster.steps.align.timeout"),
    ("cluster.steps.align.timeout=30000d", "cluster.steps.align.timeout: 30000d is more seconds than"),
    ('cluster.steps.align.secrets={own: {env: {"a b": B}}}', "cluster.steps.align.secrets.own.env.a b"),
    *(
        (f"cluster.mount={place}", f"cluster.mount: {place} would hide")
        for place in ("/app", "/tmp", "/dev/shm", "/dev", "/bin", "/run", "/kfp-launcher")
    ),
    ("cluster.mount=/work:space", "cluster.mount"),
    ("cluster.mount=/a/../b", "cluster.mount: /a/../b is no plain path"),
    *((f"cluster.image={name}", "cluster.image: give a tag") for name in ("http://x:5000", "a//b:1", "reg/Face:1")),
    ("cluster.workspace_claim=a..b", "cluster.workspace_claim"),
    ("cluster.serving.staging_namespace=a.b", "cluster.serving.staging_namespace"),
    (f"cluster.serving.production_namespace={LONG}", "cluster.serving.production_namespace"),
    (f"cluster.queue={LONG}", "cluster.queue"),
    ("cluster.steps.align.retries=10000000000", "cluster.steps.align.retries"),
    ("cluster.steps.align.gpus=10000000000000000000000", "cluster.steps.align.gpus"),
    ("cluster.serving.max_replicas=10000000000", "cluster.serving.max_replicas"),
    ("cluster.overrides={tracking.experiment: 2026-11-29}", "cluster.overrides.tracking.experiment"),  # a date in YAML
    ("cluster.parameters=.inf", "cluster.parameters"),
    ("cluster.parameters=.nan", "cluster.parameters"),
    ("cluster.steps.align.env={FACEMLLM_RUN: mine}", "FACEMLLM_RUN says which run a pod is of"),
    ("cluster.serving.gitops={repository: x, branch: main, file: a/../../b.yaml}", "cluster.serving.gitops.file"),
]


@pytest.mark.parametrize(("given", "says"), NOT_KUBERNETES, ids=[given[:60] for given, _ in NOT_KUBERNETES])
def test_what_kubernetes_does_not_take_is_refused_with_its_key(given: str, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)) as error:
        on_cluster("laptop", [given])
    assert "\n" not in str(error.value)


def test_what_kubernetes_takes_is_taken() -> None:
    digest = f"@sha256:{'ab' * 32}"
    for image in ("localhost:5000/face:1", f"ghcr.io/x/y_z{digest}", f"reg.example.com:443/a/face-mllm:0.1.0{digest}"):
        assert on_cluster("laptop", [f"cluster.image={image}"])[0].cluster.image == image
    more = ["cluster.mount=/tmp/w", "cluster.labels={example.com/Team_1: A.b, empty: ''}", "cluster.queue=gpu.team-a"]
    more += ["cluster.steps.align={cpu: .5, memory: 16Gi, tolerations: [{operator: Exists}], timeout: 24000d}"]
    places = {"storage.home": "/tmp/w/home", "storage.runs": "/tmp/w/runs"}
    on_cluster("laptop", [*more, *(f"{key}={place}" for key, place in places.items())])


ENDPOINT = "annotate={annotator: endpoint, vision_language: {model: m}, endpoint: {base_url: 'http://localhost:8000'}}"
OF_EACH_POD: dict[str, tuple[str, str]] = {
    **{
        f"tracking.uri=http://{host}:5000": ("laptop", "tracking.uri")
        for host in ("127.0.0.1", "localhost", "[::1]", "0.0.0.0")
    },
    **{
        f"promote.decisions={place}": ("small", "promote.decisions")
        for place in (
            "ssh://git@localhost/d.git",
            "git@127.1.2.3:d.git",
            "file:///workspace/d.git",
            "https://git.localhost/d",
        )
    },
    "promote.notify.webhook=http://localhost:9000/x": ("laptop", "promote.notify.webhook"),
    "cluster.serving.prometheus=http://localhost:9090": ("small", "cluster.serving.prometheus"),
    ENDPOINT: ("laptop", "annotate.endpoint.base_url"),
}


@pytest.mark.parametrize(("given", "of"), OF_EACH_POD.items(), ids=OF_EACH_POD)
def test_an_address_that_is_another_place_in_each_pod_is_refused(given: str, of: tuple[str, str]) -> None:
    profile, key = of
    with pytest.raises(UserError, match=rf"{key}: \S+ is another place in each pod; .* set cluster.one_host=true"):
        on_cluster(profile, [given])
    on_cluster(profile, [given, "cluster.one_host=true"])


def test_addresses_that_pods_share_are_taken() -> None:
    places = ("ssh://git@git.internal/d.git", "git@git.internal:d.git", "https://localhost.example.org/d.git")
    for place in places:
        on_cluster("small", [f"promote.decisions={place}"])
    for server in ("http://10.0.0.7:5000", "http://mlflow.face-mllm:5000", "https://mlflow.example.org/m"):
        on_cluster("small", [f"tracking.uri={server}"])


@pytest.mark.parametrize(("profile", "overrides", "says"), REFUSED, ids=[" ".join(o) for _, o, _ in REFUSED])
def test_what_cannot_work_is_refused_in_one_line_and_nothing_is_written(
    tmp_path: Path, profile: str, overrides: list[str], says: str
) -> None:
    with pytest.raises(UserError, match=says) as error:
        write_specification(profile, overrides, tmp_path / "spec.yaml")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_refusal_names_what_to_give(tmp_path: Path) -> None:
    overrides = ["cluster.steps.models={memory: 16Gi, shared_memory: 2Gi}"]
    with pytest.raises(UserError) as error:
        write_specification("paper-7b", overrides, tmp_path / "spec.yaml")
    takes, give = "loading the model takes 16Gi", "give 18Gi or more"
    assert takes in str(error.value)
    assert give in str(error.value)
    assert "profile paper-7b, step evaluate: cluster.steps.models.memory" in str(error.value)


def test_whatever_loads_the_model_has_room_for_it() -> None:
    for profile in SIZES:
        settings, _ = on_cluster(profile, [])
        serves = {"deploy", "release"} if settings.serve.target == "local" else set()
        assert set(loading(settings)) == {*STAGES, *ASKING, *serves}
        for step, pod in pods(settings).items():
            assert bytes_of(str(pod.memory)) > weights(settings, step), (profile, step)
    settings, _ = on_cluster("paper-7b", ["serve.target=local"])
    assert weights(settings, "align") == 8 * weights(settings, "deploy") == 16 * weights(settings, "evaluate")
    assert weights(settings, "reformat") == weights(settings, "register") == 0


def test_an_annotator_of_ones_own_gets_a_gpu_too() -> None:
    local = ["annotate.annotator=local", "annotate.vision_language.model=some/model"]
    settings, _ = on_cluster("paper-7b", [*local, "cluster.steps.annotate.gpus=2"])
    pod = pods(settings)["annotate"]
    assert (pod.gpus, pod.memory, [one.key for one in pod.tolerations or ()]) == (2, "64Gi", ["nvidia.com/gpu"])
    assert set(pod.secrets or ()) >= {"face-mllm-hub", "face-mllm-annotator"}
    with pytest.raises(UserError, match=r"step annotate: cluster\.steps\.annotate\.gpus: 0"):
        on_cluster("paper-7b", [*local, "cluster.steps.annotate.gpus=0"])


def test_the_command_line_writes_it(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    done = CliRunner().invoke(commands.app, ["compile", str(file), "--profile", "small"])
    assert (done.exit_code, done.output.strip()) == (0, str(file))
    assert len(list(yaml.safe_load_all(file.read_text("utf-8")))) == 2


def test_what_only_stands_for_an_address_is_compiled_and_does_not_run() -> None:
    real = ["promote.decisions=ssh://git@git.internal/d.git"]
    with pytest.raises(UserError, match=r"promote\.decisions: ssh:\S+ is an example; name yours") as error:
        refuse_examples(on_cluster("paper-7b", [])[0])
    assert "\n" not in str(error.value)
    for over in ("tracking.uri=http://mlflow.example.org:5000", "cluster.image=registry.example.com/face-mllm:1"):
        with pytest.raises(UserError, match="is an example"):
            refuse_examples(on_cluster("paper-7b", [*real, over])[0])
    refuse_examples(on_cluster("paper-7b", [*real, "tracking.uri=http://mlflow.myexample.com:5000"])[0])
    with pytest.raises(UserError, match="is an example"), specification("paper-7b", []):
        pass


@pytest.mark.parametrize("launcher", ["here", "rayjob"])
def test_every_profile_can_train_on_a_cluster(launcher: str) -> None:
    for file in sorted(Path("profiles").glob("*.yaml")):
        on_cluster(file.stem, [f"train.launcher={launcher}"])
