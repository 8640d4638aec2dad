"""Settings of a cluster: the image, the volume, and what the pod of each step asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, JsonValue, StringConstraints, model_validator

from facemllm.settings.data import Section
from facemllm.settings.kubernetes import (
    Accelerator,
    Cpu,
    DataKey,
    Duration,
    Image,
    ImageByDigest,
    LabelKey,
    LabelValue,
    Mount,
    Namespace,
    ObjectName,
    OwnKey,
    Quantity,
    QueueName,
    Text,
    Variable,
)


class Toleration(Section):
    """A taint that a pod may be placed in spite of, in Kubernetes' words."""

    key: LabelKey | None = None
    operator: Literal["Exists", "Equal"] = "Equal"
    value: LabelValue | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None

    @model_validator(mode="after")
    def _of_one_kind(self) -> Toleration:
        if self.key is None and self.operator == "Equal":
            raise ValueError("Equal needs a key; give one, or operator: Exists for every taint")
        if self.value and self.operator == "Exists":
            raise ValueError("Exists takes no value; leave it out, or give operator: Equal")
        return self


class Variables(Section):
    """Environment variables out of a Secret or a ConfigMap: its keys, and the variable each becomes. Where it is
    `optional` a pod starts without the object, or without one of the keys."""

    env: Annotated[dict[DataKey, Variable], Field(min_length=1)]
    optional: bool = False


class Backoff(Section):
    """Pauses before a failed step runs again: the `first`, each `factor` times the one before, a whole
    number (Argo takes no other)."""

    first: Duration
    factor: Annotated[int, Field(ge=1, le=10)]


class Pod(Section):
    """What the pod of a step asks for; null is what lies below says (`Cluster.steps`). `accelerator` is the resource
    that `gpus` counts; `shared_memory` is the size of /dev/shm, which counts against `memory`; `ephemeral_storage` that
    of /tmp; `timeout` ends a pod that runs for longer. `env`, `secrets`, `config_maps` and `node_selector` are joined
    by name with those below, everything else takes their place."""

    cpu: Cpu | None = None
    memory: Quantity | None = None
    gpus: Annotated[int, Field(ge=0, le=1024)] | None = None
    accelerator: Accelerator | None = None
    tolerations: list[Toleration] | None = None
    node_selector: dict[LabelKey, LabelValue] | None = None
    shared_memory: Quantity | None = None
    ephemeral_storage: Quantity | None = None
    retries: Annotated[int, Field(ge=0, le=20)] | None = None
    backoff: Backoff | None = None
    timeout: Duration | None = None
    env: dict[Variable, Text] | None = None
    secrets: dict[ObjectName, Variables] | None = None
    config_maps: dict[ObjectName, Variables] | None = None

    def over(self, below: Pod) -> Pod:
        """This pod, with what it leaves open as `below` has it."""
        below = below._without(self._variables())
        mine = {name: value for name in Pod.model_fields if (value := getattr(self, name)) is not None}
        joined = {
            name: {**(getattr(below, name) or {}), **mine[name]} for name in mine if isinstance(mine[name], Mapping)
        }
        return below.model_copy(update=mine | joined)

    def _variables(self) -> set[str]:
        """The environment variables that it names, of plain values, Secrets and ConfigMaps."""
        sources = [*(self.secrets or {}).values(), *(self.config_maps or {}).values()]
        return {*(self.env or {}), *(name for one in sources for name in one.env.values())}

    def _without(self, taken: set[str]) -> Pod:
        """The same, without these variables: a container with two of one name has either."""

        def rest(sources: dict[str, Variables] | None) -> dict[str, Variables] | None:
            left = {
                name: one.model_copy(update={"env": {key: v for key, v in one.env.items() if v not in taken}})
                for name, one in (sources or {}).items()
            }
            return sources and {name: one for name, one in left.items() if one.env}

        env = self.env and {name: value for name, value in self.env.items() if name not in taken}
        changed = {"env": env, "secrets": rest(self.secrets), "config_maps": rest(self.config_maps)}
        return self.model_copy(update=changed)


DEFAULTS, MODELS, TRAIN, LAUNCHER, RAY_HEAD, _ = GROUPS = (
    *("defaults", "models", "train", "launcher", "ray_head", "finish"),
)
"""Names in `cluster.steps` that are no step's: of all steps, of those that load the model, of training's stages; of a
task while a RayJob does its work, of that RayJob's head; of the task that ends a run."""
_NEEDED = ("cpu", "memory", "gpus", "accelerator", "tolerations", "node_selector", "retries", "backoff", "timeout")


class Vllm(Section):
    """The vLLM server beside ours where `serve.engine.name` is vllm: its image, by digest, and what it asks for."""

    image: ImageByDigest
    pod: Pod

    def over(self, below: Pod) -> Vllm:
        """This one, with cpu, memory and accelerator as `below` has them where it leaves them open."""
        open_ = Pod(cpu=below.cpu, memory=below.memory, accelerator=below.accelerator)
        return self.model_copy(update={"pod": self.pod.over(open_)})


class Gitops(Section):
    """The git repository that is applied to the cluster: `file` in it, on `branch`, is what a release writes."""

    repository: str
    branch: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")]
    file: Annotated[
        str, StringConstraints(pattern=r"^([A-Za-z0-9_][A-Za-z0-9._-]*/)*[A-Za-z0-9_][A-Za-z0-9._-]*\.yaml$")
    ]


class Serving(Section):
    """How models are served in KServe (`serve.target`).

    `models` is where production finds their bytes: s3://bucket/prefix, or a folder that its pods have. Staging and
    production lie in a namespace each. `mode` is KServe's word for serving by Knative (auto: the one that it uses
    itself). Servers are asked at the addresses of the cluster, or at their public ones (`reach`). A revision has
    `ready_timeout` to answer. Errors of a canary are counted by `prometheus`; null: by the server itself, where there
    is one replica, and of the release's own questions where there are more.
    """

    models: str | None
    staging_namespace: Namespace
    production_namespace: Namespace
    mode: Literal["auto", "Knative", "Serverless"]
    reach: Literal["cluster", "public"]
    min_replicas: Annotated[int, Field(ge=1, le=10_000)]
    max_replicas: Annotated[int, Field(ge=1, le=10_000)]
    concurrency: Annotated[int, Field(ge=0, le=10_000)]
    ready_timeout: Duration
    prometheus: Annotated[str, StringConstraints(pattern=r"^https?://[^ ]+$")] | None
    poll_s: Annotated[float, Field(gt=0, le=3600)]
    pod: Pod
    vllm: Vllm | None
    gitops: Gitops | None

    @model_validator(mode="after")
    def _whole(self) -> Serving:
        lacks = [name for name in ("cpu", "memory", "ephemeral_storage") if getattr(self.pod, name) is None]
        if lacks:
            raise ValueError(f"pod lacks {', '.join(lacks)}")
        if self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas is above max_replicas")
        if self.staging_namespace == self.production_namespace:
            raise ValueError("production needs a namespace of its own")
        return self


class Cluster(Section):
    """What only Kubeflow on a cluster needs: image, volume, pods.

    `overrides` are settings that are others there; they lie over the profile and below `--set`. `parameters` is how
    many the whole model has, which says the memory that loading it takes; null for the tiny preset. The volume of
    `workspace_claim` is mounted at `mount` in every step. `labels` and `annotations` are of all pods. In `steps`, what
    is said of one step lies over what `train` says of the stages, that over what `models` says of all steps that load
    the model, and that over `defaults`.

    The pods of a run have `account` (null: that which KFP gives them), those of a release to KServe `release_account`.
    Of RayJobs (`launcher: rayjob` of `annotate` and `train`): a run that starts them has `launcher_account`, their pods
    have `ray_account` and no token; `queue` is Kueue's; `start_within` bounds the time until their pods are ready.

    `one_host`: all pods share the network of one machine, as on a test bench: addresses of its loopback are the same in
    all of them.
    """

    image: Image
    image_pull_secrets: list[ObjectName]
    workspace_claim: ObjectName
    mount: Mount
    overrides: dict[str, JsonValue]
    parameters: Annotated[float, Field(gt=0, le=1e15, allow_inf_nan=False)] | None
    labels: dict[OwnKey, LabelValue]
    annotations: dict[OwnKey, Text]
    account: ObjectName | None
    launcher_account: ObjectName
    release_account: ObjectName
    ray_account: ObjectName
    queue: QueueName | None
    start_within: Duration
    one_host: bool
    serving: Serving
    steps: dict[str, Pod]

    @model_validator(mode="after")
    def _defaults_are_whole(self) -> Cluster:
        if DEFAULTS not in self.steps:
            raise ValueError("steps.defaults is missing")
        if lacks := [name for name in _NEEDED if getattr(self.steps[DEFAULTS], name) is None]:
            raise ValueError(f"steps.defaults lacks {', '.join(lacks)}")
        return self

    def pod(self, *names: str) -> Pod:
        """What `steps` says under these names, each over the one before it, all over the defaults."""
        pod = self.steps[DEFAULTS]
        for name in names:
            pod = self.steps[name].over(pod) if name in self.steps else pod
        return pod
