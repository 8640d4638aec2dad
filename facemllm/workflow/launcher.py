"""The launcher of a RayJob: makes it or adopts it, tells how it goes, and waits for its end.

Killed, it leaves the job; started again, it finds the job by its name, which comes of the work's key.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from facemllm.core import kubernetes, progress
from facemllm.core.kubernetes import LOCAL_QUEUE, POD, RAY_JOB, Api, ApiError, Object
from facemllm.errors import UserError, one_line
from facemllm.settings import Settings
from facemllm.settings.kubernetes import seconds_of
from facemllm.workflow.rayjob import KEY, PART, RUN, Job, render

_ENDED = ("Complete", "Failed", "ValidationFailed")
_PENDING = ("", "New", "Initializing", "Waiting")
_STUCK = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError")
_STUCK_S = 120.0  # after which a pod that cannot start never will
_GRACE_S = 120.0  # that KubeRay is left to keep a deadline by itself, or to delete
_SHOWN_S = 60.0  # in which a result on a shared volume can be seen everywhere


def launch(settings: Settings, job: Job, made: Callable[[], bool], api: Api | None = None) -> None:
    """Have a RayJob do a step's work; `made` says whether the store holds the result by now.

    Raises UserError, in one line, when the job cannot be made or fails, is lost, or leaves no result.
    """
    api = api or kubernetes.connect()
    body = render(settings, job)
    if (queue := settings.cluster.queue) and api.get(LOCAL_QUEUE, queue) is None:
        raise UserError(f"namespace {api.namespace} has no queue {queue}: correct cluster.queue, or have it made")
    _begin(api, job, body, made)
    _follow(api, job, seconds_of(settings.cluster.start_within), made)
    until = api.clock() + _SHOWN_S
    while not made():
        if api.clock() > until:
            raise UserError(
                f"RayJob {job.name} ended well, but the store has no result {job.key[:12]}: do its pods mount the "
                f"volume {settings.cluster.workspace_claim}, and run the image of this step?"
            )
        api.sleep(1)


def remove(settings: Settings, run: str) -> list[str]:
    """Delete the RayJobs of a pipeline run that have not ended; their names."""
    api = kubernetes.connect()
    names = [_name(one) for one in api.select(RAY_JOB, {RUN: run})[0] if not _ended(one)]
    for name in names:
        api.delete(RAY_JOB, name)
    return names


def _begin(api: Api, job: Job, body: Object, made: Callable[[], bool]) -> None:
    """Create the job, or adopt that of the same work; one that has failed is made anew."""
    while True:
        try:
            api.create(RAY_JOB, body)
            progress.event(note=f"RayJob {job.name} made in namespace {api.namespace}")
            return
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
        found = api.get(RAY_JOB, job.name)
        if found is None:
            continue
        if "deletionTimestamp" in found["metadata"]:
            _until_gone(api, job.name)
            continue
        if found["metadata"].get("annotations", {}).get(KEY) != job.key:
            delete = shlex.join(["kubectl", "-n", api.namespace, "delete", "rayjob", job.name])
            raise UserError(f"RayJob {job.name} does other work than this; once it may go: {delete}")
        if not _ended(found) or made():
            progress.event(note=f"RayJob {job.name} is there already, and is followed: {_state(found)}")
            return
        progress.event(note=f"RayJob {job.name} has ended ({_state(found)}) without a result, and is made anew")
        api.delete(RAY_JOB, job.name)
        _until_gone(api, job.name)


def _until_gone(api: Api, name: str) -> None:
    until = api.clock() + _GRACE_S
    for found in api.watch(RAY_JOB, name, tick_s=5):
        if found is None:
            return
        if api.clock() > until:
            raise UserError(f"RayJob {name} has been deleted and does not go; does KubeRay's operator run?")


def _follow(api: Api, job: Job, start_within: float, made: Callable[[], bool]) -> None:
    """Tell each change until the job has ended. Raises UserError for any end but a good one, unless there is a result:
    a job also counts as failed, or is gone, when that happens to its submitter or its object after the work."""
    last = ""
    pending = stuck = api.clock()  # the last time that no pod was waited for, or that none was beyond hope
    for found in api.watch(RAY_JOB, job.name):
        now = api.clock()
        if found is None:
            if made():
                return
            raise UserError(f"RayJob {job.name} is gone: somebody has deleted it; run again to make it anew")
        trouble, hopeless = "", False
        if _status(found).get("jobDeploymentStatus", "") in _PENDING:
            trouble, hopeless = _trouble(api, job)
        else:
            pending = now
        stuck = stuck if hopeless else now
        said = _state(found) + (f"; {trouble}" if trouble else "")
        if said != last:
            progress.event(note=f"RayJob {job.name}: {said}")
            last = said
        if _ended(found):
            if _succeeded(found) or made():
                return
            raise UserError(f"RayJob {job.name} failed: {_why(api, job, found)}")
        late = now > pending + start_within + _GRACE_S
        if late or now > stuck + _STUCK_S:
            api.delete(RAY_JOB, job.name)
            within = (
                f"its pods were not ready within {start_within:.0f} s (cluster.start_within)" if late else "stopped"
            )
            raise UserError(f"RayJob {job.name}: {within}: {trouble or 'KubeRay has not said why'}")


def _status(job: Object) -> Mapping[str, Any]:
    return job.get("status") or {}


def _name(found: Object) -> str:
    return str(found["metadata"]["name"])


def _ended(job: Object) -> bool:
    return _status(job).get("jobDeploymentStatus") in _ENDED


def _succeeded(job: Object) -> bool:
    return _status(job).get("jobStatus") == "SUCCEEDED"


def _state(job: Object) -> str:
    """How a job is, in words: KubeRay's state of it, Ray's, and of its workers how many are ready."""
    status = _status(job)
    cluster = status.get("rayClusterStatus") or {}
    wanted = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]
    ready = f"{cluster.get('readyWorkerReplicas', 0)} of {wanted} worker pods ready"
    words = [status.get("jobDeploymentStatus") or "waits for KubeRay", status.get("jobStatus", "").lower()]
    return ", ".join([*filter(None, words), *([] if _ended(job) else [ready])])


def _pods(api: Api, job: Job) -> list[Object]:
    """The job's pods, newest first, that of the submitter before all others: it has the command's output."""
    found = api.select(POD, {KEY: job.labels[KEY]})[0]
    newest = sorted(found, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")), reverse=True)
    return sorted(newest, key=lambda pod: pod["metadata"]["labels"].get(PART) != "submitter")


def _trouble(api: Api, job: Job) -> tuple[str, bool]:
    """Why a pod of the job does not start, and whether only a person can mend it; nothing while all goes well."""
    for pod in _pods(api, job):
        status = pod.get("status") or {}
        for container in status.get("containerStatuses") or ():
            waiting = (container.get("state") or {}).get("waiting") or {}
            if waiting.get("reason") in _STUCK:
                return f"pod {_name(pod)}: {waiting['reason']}: {_line(waiting.get('message'))}", True
        for one in status.get("conditions") or ():
            if (one.get("type"), one.get("status")) == ("PodScheduled", "False"):
                return f"pod {_name(pod)}: {one.get('reason')}: {_line(one.get('message'))}", False
    return "", False


def _line(text: str | None) -> str:
    return one_line(text or "no message")


def _why(api: Api, job: Job, found: Object) -> str:
    """Why a job has failed: the error line that its command left, else what KubeRay says. The last lines are shown."""
    status = _status(found)
    said = _line(f"{status.get('reason') or status.get('jobStatus') or 'no reason'}: {status.get('message') or ''}")
    for pod in _pods(api, job):
        with suppress(ApiError):
            if lines := api.logs(_name(pod)):
                progress.event(note="\n".join([f"last lines of {_name(pod)}:", *lines]))
                errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
                return errors[-1] if errors else said
    return said
