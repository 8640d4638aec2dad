"""Annotation or a training stage as a RayJob of KubeRay: what is asked of the cluster, made of settings and digests."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from facemllm.core.containers import RESTRICTED, USER, references, resources
from facemllm.core.kubernetes import RAY_JOB, Object
from facemllm.core.step import PARENT_RUN
from facemllm.errors import UserError
from facemllm.settings import Settings, load
from facemllm.settings.cluster import Pod
from facemllm.settings.kubernetes import seconds_of
from facemllm.workflow.pods import ray_head, workers_of, working

RUN, KEY, PACKAGE, PART = "facemllm.run", "facemllm.key", "facemllm.package", "facemllm.part"
"""Labels of a RayJob (the last: of its pods); KEY is also the annotation that holds the whole key."""
_RAY = {"app.kubernetes.io/component": "training", "sidecar.istio.io/inject": "false"}  # as `ray-among-itself` selects
_SHORT = 12  # hex digits of a digest in a name or a label
_STAGE = 21  # letters of a stage's name: KubeRay takes 47 for a job's
_KEEP_S = 600  # after the end, to read logs
_HERE = {"launcher": "here"}
_SUBMITTER = Pod(cpu="500m", memory="1Gi", gpus=0)


@dataclass(frozen=True)
class Job:
    """A step's work: its name, the key of its result, the digests that it is given, that of the package whose code
    does it; the pipeline run it belongs to, and that run's id in MLflow."""

    step: str
    key: str
    inputs: Mapping[str, str]
    package: str
    run: str | None = None
    parent: str | None = None

    @property
    def name(self) -> str:
        """Of the RayJob: the same for the same work."""
        stage = f"train-{self.step[:_STAGE].replace('_', '-').strip('-')}"
        return f"{'annotate' if self.step == 'annotate' else stage}-{self.key[:_SHORT]}"

    @property
    def labels(self) -> dict[str, str]:
        """By which it and its pods are found."""
        return {
            **({RUN: self.run} if self.run else {}),
            KEY: self.key[:_SHORT],
            PACKAGE: self.package[:_SHORT],
        }


def render(settings: Settings, job: Job) -> Object:
    """The RayJob that does a step's work: a head that drives, as many worker pods as `train.workers` or the
    `annotate.concurrency` tasks need, and the pod that submits. Raises UserError for settings that no command line can
    say."""
    cluster, worker = settings.cluster, working(settings, job.step)
    pods, _ = workers_of(settings, job.step)
    parent = {PARENT_RUN: job.parent} if job.parent else {}
    head = _template(settings, job, "head", ray_head(settings), parent)
    head["spec"]["containers"][0]["ports"] = [
        {"name": name, "containerPort": port} for name, port in (("gcs-server", 6379), ("dashboard", 8265))
    ]
    workers = {
        "groupName": "workers",
        **dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), pods),
        "rayStartParams": {},
        "template": _template(settings, job, "worker", worker),
    }
    return {
        "apiVersion": RAY_JOB.api_version,
        "kind": RAY_JOB.name,
        "metadata": {
            "name": job.name,
            "labels": {
                **cluster.labels,
                **_RAY,
                **job.labels,
                **({"kueue.x-k8s.io/queue-name": cluster.queue} if cluster.queue else {}),
            },
            "annotations": {**cluster.annotations, KEY: job.key},
        },
        "spec": {
            "entrypoint": shlex.join(entrypoint(settings, job)),
            "backoffLimit": 0,  # Ray does lost tasks again, `train.max_failures` restarts training, KFP the launcher
            "activeDeadlineSeconds": seconds_of(worker.timeout or ""),
            "preRunningDeadlineSeconds": seconds_of(cluster.start_within),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": _KEEP_S,
            "submissionMode": "K8sJobMode",
            "submitterConfig": {"backoffLimit": 2},
            # KubeRay's own has no security context; it fills in the command
            "submitterPodTemplate": _template(settings, job, "submitter", _SUBMITTER),
            "rayClusterSpec": {
                "rayVersion": version("ray"),
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},  # it holds no worker
                    "template": head,
                },
                "workerGroupSpecs": [workers],
            },
        },
    }


def entrypoint(settings: Settings, job: Job) -> list[str]:
    """The command that the head runs: the step on exactly these digests and settings, by exactly this code."""
    given = [word for name, digest in sorted(job.inputs.items()) for word in ("--input", f"{name}={digest}")]
    here = {name: getattr(settings, name).model_copy(update=_HERE) for name in ("annotate", "train")}
    sets = [word for one in overrides(settings.model_copy(update=here)) for word in ("--set", one)]
    return ["facemllm", "step", job.step, *given, "--package", job.package, "--profile", settings.profile, *sets]


def overrides(settings: Settings) -> list[str]:
    """What `--set` has to say over a profile for these settings. Raises UserError where it cannot."""
    plain = load(settings.profile).model_dump(mode="json")
    found = [_assigned(key, value) for key, value in _differing(plain, settings.model_dump(mode="json"))]
    if load(settings.profile, found) != settings:
        raise UserError(f"profile {settings.profile}: these settings cannot be handed to a RayJob by --set alone")
    return found


def _assigned(key: str, value: Any) -> str:
    """`key=value` in JSON that comes whole through the shell in which Ray runs an entrypoint: Ray puts words that hold
    a space in double quotes, and no others in any."""
    text = json.dumps(value).replace("\\\\", "\\u005c").replace("$", "\\u0024").replace("`", "\\u0060")
    return f"{key}={text}" if re.fullmatch(r"[\w.=+-]+", f"{key}={text}", re.ASCII) else f"{key}= {text}"


def _differing(plain: Mapping[str, Any], own: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in own.items():
        key = f"{at}.{_quoted(name)}" if at else _quoted(name)
        below = plain.get(name)
        if isinstance(below, Mapping) and isinstance(value, Mapping) and value:
            yield from _differing(below, value, key)
        elif name not in plain or below != value:
            yield key, value


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[^.\"]+", name) else f'"{name}"'


def _template(settings: Settings, job: Job, part: str, pod: Pod, env: Mapping[str, str] = {}) -> Object:
    """The pod template of one part: restricted, on a read-only root, and but for the submitter with the volume and the
    step's variables."""
    cluster, submits = settings.cluster, part == "submitter"
    mounts = [("tmp", "/tmp", {"emptyDir": {"sizeLimit": pod.ephemeral_storage} if pod.ephemeral_storage else {}})]
    if pod.shared_memory:
        shared = {"emptyDir": {"medium": "Memory", "sizeLimit": pod.shared_memory}}
        mounts.append(("dshm", "/dev/shm", shared))
    if not submits:
        claim = {"persistentVolumeClaim": {"claimName": cluster.workspace_claim}}
        mounts.append(("workspace", cluster.mount, claim))
    container = {
        "name": part if submits else f"ray-{part}",
        "image": cluster.image,
        "env": [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}, *_variables(pod, env)],
        "resources": resources(pod),
        "securityContext": dict(RESTRICTED),
        "volumeMounts": [{"name": name, "mountPath": path} for name, path, _ in mounts],
    }
    spec = {
        "serviceAccountName": cluster.ray_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,  # else the Service `mlflow` would set MLFLOW_PORT here
        "securityContext": {
            **{"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER},
            "fsGroupChangePolicy": "OnRootMismatch",  # else a large volume is owned anew at every start
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [{"name": name, **source} for name, _, source in mounts],
    }
    placed: Object = {
        "restartPolicy": "Never" if submits else None,
        "imagePullSecrets": [{"name": name} for name in cluster.image_pull_secrets],
        "tolerations": [one.model_dump(exclude_none=True) for one in pod.tolerations or ()],
        "nodeSelector": dict(pod.node_selector or {}),
    }
    metadata = {
        "labels": {**cluster.labels, **_RAY, **job.labels, PART: part},
        "annotations": dict(cluster.annotations),
    }
    return {"metadata": metadata, "spec": {**spec, **{name: value for name, value in placed.items() if value}}}


def _variables(pod: Pod, env: Mapping[str, str]) -> Iterator[Object]:
    for name, value in {**(pod.env or {}), **env}.items():
        yield {"name": name, "value": value}
    yield from references("secretKeyRef", pod.secrets)
    yield from references("configMapKeyRef", pod.config_maps)
