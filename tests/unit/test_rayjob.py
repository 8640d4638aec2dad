"""The RayJob of a step, made of settings alone; and its launcher against a stand-in of Kubernetes' API."""

import itertools
import json
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from facemllm.cli.main import app
from facemllm.core import digests
from facemllm.core.kubernetes import connect
from facemllm.core.store import Store
from facemllm.errors import UserError
from facemllm.settings import Settings, load
from facemllm.tables import open_table
from facemllm.workflow import artifacts, launcher, runner
from facemllm.workflow.pods import on_cluster, pods, workers_of
from facemllm.workflow.rayjob import Job, overrides, render
from tests.kubernetes_server import Cluster, serving
from tests.unit.test_k8s import documents, put, rule_faults, schema_faults

KEY = "0123456789ab" + "cd" * 26
JOB = Job("instruct", KEY, {"conversations": "ee" * 32, "model": "ff" * 32}, "aa" * 32, "run-7", "parent-7")
NAME = "train-instruct-0123456789ab"
ANNOTATION = Job("annotate", KEY, {"faces": "ee" * 32}, "aa" * 32)
SPEC = "spec.rayClusterSpec"
WORKER = f"{SPEC}.workerGroupSpecs.0.template.spec"


def chosen(profile: str = "small", *over: str) -> Settings:
    return on_cluster(profile, ["train.launcher=rayjob", *over])[0]


def annotating(profile: str = "paper-7b", *over: str) -> Settings:
    return on_cluster(profile, ["annotate.launcher=rayjob", *over])[0]


def at(body: Any, path: str) -> Any:
    for part in path.split("."):
        body = body[int(part)] if part.isdigit() else body[part]
    return body


def variables(container: dict[str, Any]) -> dict[str, Any]:
    return {one["name"]: one.get("value") or one["valueFrom"] for one in container["env"]}


SAID: dict[str, tuple[str, str, Any]] = {
    "image": ("cluster.image=r.example/x@sha256:" + "ab" * 32, f"{WORKER}.containers.0.image", None),
    "pull secret": ("cluster.image_pull_secrets=[registry]", f"{WORKER}.imagePullSecrets", [{"name": "registry"}]),
    "claim": ("cluster.workspace_claim=own", f"{WORKER}.volumes.2.persistentVolumeClaim", {"claimName": "own"}),
    "account": ("cluster.ray_account=cloud", f"{WORKER}.serviceAccountName", "cloud"),
    "memory": ("cluster.steps.train.memory=99Gi", f"{WORKER}.containers.0.resources.limits.memory", "99Gi"),
    "GPUs": ("cluster.steps.instruct.gpus=4", f"{WORKER}.containers.0.resources.limits.nvidia~com/gpu", "4"),
    "shared memory": ("cluster.steps.train.shared_memory=7Gi", f"{WORKER}.volumes.1.emptyDir.sizeLimit", "7Gi"),
    "room in /tmp": ("cluster.steps.train.ephemeral_storage=9Gi", f"{WORKER}.volumes.0.emptyDir.sizeLimit", "9Gi"),
    "node": ("cluster.steps.instruct.node_selector={gpu: h100}", f"{WORKER}.nodeSelector", {"gpu": "h100"}),
    "toleration": ("cluster.steps.train.tolerations=[{key: pool}]", f"{WORKER}.tolerations.0.key", "pool"),
    "head": ("cluster.steps.ray_head.memory=33Gi", f"{SPEC}.headGroupSpec.template.spec.containers.0.resources", None),
    "time-out": ("cluster.steps.instruct.timeout=3h", "spec.activeDeadlineSeconds", 10800),
    "start": ("cluster.start_within=20m", "spec.preRunningDeadlineSeconds", 1200),
    "queue": ("cluster.queue=gpus", "metadata.labels.kueue~x-k8s~io/queue-name", "gpus"),
    "label": ("cluster.labels.team=faces", f"{SPEC}.headGroupSpec.template.metadata.labels.team", "faces"),
    "workers": ("train.workers=3", f"{SPEC}.workerGroupSpecs.0.replicas", 3),
}


@pytest.mark.parametrize(("override", "path", "value"), SAID.values(), ids=SAID)
def test_every_field_comes_of_a_setting(override: str, path: str, value: Any) -> None:
    made = render(chosen("small", override), JOB)
    assert schema_faults(made) + rule_faults(made) == []
    parts = [part.replace("~", ".") for part in path.split(".")]
    found: Any = made
    for part in parts:
        found = found[int(part)] if part.isdigit() else found[part]
    assert value in (None, found)
    plain: Any = render(chosen("small"), JOB)
    for part in parts:
        plain = plain[int(part)] if part.isdigit() else plain.get(part, {})
    assert plain != found


def test_it_is_of_one_piece_of_work_and_says_which() -> None:
    made = render(chosen(), JOB)
    metadata = made["metadata"]
    assert (metadata["name"], metadata["annotations"]["facemllm.key"]) == (NAME, KEY)
    labels = {"facemllm.run": "run-7", "facemllm.key": KEY[:12], "facemllm.package": "a" * 12}
    templates = [
        at(made, f"{SPEC}.headGroupSpec.template"),
        at(made, f"{SPEC}.workerGroupSpecs.0.template"),
        at(made, "spec.submitterPodTemplate"),
    ]
    for one in (metadata, *(template["metadata"] for template in templates)):
        assert labels.items() <= one["labels"].items()
        assert one["labels"]["sidecar.istio.io/inject"] == "false"
        assert one["labels"]["app.kubernetes.io/component"] == "training", "what the network policy selects"
    spec = made["spec"]
    assert "suspend" not in spec
    assert (spec["shutdownAfterJobFinishes"], spec["rayClusterSpec"]["authOptions"]) == (True, {"mode": "token"})
    head, worker, submitter = (template["spec"]["containers"][0] for template in templates)
    assert variables(head)["FACEMLLM_PARENT_RUN"] == "parent-7"
    token = {"secretKeyRef": {"name": "face-mllm-hub", "key": "token", "optional": True}}
    assert variables(head)["HF_TOKEN"] == variables(worker)["HF_TOKEN"] == token
    assert set(variables(submitter)) == {"RAY_USAGE_STATS_ENABLED"}
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert len({Job("align" * 9, key, {}, "").name for key in ("a" * 64, "b" * 64)}) == 2
    assert len(Job("a_very_long_name_of_a_stage_indeed", KEY, {}, "").name) <= 47


def test_annotation_is_a_job_of_sizes_of_its_own() -> None:
    settings = annotating("paper-7b", "annotate.concurrency=40", "cluster.steps.annotate.timeout=3d")
    made = render(settings, ANNOTATION)
    assert schema_faults(made) + rule_faults(made) == []
    assert (made["metadata"]["name"], made["spec"]["activeDeadlineSeconds"]) == ("annotate-0123456789ab", 3 * 86400)
    (group,) = at(made, f"{SPEC}.workerGroupSpecs")
    limits = at(group, "template.spec.containers.0.resources.limits")
    assert (group["replicas"], limits["cpu"], limits["memory"]) == (3, "16", "64Gi"), "forty tasks, one a core"
    assert "nvidia.com/gpu" not in limits
    tasks = pods(settings)
    assert (tasks["annotate"].cpu, tasks["annotate"].gpus, tasks["align"].gpus) == ("200m", 0, 8)
    assert pods(chosen("paper-7b"))["annotate"].cpu == "16", "the other launcher"
    assert pods(annotating("laptop", "version.restore=" + "ab" * 20))["annotate"].cpu == "2", (
        "nothing is annotated then"
    )


def test_a_local_annotator_has_a_gpu_a_task() -> None:
    model = ["annotate.annotator=local", "annotate.vision_language.model=some/vlm", "annotate.concurrency=6"]
    settings = annotating("paper-7b", *model, "cluster.steps.annotate.gpus=4")
    assert workers_of(settings, "annotate") == (2, 4)
    worker = at(render(settings, ANNOTATION), f"{WORKER}.containers.0")
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert "HF_TOKEN" in variables(worker)
    assert workers_of(annotating("laptop", *model), "annotate") == (3, 2), "one a core, where there is no GPU"


@pytest.mark.parametrize("job", [JOB, ANNOTATION], ids=["training", "annotation"])
def test_its_command_gives_the_settings_of_the_pipeline(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = ["train.storage=s3://faces/runs", "train.stages.instruct.learning_rate=1.0e-5", "cluster.queue=gpus"]
    both = [*odd, "annotate.launcher=rayjob", """promote.thresholds."attributes.Bangs".min=0.5"""]
    settings = chosen("small", *both)
    words = shlex.split(render(settings, job)["spec"]["entrypoint"])
    asked: dict[str, Any] = {}

    def executed(settings: Settings, name: str, **given: str) -> str:
        asked.update(settings=settings, name=name, **given)
        return "99" * 32

    monkeypatch.setattr("facemllm.cli.main._executed", executed)
    monkeypatch.setattr(digests, "of_package", lambda: JOB.package)
    done = CliRunner().invoke(app, words[1:], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    got = asked.pop("settings")
    assert (got.annotate.launcher, got.train.launcher) == ("here", "here")
    assert asked == {"name": job.step, **job.inputs}
    assert got.model_copy(update={"annotate": settings.annotate, "train": settings.train}) == settings
    monkeypatch.setattr(digests, "of_package", lambda: "bb" * 32)
    refused = CliRunner().invoke(app, words[1:])
    assert isinstance(refused.exception, UserError)
    assert "holds other code (package bbbbbbbbbbbb) than that which asks for the work (aaaaaaaaaaaa)" in str(
        refused.exception
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["gate"], "step gate: the steps that can be done alone are annotate, align, instruct, specialize"),
        (["annotate", "--input", "model=" + "ab" * 32], "--input model: annotate takes faces"),
    ],
)
def test_a_step_that_cannot_be_done_alone_is_refused(words: list[str], says: str) -> None:
    refused = CliRunner().invoke(app, ["step", *words])
    assert isinstance(refused.exception, UserError)
    assert str(refused.exception) == says


NASTY = ["$HOME", "`id`", "a;b&c|d", 'say "x"', "back\\slash\\", "it's", "*", "[a]", "", "ü", "a\nb", '\\"', "{a,b}"]


def test_settings_come_whole_through_the_shells_of_kuberay_and_ray() -> None:
    over = [f"cluster.steps.train.env={json.dumps({f'V{n}': one for n, one in enumerate(NASTY)})}"]
    command = render(chosen("small", *over), JOB)["spec"]["entrypoint"]
    words = shlex.split(command)  # as bash does in KubeRay's submitter
    printed = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))", *words]
    done = subprocess.run(subprocess.list2cmdline(printed), shell=True, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == words
    sets = [value for key, value in itertools.pairwise(words) if key == "--set"]
    assert list((load("small", sets).cluster.pod("train").env or {}).values())[-len(NASTY) :] == NASTY


def test_settings_that_no_command_can_say_are_refused() -> None:
    settings = load("small")
    fewer = {name: one for name, one in settings.cluster.steps.items() if name != "annotate"}
    with pytest.raises(UserError, match="cannot be handed to a RayJob by --set"):
        overrides(settings.model_copy(update={"cluster": settings.cluster.model_copy(update={"steps": fewer})}))


BROKEN: dict[str, tuple[str, Any]] = {
    "misspelt": ("spec.entrypont", "facemllm"),
    "root": (f"{WORKER}.securityContext.runAsUser", 0),
    "no limits": (f"{WORKER}.containers.0.resources.limits", None),
    "writable": (f"{SPEC}.headGroupSpec.template.spec.containers.0.securityContext.readOnlyRootFilesystem", False),
    "replicas in words": (f"{SPEC}.workerGroupSpecs.0.replicas", "2"),
    "a number for Ray": (f"{SPEC}.headGroupSpec.rayStartParams.num-cpus", 0),
}


@pytest.mark.parametrize(("path", "value"), BROKEN.values(), ids=BROKEN)
def test_a_broken_copy_is_noticed(path: str, value: Any) -> None:
    made = json.loads(json.dumps(render(chosen(), JOB)))
    put(made, path, value)
    assert schema_faults(made) + rule_faults(made)


def test_workers_are_spread_over_pods() -> None:
    seven = ["train.workers=16", "cluster.steps.train.gpus=8"]
    assert workers_of(chosen("paper-7b", *seven), "align") == (2, 8)
    assert workers_of(chosen("paper-7b", "train.workers=9"), "align") == (2, 8)
    assert workers_of(chosen("laptop", "train.workers=4"), "align") == (2, 2), "one a core"
    pod = pods(chosen("paper-7b", *seven))["instruct"]
    assert (pod.cpu, pod.memory, pod.gpus, pod.retries, pod.tolerations) == ("200m", "512Mi", 0, 3, [])


REFUSED = {
    "a head too small": ("paper-7b", ["cluster.steps.ray_head.memory=16Gi"], r"step ray_head: .*memory: 16Gi less"),
    "no core": ("laptop", ["cluster.steps.train.cpu=500m"], r"step align: .*cpu: 500m, and each worker"),
    "no core for annotation": (
        "laptop",
        ["annotate.launcher=rayjob", "cluster.steps.annotate.cpu=500m"],
        r"step annotate: cluster.steps.annotate.cpu: 500m, and each worker",
    ),
    "an endpoint": (
        "laptop",
        [
            *("annotate.launcher=rayjob", "annotate.annotator=endpoint", "annotate.vision_language.model=m"),
            "annotate.endpoint.base_url=http://127.0.0.1:8000/v1",
        ],
        r"annotate: .*launcher: rayjob spreads tasks over machines, .*; set launcher: here",
    ),
    "no GPU": ("paper-7b", ["cluster.steps.train.gpus=0"], r"step align: .*gpus: 0, and train.use_gpu is true"),
    "workers too small": ("paper-7b", ["cluster.steps.train.memory=128Gi"], r"step align: .*128Gi less 64Gi"),
}


@pytest.mark.parametrize(("profile", "over", "says"), REFUSED.values(), ids=REFUSED)
def test_pods_that_cannot_work_are_refused(profile: str, over: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        chosen(profile, *over)


# --- the launcher


class KubeRay:
    """What a test has happen to a RayJob. `states` are given it one after the other, each when it is looked at."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.states, self.made = cluster, list[dict[str, Any]](), 0
        cluster.on("RayJob", self.react)

    def react(self, what: str, body: dict[str, Any]) -> None:
        if what == "ADDED":
            self.made += 1
            self.step(body["metadata"]["name"])

    def step(self, name: str = NAME) -> None:
        if self.states:
            threading.Timer(0.01, self._set, [name, self.states.pop(0)]).start()

    def _set(self, name: str, state: dict[str, Any]) -> None:
        if state.get("gone"):
            self.cluster.remove("RayJob", name)
        else:
            self.cluster.set_status("RayJob", name, **state)
        self.step(name)


def state(deployment: str, job: str = "", ready: int = 0, **more: Any) -> dict[str, Any]:
    workers = {"rayClusterStatus": {"readyWorkerReplicas": ready, "desiredWorkerReplicas": 1}}
    return {"jobDeploymentStatus": deployment, "jobStatus": job, **workers, **more}


STARTING, RUNNING = state("Initializing"), state("Running", "RUNNING", 1)
GOOD, BAD = state("Complete", "SUCCEEDED"), state("Failed", "FAILED", reason="AppFailed", message="exit code 1")


@pytest.fixture
def cluster() -> Cluster:
    return Cluster(roles=documents("base"), faults=schema_faults)


@pytest.fixture
def kuberay(cluster: Cluster) -> KubeRay:
    return KubeRay(cluster)


@pytest.fixture
def launch(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`launch(made=...)`: launch the job as the account `trainer`. A clock of its own moves on by what is waited, and
    by `each` seconds a look, which `tick` is told."""
    with serving(cluster) as address:

        def run(
            *over: str,
            made: Callable[[], bool] = lambda: True,
            each: float = 0,
            tick: Callable[[float], object] = lambda now: None,
            token: str = "trainer",
        ) -> None:
            cluster.kubeconfig(tmp_path / "kubeconfig", address, token)
            monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
            api, now = connect(), [0.0]

            def clock() -> float:
                now[0] += each
                tick(now[0])
                return now[0]

            api.clock, api.sleep = clock, lambda seconds: now.__setitem__(0, now[0] + seconds)
            if each:
                watch = api.watch
                api.watch = lambda kind, name, tick_s=30: watch(kind, name, 0)  # type: ignore[method-assign]
            launcher.launch(chosen("small", *over), JOB, made, api)

        yield run


def test_it_makes_the_job_and_tells_how_it_goes(launch: Any, cluster: Cluster, kuberay: KubeRay, capsys: Any) -> None:
    kuberay.states = [STARTING, RUNNING, GOOD]
    launch()
    body = cluster.get("RayJob", NAME)
    assert body is not None
    assert {k: body[k] for k in ("apiVersion", "spec")}.items() <= render(chosen(), JOB).items()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"RayJob {NAME} made in namespace face-mllm"
    assert lines[-3:] == [
        f"RayJob {NAME}: Initializing, 0 of 1 worker pods ready",
        f"RayJob {NAME}: Running, running, 1 of 1 worker pods ready",
        f"RayJob {NAME}: Complete, succeeded",
    ]


@pytest.mark.parametrize(("there", "after"), [(RUNNING, [GOOD]), (GOOD, []), (STARTING, [RUNNING, GOOD])])
def test_a_job_of_the_same_work_is_adopted(
    launch: Any, cluster: Cluster, kuberay: KubeRay, there: dict[str, Any], after: list[dict[str, Any]]
) -> None:
    cluster.put(render(chosen(), JOB) | {"status": there})
    kuberay.states = after
    kuberay.step()
    launch()
    assert kuberay.made == 1
    assert not [one for one in cluster.asked if one.verb == "delete"]


@pytest.mark.parametrize("ended", [BAD, GOOD], ids=["failed", "its result is gone"])
def test_one_that_ended_without_a_result_is_made_anew(
    launch: Any, cluster: Cluster, kuberay: KubeRay, ended: dict[str, Any]
) -> None:
    cluster.put(render(chosen(), JOB) | {"status": ended})
    kuberay.states = [RUNNING, GOOD]
    launch(made=lambda: kuberay.made == 2)
    assert [one.verb for one in cluster.asked if one.verb in ("create", "delete")] == ["create", "delete", "create"]


def test_one_of_other_work_is_left_alone(launch: Any, cluster: Cluster) -> None:
    other = render(chosen(), JOB)
    other["metadata"]["annotations"]["facemllm.key"] = KEY[:12] + "00" * 26
    cluster.put(other)
    with pytest.raises(UserError, match=f"RayJob {NAME} does other work .*: kubectl -n face-mllm delete rayjob {NAME}"):
        launch()
    assert cluster.get("RayJob", NAME) is not None


def pod(cluster: Cluster, part: str, **status: Any) -> None:
    labels = {"facemllm.key": KEY[:12], "facemllm.part": part}
    cluster.put(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"{NAME}-{part}", "labels": labels},
            "spec": {},
            "status": status,
        }
    )


def test_one_that_is_being_deleted_is_waited_for(launch: Any, cluster: Cluster, kuberay: KubeRay) -> None:
    going = render(chosen(), JOB)
    going["metadata"]["deletionTimestamp"] = "2026-11-29T12:00:00Z"
    cluster.put(going | {"status": RUNNING})
    kuberay.states = [GOOD]
    threading.Timer(0.3, cluster.remove, ["RayJob", NAME]).start()
    launch()
    assert kuberay.made == 2


@pytest.mark.parametrize("end", [BAD, {"gone": True}], ids=["failed", "gone"])
def test_a_result_counts_whatever_becomes_of_the_job(launch: Any, kuberay: KubeRay, end: dict[str, Any]) -> None:
    kuberay.states = [RUNNING, end]
    launch()


def test_of_a_failure_it_gives_the_error_and_the_last_lines(
    launch: Any, cluster: Cluster, kuberay: KubeRay, capsys: Any
) -> None:
    for part in ("head", "submitter"):
        pod(cluster, part)
    lines = [f"line {n}" for n in range(40)]
    cluster.logs = {
        f"{NAME}-head": "of the head\n",
        f"{NAME}-submitter": "\n".join([*lines, "error: the loss rose to 21 times its best", "Job failed"]),
    }
    kuberay.states = [RUNNING, BAD]
    with pytest.raises(UserError, match=f"^RayJob {NAME} failed: the loss rose to 21 times its best$"):
        launch(made=lambda: False)
    output = capsys.readouterr().err
    assert f"last lines of {NAME}-submitter:\nline 22\n" in output
    assert "line 21\n" not in output
    assert "of the head" not in output


def test_of_a_failure_without_a_log_it_gives_kuberays_word(launch: Any, kuberay: KubeRay) -> None:
    kuberay.states = [BAD | {"reason": "DeadlineExceeded", "message": "active longer than 43200 s"}]
    with pytest.raises(UserError, match="failed: DeadlineExceeded: active longer than 43200 s"):
        launch(made=lambda: False)


def test_a_job_that_is_lost_is_one_line(launch: Any, kuberay: KubeRay) -> None:
    kuberay.states = [RUNNING, {"gone": True}]
    with pytest.raises(UserError, match=f"RayJob {NAME} is gone: somebody has deleted it; run again"):
        launch(made=lambda: False)


def test_an_image_that_is_not_found_ends_it(launch: Any, cluster: Cluster, kuberay: KubeRay) -> None:
    waiting = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "face-mllm:0.1.0"'}
    pod(cluster, "worker", containerStatuses=[{"state": {"waiting": waiting}}])
    kuberay.states = [STARTING]
    with pytest.raises(UserError, match=f"stopped: pod {NAME}-worker: ImagePullBackOff: Back-off pulling image"):
        launch(each=20)
    assert cluster.get("RayJob", NAME) is None


def test_workers_for_which_there_is_no_room_are_waited_for_as_long_as_is_said(
    launch: Any, cluster: Cluster, kuberay: KubeRay
) -> None:
    said = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "8 Insufficient gpu"}
    pod(cluster, "worker", conditions=[said])
    kuberay.states = [STARTING]
    with pytest.raises(UserError, match=r"not ready within 600 s \(cluster.start_within\): .*8 Insufficient gpu"):
        launch("cluster.start_within=10m", each=40)
    assert cluster.get("RayJob", NAME) is None


def test_a_queue_is_waited_for_without_end(launch: Any, cluster: Cluster) -> None:
    cluster.put(render(chosen(), JOB) | {"status": state("Suspended")})
    cluster.put({"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "LocalQueue", "metadata": {"name": "gpus"}})

    def tick(now: float) -> None:
        if now > 5000:
            cluster.set_status("RayJob", NAME, **GOOD)

    launch("cluster.queue=gpus", "cluster.start_within=1m", each=100, tick=tick)


def test_a_queue_that_is_not_there_is_one_line(launch: Any, cluster: Cluster) -> None:
    with pytest.raises(UserError, match=r"namespace face-mllm has no queue gpsu: correct cluster\.queue"):
        launch("cluster.queue=gpsu")
    del cluster.kinds["kueue.x-k8s.io", "localqueues"]
    with pytest.raises(UserError, match=r"has no kueue.x-k8s.io/v1beta1 LocalQueue \(404\); install Kueue"):
        launch("cluster.queue=gpus")


def test_the_quota_and_a_missing_operator_are_one_line(launch: Any, cluster: Cluster) -> None:
    cluster.quota = "gpus, requested: requests.nvidia.com/gpu=1, used: 8, limited: 8"
    with pytest.raises(UserError, match=r"no room in namespace face-mllm \(403\): .*exceeded quota: gpus"):
        launch()
    del cluster.kinds["ray.io", "rayjobs"]
    with pytest.raises(UserError, match=r"has no ray.io/v1 RayJob \(404\); install KubeRay"):
        launch()


def test_another_account_may_not(launch: Any) -> None:
    with pytest.raises(UserError, match=r'"system:serviceaccount:face-mllm:pipeline-runner" cannot create .*rayjobs'):
        launch(token="pipeline-runner")


@pytest.mark.parametrize("trouble", ["busy", "away", "gone"])
def test_an_api_that_is_away_meanwhile_changes_nothing(
    launch: Any, cluster: Cluster, kuberay: KubeRay, trouble: str
) -> None:
    kuberay.states = [RUNNING, GOOD]
    setattr(cluster, trouble, 3)
    launch()
    assert kuberay.made == 1


def test_the_store_has_the_last_word(launch: Any, kuberay: KubeRay) -> None:
    kuberay.states = [GOOD]
    with pytest.raises(UserError, match=r"ended well, but the store has no result 0123456789ab: do its pods mount"):
        launch(made=lambda: False)


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("step", ["align", "annotate"])
def test_the_record_of_the_store_is_the_result_and_its_bytes_are_read(
    step: str, changed: bool, faces_table: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launchers = ["annotate.launcher=rayjob", "train.launcher=rayjob"]
    settings = load("ci", [f"storage.home={tmp_path / 'home'}", *launchers])
    if step == "annotate":
        made_there, file, given = faces_table(), "part-00000.parquet", {"faces": "ee" * 32}
        digest = open_table(made_there).digest
    else:
        made_there, file, given = tmp_path / "model", "weights", {"conversations": "ee" * 32}
        made_there.mkdir()
        (made_there / file).write_text("of the job")
        digest = digests.of_tree(made_there)
    asked: list[Job] = []

    def work(settings: Settings, job: Job, made: Callable[[], bool]) -> None:
        asked.append(job)
        assert not made()
        facts = {"step": job.step, "output": digest, "figure": "", "seconds": 1.0}
        Store(settings.home).keep(job.key, made_there, digest, facts)
        if changed:
            (settings.home / "store" / digest / file).write_text("of another")
        assert made()

    monkeypatch.setattr(launcher, "launch", work)
    monkeypatch.delenv("FACEMLLM_RUN", raising=False)
    if changed:
        with pytest.raises(UserError, match=rf"the bytes that RayJob (train-)?{step}-.* are not those of its record"):
            runner.execute(step, settings, **given)
    else:
        assert runner.execute(step, settings, **given) == digest
        assert runner.execute(step, settings, **given) == digest
    (job,) = asked
    assert (job.step, job.inputs, job.package) == (step, given, digests.of_package())


def test_the_end_of_a_cancelled_run_deletes_what_it_left(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name, run, status in (("a", "run-7", RUNNING), ("b", "run-7", BAD), ("c", "run-8", RUNNING)):
        body = render(chosen(), Job(name, KEY, {}, "aa" * 32, run))
        cluster.put(body | {"status": status})
    with serving(cluster) as address:
        cluster.kubeconfig(tmp_path / "kubeconfig", address, "trainer")
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        artifacts._remove_jobs(chosen(), "run-7")
        assert [one[2].split("-")[1] for one in cluster.objects if one[0] == "rayjobs"] == ["b", "c"]
        assert "deleted what the run left: RayJob train-a-0123456789ab" in capsys.readouterr().err
        cluster.kubeconfig(tmp_path / "kubeconfig", address, "pipeline-runner")
        artifacts._remove_jobs(chosen(), "run-7")
        assert "RayJobs of this run may be left: " in capsys.readouterr().err
