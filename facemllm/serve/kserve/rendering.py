"""The InferenceService of a model, as data: a pure function of settings and model. Its whole pod is in it, so that a
release names everything it serves with, and going back brings everything back.

Production's first container fetches the model, has the signed decisions and the policy say that these very bytes are
approved, and leaves a copy for the server, which has no way to the store and asks both again. Staging serves what
nobody has decided about yet: such a server listens on its pod's loopback alone, where Knative's proxy reaches it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from facemllm.core.containers import RESTRICTED, USER, references, resources
from facemllm.core.digests import of_json
from facemllm.core.servers import serving_flags
from facemllm.errors import UserError
from facemllm.serve.model_store import checked, is_remote
from facemllm.settings import Settings
from facemllm.settings.cluster import Pod, Serving
from facemllm.settings.kubernetes import hidden_by, seconds_of

Object = dict[str, Any]
DIGEST, VERSION, PREDICTOR, FORMER = (f"facemllm.io/{name}" for name in ("digest", "version", "predictor", "former"))
"""Annotations: the model, its version, the digest of its `spec.predictor`, and the whole of the one before it."""
PRODUCTION, STAGING = "production", "staging"
_DRAIN_S = 5.0  # a pod that is to end goes on answering until the gateway has noticed
_LONGEST = 63 - len("-predictor-00001-deployment")
"""Letters of a model's name: beyond them Knative puts a hash into the name of a revision's Deployment, and so into that
of its pods, by which `split` tells them in Prometheus."""
_PORT = 8080
_GIT = "/git"
_FOLDERS = ("/policy", _GIT, "/keys", "/checkpoint", "/verified")
_MODEL, _EVALUATED, _VLLM = "/verified/model", "/verified/evaluated.json", "/verified/vllm"
_SECURITY: Object = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    **RESTRICTED,
    "seccompProfile": {"type": "RuntimeDefault"},
}


@dataclass(frozen=True)
class Model:
    """A model to serve: digest, version, its address in the store, and that of its evaluation's figures."""

    digest: str
    version: str
    address: str
    figures: str | None = None


def name_of(settings: Settings, stage: str) -> str:
    """The name of a stage's InferenceService. Raises UserError where Kubernetes does not take the model's name."""
    name = settings.promote.model_name
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > _LONGEST:
        raise UserError(f"promote.model_name: {name!r} is no name for KServe; give a-z, 0-9 and -, at most {_LONGEST}")
    return name if stage == PRODUCTION else f"{name}-{stage}"


def annotations_of(model: Model, predictor: Object) -> dict[str, str]:
    """What an InferenceService says of its model."""
    return {DIGEST: model.digest, VERSION: model.version, PREDICTOR: of_json(predictor)}


def service(
    settings: Settings,
    stage: str,
    about: Mapping[str, str],
    predictor: Object,
    mode: str,
    percent: int | None,
    former: Object | None,
) -> Object:
    """An InferenceService of a predictor that was rendered before. Annotations become those of the pods, so that each
    change of one makes a new revision: `former` stays as it is until the next release."""
    annotations = {**about, "serving.kserve.io/deploymentMode": mode, "serving.kserve.io/enable-tag-routing": "true"}
    if former is not None:
        annotations[FORMER] = json.dumps(former, sort_keys=True)
    labels = {"app.kubernetes.io/part-of": "face-mllm", "app.kubernetes.io/component": "serving"}
    if stage == STAGING:
        labels["networking.knative.dev/visibility"] = "cluster-local"
    share = {} if percent is None else {"canaryTrafficPercent": percent}
    known = settings.cluster.serving
    namespace = known.production_namespace if stage == PRODUCTION else known.staging_namespace
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": name_of(settings, stage),
            "namespace": namespace,
            "labels": labels,
            "annotations": annotations,
        },
        "spec": {"predictor": {**predictor, **share}},
    }


def refuse(settings: Settings) -> None:
    """Raises UserError, in one line, for settings under which nothing can be served in KServe."""
    known, serve = settings.cluster.serving, settings.serve
    own, lost = serve.engine.name == "own", "a pod keeps nothing"
    faults = [
        (
            not known.models,
            "cluster.serving.models",
            "null; give s3://bucket/models, where production finds its models",
        ),
        (
            settings.promote.decisions is None,
            "promote.decisions",
            "null, a folder that production has not; give an address",
        ),
        (serve.retention.answers, "serve.retention.answers", f"true, and {lost}; set answers: false and days: 0"),
        (serve.feedback.folder is not None, "serve.feedback.folder", f"{serve.feedback.folder}, and {lost}; set null"),
        (
            not own and known.vllm is None,
            "cluster.serving.vllm",
            "null, and serve.engine.name is vllm; give image and pod",
        ),
        (own and serve.device == "cuda" and not known.pod.gpus, "cluster.serving.pod.gpus", "0, for cuda; give 1"),
        (any(step % 1 for step in serve.canary.steps), "serve.canary.steps", "KServe takes whole percents; give such"),
        (
            serve.target == "gitops" and known.gitops is None,
            "cluster.serving.gitops",
            "null; give repository, branch, file",
        ),
    ]
    name_of(settings, PRODUCTION)
    for found, key, line in faults:
        if found:
            raise UserError(f"{key}: {line}")
    place = checked(known.models or "")
    if not is_remote(place) and (hidden := hidden_by(place, *_FOLDERS)):
        raise UserError(f"cluster.serving.models: {place} would hide {hidden} of the server's pod; give one as /models")


def predictor_of(settings: Settings, stage: str, model: Model) -> Object:
    """The pod of a model at a stage, and how many of it there are: `spec.predictor`. Raises UserError as `refuse`."""
    refuse(settings)
    known, production = settings.cluster.serving, stage == PRODUCTION
    vllm = known.vllm.over(known.pod) if known.vllm and settings.serve.engine.name == "vllm" else None
    first = [_first(settings, model, vllm is not None)] if production else []
    server = _server(settings, model, production, known.pod)
    predictor: Object = {
        "minReplicas": known.min_replicas if production else 1,
        "maxReplicas": known.max_replicas if production else 1,
        "annotations": {"serving.knative.dev/progress-deadline": f"{seconds_of(known.ready_timeout)}s"},
        # what the network policies select; in a Profile, a sidecar would refuse whoever comes without a user
        "labels": {"app.kubernetes.io/component": "serving", "sidecar.istio.io/inject": "false"},
        "serviceAccountName": "model-server",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "imagePullSecrets": [{"name": name} for name in settings.cluster.image_pull_secrets],
        "containers": [server, *([_vllm(vllm.image, vllm.pod, model, settings)] if production and vllm else [])],
        "initContainers": first,
        "volumes": _volumes(known, vllm.pod if vllm else None),
        "tolerations": [one.model_dump(exclude_none=True) for one in known.pod.tolerations or ()],
        "nodeSelector": dict(known.pod.node_selector or {}),
    }
    if known.concurrency:
        predictor["containerConcurrency"] = known.concurrency
    return {key: value for key, value in predictor.items() if value not in ([], {})}


def _flags(given: Mapping[str, object]) -> list[str]:
    return [f"--{key}={value}" for key, value in given.items()]


def _config(settings: Settings) -> dict[str, Any]:
    chosen = settings.serve.model_dump(mode="json")
    return chosen | {"drain_s": max(settings.serve.drain_s, _DRAIN_S)}


def _approved_by(settings: Settings, checkpoint: str) -> dict[str, str]:
    return {
        "decisions": str(settings.decisions),
        "policy": "/policy/policy.yaml",
        "checkpoint": f"/checkpoint/{checkpoint}.json",
    }


def _first(settings: Settings, model: Model, exports: bool) -> Object:
    """The container that verifies and copies the model, and ends."""
    given = {"model": model.address, "digest": model.digest, "copy-to": _MODEL}
    given |= {"evaluated": model.figures} if model.figures else {}
    given |= _approved_by(settings, "verify") | ({"export-vllm": _VLLM} if exports else {})
    container = _container(settings, "verify", settings.cluster.serving.pod, given)
    mounts = [*_mounts(settings), {"name": "verified", "mountPath": "/verified"}]
    fetches = references("secretKeyRef", settings.cluster.serving.pod.secrets)
    return container | {"volumeMounts": mounts, "env": [*container["env"], *fetches]}


def _server(settings: Settings, model: Model, production: bool, pod: Pod) -> Object:
    given: dict[str, object] = {"model": _MODEL if production else model.address}
    given |= serving_flags(settings, model.digest, model.version, _config(settings))
    given |= {"host": "0.0.0.0" if production else "127.0.0.1", "port": _PORT, "scratch": "/tmp"}
    if production:
        given |= _approved_by(settings, "server")
    if model.figures:
        given["evaluated"] = _EVALUATED if production else model.figures
    beside = settings.serve.engine.name == "vllm"
    container = _container(settings, "kserve-container", pod, given, gpus=not beside)
    mounts = _mounts(settings)
    if production:
        mounts.append({"name": "verified", "mountPath": "/verified", "readOnly": True})
    if pod.shared_memory:
        mounts.append({"name": "dshm", "mountPath": "/dev/shm"})
    fetches = [] if production else [*references("secretKeyRef", pod.secrets)]
    probe = {"httpGet": {"path": "/v2/health/ready", "port": _PORT}, "periodSeconds": 5, "timeoutSeconds": 3}
    alive = {"httpGet": {"path": "/v2/health/live", "port": _PORT}, "periodSeconds": 20, "timeoutSeconds": 5}
    alive["initialDelaySeconds"] = seconds_of(settings.cluster.serving.ready_timeout)  # it answers once it is loaded
    return container | {
        "ports": [{"containerPort": _PORT, "protocol": "TCP"}],
        "readinessProbe": probe,
        "livenessProbe": alive,
        "volumeMounts": mounts,
        "env": [*container["env"], *fetches],
    }


def _container(settings: Settings, name: str, pod: Pod, given: Mapping[str, object], gpus: bool = False) -> Object:
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HOME": _GIT} | dict(pod.env or {})
    return {
        "name": name,
        "image": settings.cluster.image,
        "command": ["python", "-m", "facemllm.serve.server"],
        "args": _flags(given),
        "env": [{"name": key, "value": value} for key, value in offline.items()],
        "resources": resources(pod, gpus),
        "securityContext": _SECURITY,
    }


def _vllm(image: str, pod: Pod, model: Model, settings: Settings) -> Object:
    """The vLLM server, on the pod's loopback; it has neither decisions nor keys."""
    port = settings.serve.engine.vllm_url.rstrip("/").rpartition(":")[2]
    given = {
        "served-model-name": model.digest,
        "model": _VLLM,
        "host": "127.0.0.1",
        "port": port,
        "dtype": settings.serve.engine.vllm_dtype,
        "generation-config": "vllm",
        "limit-mm-per-prompt": '{"image": 1}',
    }
    variables = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    variables |= {"HOME": "/tmp", "VLLM_CACHE_ROOT": "/tmp/vllm"} | dict(pod.env or {})
    mounts: list[Object] = [{"name": "verified", "mountPath": "/verified", "readOnly": True}]
    mounts.append({"name": "vllm-tmp", "mountPath": "/tmp"})
    if pod.shared_memory:
        mounts.append({"name": "vllm-shm", "mountPath": "/dev/shm"})
    return {
        "name": "vllm",
        "image": image,
        "command": ["python3", "-m", "vllm.entrypoints.openai.api_server"],
        "args": ["--enable-scale-out", *_flags(given)],
        "env": [{"name": key, "value": value} for key, value in variables.items()],
        "resources": resources(pod),
        "securityContext": _SECURITY,
        "volumeMounts": mounts,
    }


def _mounts(settings: Settings) -> list[Object]:
    mounts: list[Object] = [
        {"name": name, "mountPath": f"/{name}", "readOnly": True} for name in ("policy", "git", "keys")
    ]
    mounts += [{"name": name, "mountPath": f"/{name}"} for name in ("checkpoint", "tmp")]
    place = settings.cluster.serving.models or ""
    return mounts if is_remote(place) else [*mounts, {"name": "models", "mountPath": place, "readOnly": True}]


def _volumes(known: Serving, vllm: Pod | None) -> list[Object]:
    pod, size = known.pod, {"sizeLimit": known.pod.ephemeral_storage}
    volumes: list[Object] = [
        {"name": "policy", "configMap": {"name": "face-mllm-policy", "optional": True}},  # staging needs none
        {"name": "git", "secret": {"secretName": "face-mllm-git", "optional": True}},
        {"name": "keys", "secret": {"secretName": "face-mllm-keys", "optional": True}},
        {"name": "verified", "emptyDir": size},
        {"name": "checkpoint", "emptyDir": {"sizeLimit": "512Mi"}},  # with a copy of the decisions
        {"name": "tmp", "emptyDir": size},
    ]
    if not is_remote(known.models or ""):
        volumes.append({"name": "models", "persistentVolumeClaim": {"claimName": "face-mllm-models", "readOnly": True}})
    if pod.shared_memory:
        volumes.append({"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": pod.shared_memory}})
    if vllm is not None:
        volumes.append({"name": "vllm-tmp", "emptyDir": {"sizeLimit": vllm.ephemeral_storage or "8Gi"}})
        if vllm.shared_memory:
            volumes.append({"name": "vllm-shm", "emptyDir": {"medium": "Memory", "sizeLimit": vllm.shared_memory}})
    return volumes
