"""The manifests in `k8s/`, held against the schemas of Kubernetes, KubeRay and KServe, and against house rules.

Core kinds go through kubernetes-validate (strict); custom resources through their CRDs as strict JSON Schemas, and the
pods inside them through the core Pod schema. Without kubectl `k8s/base` is checked as it is written.
"""

import contextlib
import copy
import functools
import json
import re
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator
from kfp.client import KF_PIPELINES_SA_TOKEN_PATH

from facemllm import settings
from facemllm.workflow.pods import on_cluster
from facemllm.workflow.rayjob import Job, render

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = "1.32"
OVERLAYS = ("dev", "gpu")
CUSTOM = {
    ("ray.io/v1", "RayJob"): "kuberay/rayjobs.json",
    ("serving.kserve.io/v1beta1", "InferenceService"): "kserve/inferenceservices.json",
}
PLATFORM = {
    ("monitoring.coreos.com/v1", "PodMonitor"): "monitoring/podmonitors.json",
    ("monitoring.coreos.com/v1", "PrometheusRule"): "monitoring/prometheusrules.json",
    ("security.istio.io/v1", "AuthorizationPolicy"): "istio/authorizationpolicies.json",
    ("security.istio.io/v1", "PeerAuthentication"): "istio/peerauthentications.json",
}
OTHERS = ("postgres:", "rclone/rclone:")
"""Images that are not ours."""
STARTS = ("on-data", "pipeline-starter")

Document = dict[str, Any]
ABSENT = "kubectl is absent: overlays cannot be rendered; k8s/base is checked as it is"
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason=ABSENT)
everywhere = pytest.mark.parametrize("source", ["base", *(pytest.param(o, marks=needs_kubectl) for o in OVERLAYS)])
rendered = pytest.mark.parametrize("overlay", [pytest.param(o, marks=needs_kubectl) for o in OVERLAYS])


@functools.cache
def rendered_job(profile: str) -> Document:
    """The RayJob of a stage, as the launcher makes it of a profile's settings."""
    with contextlib.chdir(ROOT):
        cuda = ["cluster.image=registry.example.com/face-mllm:0.1.0-cuda"] if profile == "paper-7b" else []
        chosen, _ = on_cluster(profile, ["train.launcher=rayjob", *cuda])
        job = Job("align", "ab" * 32, {"conversations": "cd" * 32}, "ef" * 32, "a-run", "a-parent")
        made = render(chosen, job)
    return {**made, "metadata": {**made["metadata"], "namespace": "face-mllm"}}


def documents(source: str) -> list[Document]:
    """What `source` consists of: an overlay as kubectl renders it, or the base as it is written."""
    return [*_written(source), rendered_job("paper-7b" if source.startswith("gpu") else "laptop")]


@functools.cache
def _written(source: str) -> list[Document]:
    if source == "base":
        listed = yaml.safe_load((ROOT / "k8s/base/kustomization.yaml").read_text("utf-8"))["resources"]
        text = "\n---\n".join((ROOT / "k8s/base" / name).read_text("utf-8") for name in listed)
    else:
        command = ["kubectl", "kustomize", str(ROOT / "k8s/overlays" / source)]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return [document for document in yaml.load_all(text, yaml.CSafeLoader) if document]


def one(source: str, kind: str, name: str | None = None) -> Document:
    found = [d for d in documents(source) if d["kind"] == kind and name in (None, d["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} documents of kind {kind} in {source}"
    return found[0]


def strict(node: Document) -> Document:
    """A structural schema of a CRD as a JSON Schema that refuses what the API server would silently drop."""
    kept = {"type", "enum", "required", "pattern"}
    kept |= {end + of for end in ("min", "max") for of in ("imum", "Length", "Items")}
    out: Document = {key: value for key, value in node.items() if key in kept}
    if node.get("x-kubernetes-int-or-string"):
        out["type"] = ["integer", "string"]
    if node.get("type") == "object":
        inner = {name: strict(child) for name, child in node.get("properties", {}).items()}
        if node.get("x-kubernetes-embedded-resource"):
            words = {key: {"type": "string"} for key in ("apiVersion", "kind")}
            inner = {**words, "metadata": {"type": "object"}, **inner}
        extra = node.get("additionalProperties", bool(node.get("x-kubernetes-preserve-unknown-fields")))
        out |= {"properties": inner, "additionalProperties": strict(extra) if isinstance(extra, dict) else extra}
        # A CRD leaves metadata to the API server; inside a template it is written as a bare object.
        if (open_ := inner.get("metadata")) and not open_.get("properties"):
            inner["metadata"] = {"type": "object"}
    if "items" in node:
        out["items"] = strict(node["items"])
    if node.get("format") in ("int32", "int64") and "type" in out:
        bits = int(node["format"][3:]) - 1
        out = {"minimum": -(2**bits), "maximum": 2**bits - 1} | out
    if node.get("nullable"):
        out["type"] = [out["type"], "null"]
        if "enum" in out:
            out["enum"] = [*out["enum"], None]
    return out


@functools.cache
def custom_schema(api_version: str, kind: str) -> Draft202012Validator:
    """The validator of a custom kind. Raises KeyError when there is no such kind."""
    member = (CUSTOM | PLATFORM)[api_version, kind]
    packed = "crds-min" if (api_version, kind) in CUSTOM else "crds-platform"
    with tarfile.open(ROOT / f"tests/unit/crds/{packed}.tar.xz") as archive:
        stream = archive.extractfile(member)
        assert stream is not None
        definition = json.load(stream)
    group, version = api_version.split("/")
    assert (definition["spec"]["group"], definition["spec"]["names"]["kind"]) == (group, kind)
    schema = next(v["schema"] for v in definition["spec"]["versions"] if v["name"] == version and v["served"])
    top = strict(schema["openAPIV3Schema"])
    top["properties"] |= {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}}
    top["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return Draft202012Validator(top)


def core_faults(document: Document) -> list[str]:
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message[:200]}"]
    except kubernetes_validate.SchemaNotFoundError as error:
        return [error.message]
    return []


def pods(document: Document) -> Iterator[tuple[str, Document]]:
    """The pods a document makes, as core Pods: (where in the document, Pod)."""
    spec = document.get("spec") or {}
    templates: dict[str, Document] = {}
    match document["kind"]:
        case "Deployment" | "Job":
            templates["template"] = spec["template"]
        case "CronJob":
            templates["template"] = spec["jobTemplate"]["spec"]["template"]
        case "RayJob":
            cluster = spec["rayClusterSpec"]
            templates["submitter"] = spec["submitterPodTemplate"]
            templates["head"] = cluster["headGroupSpec"]["template"]
            templates |= {f"worker {g['groupName']}": g["template"] for g in cluster["workerGroupSpecs"]}
        case "InferenceService":
            own = {"containers", "initContainers", "volumes", "tolerations", "nodeSelector"} & spec["predictor"].keys()
            templates["predictor"] = {"spec": {key: spec["predictor"][key] for key in own}}
    for where, template in templates.items():
        metadata = {"name": "pod"} | template.get("metadata", {})
        yield where, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template.get("spec")}


def schema_faults(document: Document) -> list[str]:
    """What a schema holds against a document; empty when it is sound."""
    if "/" not in document["apiVersion"] or document["apiVersion"].split("/")[0] in _CORE_GROUPS:
        return core_faults(document)
    try:
        validator = custom_schema(document["apiVersion"], document["kind"])
    except KeyError:
        return [f"no schema for {document['apiVersion']} {document['kind']}"]
    faults = [f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(document)]
    return faults or [f"{where}: {fault}" for where, pod in pods(document) for fault in core_faults(pod)]


_CORE_GROUPS = {"apps", "batch", "rbac.authorization.k8s.io", "networking.k8s.io", "policy", "scheduling.k8s.io"}


def rule_faults(document: Document) -> list[str]:
    """What the house rules hold against the pods of a document: limits, users, privileges, images, volumes."""
    if document["kind"] == "Secret":
        return ["a Secret is never committed"]
    faults = []
    for where, pod in pods(document):
        spec = pod["spec"]
        faults += [f"{where}: {key}" for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
        faults += [f"{where}: hostPath" for volume in spec.get("volumes", []) if "hostPath" in volume]
        for container in spec["containers"] + spec.get("initContainers", []):
            security = spec.get("securityContext", {}) | container.get("securityContext", {})
            resources = container.get("resources", {})
            bounded = all({"cpu", "memory"} <= set(resources.get(side, {})) for side in ("requests", "limits"))
            tag = container["image"].rpartition("/")[2].partition(":")[2]
            checks = {
                "no requests and limits": bounded,
                "may run as root": security.get("runAsNonRoot") is True and security.get("runAsUser", 0) != 0,
                "privileged": not security.get("privileged"),
                "may gain privileges": security.get("allowPrivilegeEscalation") is False,
                "keeps capabilities": security.get("capabilities") == {"drop": ["ALL"]},
                "writable root file system": security.get("readOnlyRootFilesystem") is True,
                "no seccomp profile": security.get("seccompProfile") == {"type": "RuntimeDefault"},
                "image tag latest": tag != "latest",
            }
            faults += [f"{where}.{container['name']}: {name}" for name, kept in checks.items() if not kept]
    return faults


@everywhere
def test_every_document_meets_its_schema(source: str) -> None:
    faults = {f"{d['kind']} {d['metadata']['name']}": schema_faults(d) for d in documents(source)}
    assert {name: found for name, found in faults.items() if found} == {}


@everywhere
def test_every_pod_keeps_the_house_rules(source: str) -> None:
    assert [fault for document in documents(source) for fault in rule_faults(document)] == []
    assert sum(len(list(pods(document))) for document in documents(source)) == (9 if source == "gpu" else 5)


def put(document: Document, path: str, value: Any) -> None:
    """Set one value, `path` as of `a.0.b`; None takes the key away."""
    *before, last = (int(part) if part.isdigit() else part for part in path.split("."))
    node: Any = document
    for part in before:
        node = node[part]
    if value is None:
        del node[last]
    else:
        node[last] = value


HEAD, WORKERS = "spec.rayClusterSpec.headGroupSpec", "spec.rayClusterSpec.workerGroupSpecs.0"
HEADS_OWN, CONTAINER = f"{HEAD}.template.spec.containers.0", "spec.template.spec.containers.0"
BROKEN: dict[str, tuple[str, str, Any]] = {
    "misspelt, Deployment": ("Deployment", f"{CONTAINER}.readinesProbe", {}),
    "wrong type, Deployment": ("Deployment", "spec.replicas", "1"),
    "misspelt, Service": ("Service", "spec.ports.0.targetport", 5000),
    "wrong type, Role": ("Role", "rules.0.verbs", "get"),
    "misspelt, RayJob": ("RayJob", "spec.entrypont", "facemllm"),
    "misspelt, head group": ("RayJob", f"{HEAD}.rayStartParam", {}),
    "a number where Ray wants a string": ("RayJob", f"{HEAD}.rayStartParams.num-cpus", 0),
    "wrong type, worker group": ("RayJob", f"{WORKERS}.replicas", "2"),
    "too large for int32": ("RayJob", f"{WORKERS}.replicas", 2**31),
    "not in the enumeration": ("RayJob", "spec.rayClusterSpec.authOptions.mode", "tokens"),
    "required field gone": ("RayJob", HEAD, None),
    "misspelt in a head's container": ("RayJob", f"{HEADS_OWN}.securityContext.runAsNonroot", True),
    "an object for a quantity": ("RayJob", f"{HEADS_OWN}.resources.limits.cpu", {}),
    "unknown kind": ("RayJob", "kind", "RayJobs"),
    "unknown core kind": ("Deployment", "kind", "Deploiment"),
    "unknown version": ("RayJob", "apiVersion", "ray.io/v2"),
    "no spec": ("RayJob", "spec", None),
}


@pytest.mark.parametrize(("kind", "path", "value"), BROKEN.values(), ids=BROKEN)
def test_a_broken_document_is_refused(kind: str, path: str, value: Any) -> None:
    document = copy.deepcopy(next(d for d in documents("base") if d["kind"] == kind))  # which is sound, as shown above
    put(document, path, value)
    assert schema_faults(document)


SECURITY, HOST = f"{CONTAINER}.securityContext", {"name": "h", "hostPath": {"path": "/"}}
UNRULY: dict[str, tuple[str, str, Any, str]] = {
    "no limits": ("Deployment", f"{CONTAINER}.resources.limits", None, "no requests and limits"),
    "latest": ("Deployment", f"{CONTAINER}.image", "registry:5000/face-mllm:latest", "image tag latest"),
    "privileged": ("Deployment", f"{SECURITY}.privileged", True, "privileged"),
    "writable": ("Deployment", f"{SECURITY}.readOnlyRootFilesystem", False, "writable"),
    "root": ("Deployment", "spec.template.spec.securityContext.runAsUser", 0, "root"),
    "root in a Ray head": ("RayJob", f"{HEAD}.template.spec.securityContext", None, "root"),
    "host network": ("RayJob", f"{HEAD}.template.spec.hostNetwork", True, "hostNetwork"),
    "host path": ("Deployment", "spec.template.spec.volumes.0", HOST, "hostPath"),
    "a secret in the repository": ("Service", "kind", "Secret", "never committed"),
}


@pytest.mark.parametrize(("kind", "path", "value", "says"), UNRULY.values(), ids=UNRULY)
def test_a_document_against_the_house_rules_is_refused(kind: str, path: str, value: Any, says: str) -> None:
    document = copy.deepcopy(one("base", kind))
    put(document, path, value)
    assert any(says in fault for fault in rule_faults(document))


def test_strict_honours_what_crds_say_in_their_own_way() -> None:
    properties = {
        "port": {"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True},
        "time": {"type": "string", "nullable": True},
        "open": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
        "map": {"type": "object", "additionalProperties": {"type": "string"}},
        "metadata": {"type": "object"},
    }
    schema = Draft202012Validator(strict({"type": "object", "properties": properties}))
    sound = [("port", 1), ("port", "http"), ("time", None), ("open", {"a": 1}), ("map", {"a": "b"})]
    unsound = [("port", 1.5), ("port", None), ("time", 1), ("open", []), ("map", {"a": 1}), ("metadata", 1)]
    assert [one for one in [*sound, ("metadata", {"a": 1})] if not schema.is_valid(dict([one]))] == []
    assert [one for one in [*unsound, ("other", 1)] if schema.is_valid(dict([one]))] == []


@rendered
def test_images_are_named_by_the_overlay_and_tagged_and_kfp_runs_that_of_dev(overlay: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    images = {c["image"] for d in documents(overlay) for _, pod in pods(d) for c in pod["spec"]["containers"]}
    (image,) = (image for image in images if not image.startswith(OTHERS))
    assert re.fullmatch(r"(registry\.example\.com/)?face-mllm:\d+\.\d+\.\d+(-cuda)?", image)
    assert overlay != "dev" or image == settings.load().cluster.image


@everywhere
def test_everything_lives_in_the_namespace_under_a_component_label(source: str) -> None:
    for document in documents(source):
        component = document["metadata"]["labels"]["app.kubernetes.io/component"]
        assert component in {"platform", "training", "serving"}  # docs/cluster.md applies by this label
        if source != "base" and document["kind"] not in ("Namespace", "PriorityClass"):
            assert document["metadata"]["namespace"] == "face-mllm"


@everywhere
def test_a_pod_that_needs_the_workspace_mounts_the_claim_that_kfp_mounts(source: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    claim = settings.load().cluster.workspace_claim
    assert [d["metadata"]["name"] for d in documents(source) if d["kind"] == "PersistentVolumeClaim"].count(claim) == 1
    ray = dict(pods(one(source, "RayJob"))).items()
    for pod in (pod for where, pod in ray if where != "submitter"):
        claims = {v.get("persistentVolumeClaim", {}).get("claimName"): v["name"] for v in pod["spec"]["volumes"]}
        mounts = {m["name"]: m["mountPath"] for m in pod["spec"]["containers"][0]["volumeMounts"]}
        assert mounts[claims[claim]] == "/workspace"


@everywhere
def test_the_training_command_is_one_that_the_settings_accept(source: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(one(source, "RayJob")["spec"]["entrypoint"])
    assert words[:3] == ["facemllm", "step", "align"]
    options = list(zip(words[3::2], words[4::2], strict=True))
    chosen = settings.load(dict(options)["--profile"], [value for key, value in options if key == "--set"])
    assert all(str(folder).startswith("/workspace/") for folder in (chosen.home, chosen.runs))
    # the conversations are found by the key that the pipeline's steps gave them: all settings are those of its pods
    pipelines, _ = on_cluster(dict(options)["--profile"], [])
    assert chosen.model_dump(exclude={"train", "cluster"}) == pipelines.model_dump(exclude={"train", "cluster"})
    service = one(source, "Service", "mlflow")
    assert chosen.tracking.uri == f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    group = one(source, "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert chosen.train.use_gpu == ("nvidia.com/gpu" in limits)
    places = int(limits.get("nvidia.com/gpu", 1)) * group["replicas"]
    assert (chosen.train.workers, group["minReplicas"], group["maxReplicas"]) == (places, *[group["replicas"]] * 2)


@everywhere
def test_pods_speak_to_whom_the_network_policies_allow(source: str) -> None:
    policies = {d["metadata"]["name"]: d["spec"] for d in documents(source) if d["kind"] == "NetworkPolicy"}
    assert policies["default-deny-ingress"]["policyTypes"] == ["Ingress"]
    labels = [pod["metadata"].get("labels", {}) for d in documents(source) for _, pod in pods(d)]
    labels.append({"app.kubernetes.io/component": "serving"})  # staging's, which a release applies
    for name, spec in policies.items():
        wanted = spec["podSelector"].get("matchLabels", {}).items()
        assert any(wanted <= own.items() for own in labels), f"{name} selects no pod"
        if name != "default-deny-ingress":
            assert all(rule["from"] for rule in spec["ingress"]), f"{name} lets everyone in"


@everywhere
def test_no_pod_gets_a_sidecar_that_would_refuse_those_without_one(source: str) -> None:
    made = [(f"{d['kind']} {where}", pod) for d in documents(source) for where, pod in pods(d)]
    templates = {where: pod["metadata"]["labels"] for where, pod in made if "labels" in pod["metadata"]}
    assert {where.split()[0] for where in templates} - {"CronJob"} == {"Deployment", "Job", "RayJob"}
    assert {where: labels.get("sidecar.istio.io/inject") for where, labels in templates.items()} == dict.fromkeys(
        templates, "false"
    )


def with_components(tmp_path: Path, *components: str, **places: str) -> list[Document]:
    """The overlay `gpu` with components of ours and other places, as an overlay of one's own would do it."""
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    known = tmp_path / "k8s/overlays/gpu/places.yaml"
    said = yaml.safe_load(known.read_text("utf-8"))
    known.write_text(yaml.safe_dump(said | {"data": said["data"] | places}), "utf-8")
    folder, overlay = tmp_path / "k8s/overlays/gpu", tmp_path / "k8s/overlays/gpu/kustomization.yaml"
    written = yaml.safe_load(overlay.read_text("utf-8"))
    written["components"][-1:-1] = [f"../../components/{name}" for name in components]  # `places` is last
    overlay.write_text(yaml.safe_dump(written), "utf-8")
    command = ["kubectl", "kustomize", str(folder)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return list(yaml.load_all(text, yaml.CSafeLoader))


@needs_kubectl
def test_what_starts_runs_on_new_data_has_a_token_for_kubeflow_and_for_nothing_else(tmp_path: Path) -> None:
    made = {d["kind"]: d for d in with_components(tmp_path, "on-data") if d["metadata"]["name"].startswith(STARTS)}
    assert set(made) == {"CronJob", "ServiceAccount", "RoleBinding"}
    assert [fault for document in made.values() for fault in schema_faults(document) + rule_faults(document)] == []
    ((_, pod),) = pods(made["CronJob"])
    spec, (container,) = pod["spec"], pod["spec"]["containers"]
    assert container["image"].startswith("registry.example.com/face-mllm:")
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    projected = next(volume["projected"] for volume in spec["volumes"] if volume["name"] == "token")
    (source,) = (one["serviceAccountToken"] for one in projected["sources"])
    assert source["audience"] == "pipelines.kubeflow.org"
    assert f"{mounts['token']}/{source['path']}" == KF_PIPELINES_SA_TOKEN_PATH
    assert (spec["automountServiceAccountToken"], spec["serviceAccountName"]) == (False, STARTS[1])
    assert container["envFrom"] == [{"secretRef": {"name": "face-mllm-s3", "optional": True}}], "it asks the DVC remote"
    words = [*container["command"], *container["args"]]
    assert words[:4] == ["python", "pipeline.py", "schedule", "--on-data"]
    assert made["RoleBinding"]["subjects"][0]["name"] == STARTS[1]


@everywhere
def test_accounts_exist_and_may_do_little(source: str) -> None:
    accounts = {d["metadata"]["name"] for d in documents(source) if d["kind"] == "ServiceAccount"}
    named = {pod["spec"].get("serviceAccountName") for d in documents(source) for _, pod in pods(d)} - {None}
    named.add("model-server")  # staging's
    named |= {s["name"] for d in documents(source) if d["kind"] == "RoleBinding" for s in d["subjects"]}
    releases = {"releaser"} if source == "gpu" else set()
    assert named == accounts == {"pipeline-runner", "trainer", "model-server"} | releases
    # which words of the role are needed, tests/unit/test_rbac.py says, call by call


@rendered
def test_mlflow_answers_under_its_service_name_and_keeps_its_data(overlay: str) -> None:
    (_, pod), *_ = pods(one(overlay, "Deployment", "mlflow"))
    container = pod["spec"]["containers"][0]
    flags = dict(arg.partition("=")[::2] for arg in container["args"])
    port = one(overlay, "Service", "mlflow")["spec"]["ports"][0]["port"]
    assert flags["--host"] == "0.0.0.0"
    assert f"mlflow:{port}" in flags["--allowed-hosts"].split(",")
    probes = {container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert probes == {"/health"}
    variables = {entry["name"]: entry.get("value", "") for entry in container["env"]}
    if overlay == "gpu":  # from the Secret, and nothing that would win over it
        assert [one["secretRef"]["name"] for one in container["envFrom"]] == ["mlflow-store", "mlflow-admin"]
        assert "MLFLOW_ARTIFACTS_DESTINATION" not in variables
        assert variables["MLFLOW_BACKEND_STORE_URI"] == "postgresql://"  # libpq's variables name the rest
    else:
        assert variables["MLFLOW_BACKEND_STORE_URI"].startswith("sqlite:////data/")
        assert "/data" in {mount["mountPath"] for mount in container["volumeMounts"]}


@needs_kubectl
def test_the_gpu_overlay_asks_for_gpus_where_they_are_used() -> None:
    ray = dict(pods(one("gpu", "RayJob")))
    for pod in (ray["worker workers"],):
        resources = pod["spec"]["containers"][0]["resources"]
        assert int(resources["limits"]["nvidia.com/gpu"]) == int(resources["requests"]["nvidia.com/gpu"]) > 0
        assert pod["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"
        shared = next(v["emptyDir"] for v in pod["spec"]["volumes"] if v["name"] == "dshm")
        assert shared["medium"] == "Memory"
        assert {"name": "dshm", "mountPath": "/dev/shm"} in pod["spec"]["containers"][0]["volumeMounts"]
    assert "nvidia.com/gpu" not in ray["head"]["spec"]["containers"][0]["resources"]["limits"]
    assert "--profile paper-7b" in one("gpu", "RayJob")["spec"]["entrypoint"]


def test_versions_agree_with_the_constraints_and_the_image() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE))
    assert one("base", "RayJob")["spec"]["rayClusterSpec"]["rayVersion"] == pins["ray"]
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    user = re.findall(r"^USER (\d+):\d+$", dockerfile, re.MULTILINE)[-1]
    specs = [pod["spec"] for document in documents("base") for _, pod in pods(document)]
    assert {spec.get("securityContext", {}).get("runAsUser", int(user)) for spec in specs} == {int(user)}
    assert "-c constraints.txt" in dockerfile
    assert "rfc3987-syntax" not in pins, "jsonschema builds its grammar whenever Ray, KFP or KServe is imported"
    copied = {word for line in re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE) for word in line.split()}
    assert [name for name in sorted(copied) if not (ROOT / name).exists()] == []
