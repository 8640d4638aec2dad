"""What each step's pod is on a cluster, and what would not work there: found before anything is compiled."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from facemllm.core.objects import path_of
from facemllm.errors import UserError
from facemllm.serve.kserve import rendering
from facemllm.settings import Settings, is_address, load
from facemllm.settings.cluster import LAUNCHER, MODELS, RAY_HEAD, TRAIN, Pod
from facemllm.settings.kubernetes import bytes_of, cores_of
from facemllm.workflow.steps import steps

RELEASE = "release"
"""The step that no first pipeline has: a person decides before it, and no pod waits for one."""
FINISH = "finish"
"""The task that ends a run on a cluster: it writes the run's folder and closes its MLflow run, however it went."""
_MLFLOW = "give the address of MLflow, as http://mlflow:5000"
_ASKING = ("evaluate", "gate")
_SERVING = ("deploy", RELEASE)
"""They start the model server in their own pod where `serve.target` is local."""
_ANNOTATE = "annotate"
_ADDRESSES = ("version.remote", "promote.decisions", "train.storage")
"""Places that may be an address, as well as a folder."""
_BESIDE = 2 * 1024**3  # bytes of a process that has loaded torch, beside the weights


def on_cluster(profile: str, overrides: Sequence[str]) -> tuple[Settings, list[str]]:
    """The settings of a run on a cluster, and the overrides that give them in a pod: `cluster.overrides`, then those
    given; the image, too, which cannot hold a profile with its own digest. Raises UserError as `load` does, and for
    what cannot work on a cluster (`refuse`)."""
    cluster = load(profile, overrides).cluster
    laid = {"cluster.image": cluster.image, **cluster.overrides}
    every = [*(f"{key}={json.dumps(value)}" for key, value in laid.items()), *overrides]
    settings = load(profile, every)
    refuse(settings)
    return settings, every


def loading(settings: Settings) -> list[str]:
    """The steps that load the model into their own pod, or an annotator's: these need what a model needs."""
    annotates = [_ANNOTATE] if settings.annotate.annotator == "local" else []
    serves = _SERVING if settings.serve.target == "local" else ()
    return [*annotates, *settings.stages(), *_ASKING, *serves]


def pods(settings: Settings) -> dict[str, Pod]:
    """The pod of every step's task, and of `finish`, by its name: where a RayJob does the work, its launcher."""
    names = (*steps(settings), FINISH)
    return {n: settings.cluster.pod(LAUNCHER) if launched(settings, n) else working(settings, n) for n in names}


def launched(settings: Settings, step: str) -> bool:
    """Whether a RayJob does the work of a step."""
    if step == _ANNOTATE:
        return settings.annotate.launcher == "rayjob" and settings.version.restore is None
    return settings.train.launcher == "rayjob" and step in settings.stages()


def launches(settings: Settings) -> bool:
    """Whether RayJobs do the work of any step."""
    return any(launched(settings, step) for step in (_ANNOTATE, *settings.stages()))


def working(settings: Settings, step: str) -> Pod:
    """The pod that does the work of a step: of a RayJob, each of its workers'."""
    return settings.cluster.pod(*_groups(settings, step), step)


def ray_head(settings: Settings) -> Pod:
    """The pod of a RayJob's head, which drives and holds no worker."""
    return settings.cluster.pod(MODELS, RAY_HEAD)


def workers_of(settings: Settings, step: str) -> tuple[int, int]:
    """Over how many pods a RayJob spreads `train.workers` or the `annotate.concurrency` tasks, and how many one pod has
    room for: one a GPU or a core."""
    pod, annotates = working(settings, step), step == _ANNOTATE
    workers = settings.annotate.concurrency if annotates else settings.train.workers
    room = (pod.gpus or 0) if _on_gpus(settings, step) else int(cores_of(pod.cpu or "0"))
    each = max(1, min(room, workers))
    return -(-workers // each), each


def _on_gpus(settings: Settings, step: str) -> bool:
    """Whether each worker or task of a step's RayJob takes a GPU."""
    if step == _ANNOTATE:
        return settings.annotate.annotator == "local" and bool(working(settings, step).gpus)
    return settings.train.use_gpu


def _groups(settings: Settings, step: str) -> list[str]:
    return [MODELS] * (step in loading(settings)) + [TRAIN] * (step in settings.stages())


def weights(settings: Settings, step: str) -> int:
    """Bytes of weights that a step holds in the memory of its pod while it loads the model.

    Each worker of a training stage loads all of it in 32 bits, as the model server does and the head of a RayJob, which
    asks the model a few questions; evaluation in 16 on a GPU.
    """
    if step not in (*loading(settings), RAY_HEAD) or step == _ANNOTATE:
        return 0
    wide = 2 if settings.train.use_gpu and step in ("evaluate", "gate") else 4
    copies = 1
    if step in settings.stages():
        copies = workers_of(settings, step)[1] if launched(settings, step) else settings.train.workers
    return int((settings.cluster.parameters or 0) * wide * copies)


@dataclass(frozen=True)
class Fault:
    """What would not work: of which step (empty: of all), which key says so, why, and what to do."""

    step: str
    key: str
    problem: str
    mend: str

    def line(self, profile: str) -> str:
        """The fault as a user reads it."""
        return f"profile {profile}{f', step {self.step}' if self.step else ''}: {self.key}: {self.problem}; {self.mend}"


def refuse(settings: Settings) -> None:
    """Raises UserError for the first thing that would not work on a cluster, and says how many more there are."""
    kinds = (_of_places, _of_addresses, _of_people, _of_pods, _of_serving)
    if found := [fault for kind in kinds for fault in kind(settings)]:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UserError(f"{found[0].line(settings.profile)}{more}")


def _of_places(settings: Settings) -> Iterator[Fault]:
    """Folders that no pod has, or may not write."""
    mount = settings.cluster.mount
    places = {"storage.home": settings.storage.home, "storage.runs": settings.storage.runs}
    places |= {f"ingest.sources.{n}.root": one.root or "" for n, one in enumerate(settings.ingest.sources)}
    places |= {f"ingest.links.{n}": link for n, link in enumerate(settings.ingest.links)}
    places |= {"version.repository": settings.version.repository or "", "version.remote": settings.version.remote or ""}
    places |= {"promote.policy": settings.promote.policy or "", "promote.decisions": settings.promote.decisions or ""}
    places |= {"train.storage": settings.train.storage or "", "ingest.ledger": settings.ingest.ledger or ""}
    places |= {"annotate.experts.models": settings.annotate.experts.models or ""}
    try:
        path_of(settings.version.remote or "", "version.remote")
    except UserError:
        remote = f"{settings.version.remote} is no place that the image can reach"
        yield Fault("", "version.remote", remote, "give s3://bucket/prefix")
    for key, place in places.items():
        if not place or (key in _ADDRESSES and is_address(place)):
            continue
        setting = re.sub(r"\.[0-9]+.*", "", key)
        path, mend = PurePosixPath(place), f"put it below {mount}, and say so in cluster.overrides.{setting}"
        if not path.is_absolute():
            yield Fault("", key, f"{place} is relative, so it lies in the image, where nothing is kept", mend)
        elif ".." in path.parts or not path.is_relative_to(mount):
            yield Fault("", key, f"{place} lies outside the volume, which is mounted at {mount}", mend)
    if settings.tracking.uri is None:
        local = "null is a server of one pod's own, which ends with it"
        yield Fault("", "tracking.uri", local, _MLFLOW)
    elif not _is_server(settings.tracking.uri):
        yield Fault("", "tracking.uri", f"{settings.tracking.uri!r} is no address of a server", _MLFLOW)


def _is_server(uri: str) -> bool:
    try:
        return bool(re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", uri) and urlsplit(uri).port != 0)
    except ValueError:  # no port, or no host
        return False


def _of_addresses(settings: Settings) -> Iterator[Fault]:
    """Addresses under which each pod finds itself, or a file of its image."""
    for key, address in _addresses(settings).items():
        if _of_each_pod(address) and not settings.cluster.one_host:
            mend = "give one that all pods reach; where they share one machine's network, set cluster.one_host=true"
            yield Fault("", key, f"{address} is another place in each pod", mend)


def _addresses(settings: Settings) -> dict[str, str]:
    """The addresses that pods of a run ask, by their settings."""
    serving, serves = settings.cluster.serving, settings.serve.target
    asked = {"tracking.uri": settings.tracking.uri, "promote.decisions": settings.promote.decisions}
    asked["promote.notify.webhook"] = settings.promote.notify.webhook
    if settings.annotate.annotator == "endpoint":
        asked["annotate.endpoint.base_url"] = settings.annotate.endpoint.base_url
    if serves != "local":
        asked["cluster.serving.prometheus"] = serving.prometheus
    if serves == "gitops" and serving.gitops:
        asked["cluster.serving.gitops.repository"] = serving.gitops.repository
    return {key: address for key, address in asked.items() if address and is_address(address)}


def refuse_examples(settings: Settings) -> None:
    """Raises UserError for an address that only stands there to be replaced (RFC 2606): such a profile compiles, and a
    run of it would fail after its training."""
    for key, address in {**_addresses(settings), "cluster.image": settings.cluster.image}.items():
        if re.search(r"(^|[@/.])example\.(com|net|org)([/:]|$)", address):
            raise UserError(f"profile {settings.profile}: {key}: {address} is an example; name yours (docs/cluster.md)")


def _of_each_pod(address: str) -> bool:
    """Whether an address, of a server or as git takes it (`host:path`), is of the machine that asks."""
    try:
        parts = urlsplit(address if "://" in address else f"ssh://{address.replace(':', '/', 1)}")
    except ValueError:  # no address at all
        return False
    host = (parts.hostname or "").rstrip(".")
    try:
        return ip_address(host).is_loopback or ip_address(host).is_unspecified
    except ValueError:
        return parts.scheme == "file" or host == "localhost" or host.endswith(".localhost")


def _of_people(settings: Settings) -> Iterator[Fault]:
    if minutes := settings.promote.wait_minutes:
        held = f"{minutes:g}: no pod waits for a person, and what it holds until then nobody else can use"
        mend = (
            "set 0; the pipeline ends with the request, and `pipeline.py submit --release VERSION` follows the approval"
        )
        yield Fault("await_approval", "promote.wait_minutes", held, mend)


def _of_pods(settings: Settings) -> Iterator[Fault]:
    """Pods that are too small for what runs in them."""
    if settings.cluster.parameters is None and settings.model.preset != "tiny":
        unknown = "null, so nobody knows the memory that the model takes"
        yield Fault("", "cluster.parameters", unknown, "say how many it has, as in 7.06e9")
    needed = [(step, working(settings, step), weights(settings, step)) for step in (*steps(settings), FINISH)]
    if settings.train.launcher == "rayjob":
        needed.append((RAY_HEAD, ray_head(settings), weights(settings, RAY_HEAD)))
    for step, pod, needs in needed:
        key = f"cluster.steps.{_where(settings, step)}"
        shared = bytes_of(pod.shared_memory or "0")
        has = bytes_of(pod.memory or "0") - shared
        if needs and needs + _BESIDE > has:
            held = f"{pod.memory}{f' less {pod.shared_memory} of shared memory' if shared else ''}"
            takes = f"loading the model takes {_gib(needs + _BESIDE)}"
            yield Fault(step, f"{key}.memory", f"{held}, and {takes}", f"give {_gib(needs + _BESIDE + shared)} or more")
        elif shared and shared >= bytes_of(pod.memory or "0"):
            yield Fault(step, f"{key}.shared_memory", f"{pod.shared_memory} is no less than memory", "give less")
        if launched(settings, step) and not _on_gpus(settings, step) and cores_of(pod.cpu or "0") < 1:
            yield Fault(step, f"{key}.cpu", f"{pod.cpu}, and each worker of a RayJob takes one", "give 1 or more")
        if not settings.train.use_gpu or step not in loading(settings):
            continue
        wants = settings.train.workers if step in settings.stages() and not launched(settings, step) else 1
        if not pod.gpus:
            yield Fault(
                step, f"{key}.gpus", "0, and train.use_gpu is true", f"give {wants}, or set train.use_gpu=false"
            )
        elif pod.gpus < wants:
            fewer = f"{pod.gpus}, and train.workers is {wants}, each with a GPU of its own"
            yield Fault(step, f"{key}.gpus", fewer, f"give {wants}, or set train.workers={pod.gpus}")


def _of_serving(settings: Settings) -> Iterator[Fault]:
    """What KServe could not serve."""
    if settings.serve.target == "local":
        return
    try:
        rendering.refuse(settings)
    except UserError as error:
        key, _, rest = str(error).partition(": ")
        problem, _, mend = rest.partition("; ")
        yield Fault(RELEASE, key, problem, mend)
    known = settings.cluster.serving
    needs = int((settings.cluster.parameters or 0) * (2 if settings.serve.device == "cuda" else 4)) + _BESIDE
    has = bytes_of(known.pod.memory or "0") - bytes_of(known.pod.shared_memory or "0")
    if settings.serve.engine.name == "own" and needs > has:
        problem = f"{known.pod.memory}, and loading the model takes {_gib(needs)} beside shared memory"
        yield Fault(RELEASE, "cluster.serving.pod.memory", problem, "give more")


def _where(settings: Settings, step: str) -> str:
    """The narrowest name in `cluster.steps` that speaks of a step: where its sizes are to be mended."""
    named = [name for name in (*_groups(settings, step), step) if name in settings.cluster.steps]
    return named[-1] if named else step


def _gib(size: int) -> str:
    return f"{-(-size // 1024**3)}Gi"
