"""The pipeline as a specification for Kubeflow Pipelines: the graph, and on every task the pod that is set for it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facemllm.core.files import atomic_write, writing
from facemllm.core.step import CLUSTER_RUN
from facemllm.errors import UserError
from facemllm.settings import Settings
from facemllm.settings.cluster import Cluster, Pod
from facemllm.settings.kubernetes import seconds_of
from facemllm.workflow.pods import on_cluster, pods, refuse_examples

NAME, RELEASE_NAME = "face-mllm", "face-mllm-release"
_ATTEMPTS_END_S = 365 * 86_400
"""After the first attempt began: KFP hands its longest pause to Argo as `maxDuration`, which bounds all attempts of a
task together. Here `retries` bounds their number and `timeout` each."""

Graph = Callable[[Settings, list[str], Callable[[Any, str], Any]], Any]


@dataclass(frozen=True)
class Graphs:
    """The pipelines: for KFP's local runner, for a cluster, and the release alone for a cluster."""

    local: Callable[[Settings], Any]
    on_cluster: Graph
    release: Graph


graphs: Graphs | None = None
"""Those of `pipeline.py`, which sets them before any command runs."""


def write_specification(profile: str, overrides: Sequence[str], out: Path, release: bool = False) -> Settings:
    """Compile the pipeline for a cluster into `out`; with `release` the one that releases an approved version.

    Returns the settings it was compiled with. Raises UserError for what cannot work there, for a name that KFP cannot
    write, or a full disk.
    """
    from kfp import compiler

    settings, every = on_cluster(profile, overrides)
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"{out}: a specification is a .yaml file; choose such a name, as in {out.stem}.yaml")
    if not out.parent.is_dir():
        raise UserError(f"cannot write {out}: there is no folder {out.parent}; make it first")
    assert graphs is not None
    build = graphs.release if release else graphs.on_cluster
    with writing(out), tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "whole.yaml"
        compiler.Compiler().compile(build(settings, every, placed(settings)), str(made))
        atomic_write(out, made.read_bytes())
    return settings


@contextmanager
def specification(profile: str, overrides: Sequence[str], release: bool = False) -> Iterator[tuple[Settings, str]]:
    """The settings and the file of a specification that is to run, and gone when the block ends.

    Raises UserError for a profile that still names examples.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{NAME}.yaml"
        settings = write_specification(profile, overrides, file, release)
        refuse_examples(settings)
        yield settings, str(file)


def placed(settings: Settings) -> Callable[[Any, str], Any]:
    """What gives the task of a step its pod."""
    every = pods(settings)
    return lambda task, step: on_pod(task, settings.cluster, every[step])


def on_pod(task: Any, cluster: Cluster, pod: Pod) -> Any:
    """Give a task the image, the volume, and what its pod asks for. KFP never answers it from its own cache: the store
    remembers, and notices when a result is gone or the code is another."""
    from kfp import kubernetes

    task.set_container_image(cluster.image).set_caching_options(False)
    task.set_cpu_request(pod.cpu).set_cpu_limit(pod.cpu).set_memory_request(pod.memory).set_memory_limit(pod.memory)
    if pod.gpus:
        task.set_accelerator_type(pod.accelerator).set_accelerator_limit(pod.gpus)
    if pod.retries and pod.backoff:
        task.set_retry(pod.retries, f"{seconds_of(pod.backoff.first)}s", pod.backoff.factor, f"{_ATTEMPTS_END_S}s")
    if pod.timeout:
        kubernetes.set_timeout(task, seconds_of(pod.timeout))
    if cluster.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, cluster.image_pull_secrets)
    for name, size, path, medium in (
        ("dshm", pod.shared_memory, "/dev/shm", "Memory"),
        ("tmp", pod.ephemeral_storage, "/tmp", None),
    ):
        if size:
            kubernetes.empty_dir_mount(task, volume_name=name, mount_path=path, medium=medium, size_limit=size)
    kubernetes.mount_pvc(task, pvc_name=cluster.workspace_claim, mount_path=cluster.mount)
    for toleration in pod.tolerations or ():
        kubernetes.add_toleration(task, **toleration.model_dump())
    for label, value in (pod.node_selector or {}).items():
        kubernetes.add_node_selector(task, label, value)
    for label, value in cluster.labels.items():
        kubernetes.add_pod_label(task, label, value)
    for annotation, value in cluster.annotations.items():
        kubernetes.add_pod_annotation(task, annotation, value)
    return with_variables(task, pod)


def with_variables(task: Any, pod: Pod) -> Any:
    """Give a task its environment: plain values, those of Secrets and ConfigMaps, and the run it belongs to."""
    from kfp import kubernetes

    for variable, value in (pod.env or {}).items():
        task.set_env_variable(variable, value)
    for name, given in (pod.secrets or {}).items():
        kubernetes.use_secret_as_env(task, name, given.env, given.optional)
    for name, given in (pod.config_maps or {}).items():
        kubernetes.use_config_map_as_env(task, name, given.env, given.optional)
    return kubernetes.use_field_path_as_env(task, CLUSTER_RUN, "metadata.labels['pipeline/runid']")
