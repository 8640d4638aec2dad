"""Releases to KServe, against a stand-in of its controller and of Kubernetes' API: states and faults."""

import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from facemllm.core.kubernetes import Api, ApiError, Kind, connect
from facemllm.errors import UserError
from facemllm.serve import deploy
from facemllm.serve.kserve import lease, rendering, service
from facemllm.serve.kserve.split import of_text
from facemllm.serve.kserve.target import KServe
from facemllm.serve.probe import Probe
from facemllm.settings import Settings, load
from facemllm.settings.cluster import Gitops
from facemllm.signing import manifest
from tests.approved import make_model
from tests.kserve_controller import CannotStart, FakeServer
from tests.kserve_controller import KServe as Controller
from tests.kubernetes_server import Cluster, roles, serving
from tests.refusing import refuses

PRODUCTION, STAGING = ("face-mllm-production", "face-mllm"), ("face-mllm", "face-mllm-staging")
HAT = "Is the person wearing a hat?"
QUESTIONS = [Probe(b"", HAT, "no", "no"), *(Probe(b"", f"Is it {n}?", "no", "no") for n in range(4))]
CONFIG = {"data": {"deploy": json.dumps({"defaultDeploymentMode": "Knative"})}}


@dataclass
class World:
    """A cluster with KServe, and models that behave as `kinds` say, by digest."""

    settings: Settings
    cluster: Cluster
    folder: Path
    kinds: dict[str, str] = field(default_factory=dict)
    controller: Controller = field(init=False)

    def __post_init__(self) -> None:
        self.controller = Controller(self.cluster, self.start)

    def start(self, body: dict[str, Any]) -> FakeServer | None:
        digest = body["metadata"]["annotations"][rendering.DIGEST]
        kind = self.kinds[digest]
        if kind == "refused":
            raise CannotStart(f"Container failed with: refused: [missing] model {digest[:12]} may not be served")
        return None if kind == "never" else FakeServer(digest, kind)

    def model(self, kind: str, content: str) -> tuple[Path, str]:
        folder = make_model(self.folder / content, content.encode())
        digest = manifest.of(folder).digest
        self.kinds[digest] = kind
        return folder, digest

    def release(self, model: tuple[Path, str], version: str, put: list[str] | None = None, **more: Any) -> Any:
        given = {"put_back": None if put is None else put.append, "questions": QUESTIONS, **more}
        return deploy.release(self.settings, *model, version, QUESTIONS[0], target=KServe(self.settings), **given)

    def stage(self) -> Any:
        folder = self.folder / "staged"
        model = self.model("equal", "staged") if not folder.exists() else (folder, manifest.of(folder).digest)
        return deploy.deploy(self.settings, *model, "1", QUESTIONS[0])

    def object(self, place: tuple[str, str] = PRODUCTION) -> Any:
        return self.cluster.get("InferenceService", place[1], place[0])

    @property
    def serves(self) -> dict[str, int]:
        """Digest to percent of the requests."""
        found: dict[str, int] = {}
        revisions = self.controller.service(*PRODUCTION).revisions
        for one in self.controller.service(*PRODUCTION).traffic:
            server = revisions[one["revisionName"]].server
            assert isinstance(server, FakeServer)
            found[server.digest] = found.get(server.digest, 0) + one["percent"]
        return {digest: percent for digest, percent in found.items() if percent}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(service, "_TICK_S", 1)
    monkeypatch.setattr(service, "_FALSE_S", 0.0)
    cluster = Cluster()
    cluster.kinds["coordination.k8s.io", "leases"] = ("v1", "Lease")
    for name in (PRODUCTION[0], "kserve"):
        cluster.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    metadata = {"name": "inferenceservice-config", "namespace": "kserve"}
    cluster.put({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, **CONFIG})
    sets = [f"storage.home={tmp_path / 'home'}", f"cluster.serving.models={tmp_path / 'models'}"]
    sets += ["serve.target=kserve", "promote.decisions=https://git.example.com/decisions.git"]
    sets += ["cluster.serving.reach=public", "cluster.serving.poll_s=0.01", "serve.canary.min_requests=5"]
    sets += ["serve.canary.step_seconds=0", "serve.canary.max_p95_ratio=1000"]  # times decide nothing here
    with serving(cluster) as address:
        cluster.kubeconfig(tmp_path / "kubeconfig", address, "admin")
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        made = World(load("laptop", sets), cluster, tmp_path / "folders")
        yield made
        made.controller.close()


def test_a_model_takes_over_step_by_step_and_an_equal_one_is_adopted(world: World) -> None:
    one, two = world.model("equal", "one"), world.model("equal", "two")
    put: list[str] = []
    first = world.release(one, "1", put)
    assert (first.url, first.adopted) == (world.object()["status"]["url"], False)
    assert world.release(one, "1", put).adopted
    world.release(two, "2", put)
    assert world.serves == {two[1]: 100}
    assert world.controller.service(*PRODUCTION).percents == [None, 0, 10, 50, 100]
    assert put == []
    about = world.object()["metadata"]["annotations"]
    assert (about[rendering.DIGEST], about[rendering.VERSION]) == (two[1], "2")
    assert about["serving.kserve.io/deploymentMode"] == "Knative"
    assert KServe(world.settings).serving().digest == two[1]  # type: ignore[union-attr]
    world.release(one, "1", put)  # back to the former one, as any other release
    assert world.serves == {one[1]: 100}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("failing", "requests failed"),
        ("different", "differ from evaluation's"),
        ("refused", r"cannot serve: RevisionFailed: .* refused: \[missing\]"),
    ],
)
def test_a_worse_model_is_put_back_and_the_object_names_the_former_again(world: World, kind: str, said: str) -> None:
    one, worse = world.model("equal", "one"), world.model(kind, "worse")
    put: list[str] = []
    world.release(one, "1", put)
    before = world.object()["spec"]["predictor"]
    message = refuses(rf"{said}(.|\n)*production serves version 1 again", world.release, worse, "2", put)
    assert ("% of the requests it was worse" in message) == (kind != "refused")
    assert world.serves == {one[1]: 100}
    assert len(put) == 1
    found = world.object()
    assert found["spec"]["predictor"] == before | {"canaryTrafficPercent": 100}
    assert found["metadata"]["annotations"][rendering.DIGEST] == one[1]
    assert world.release(one, "1", put).adopted


def test_a_model_that_fails_with_all_requests_is_put_back_by_the_revision_before(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = world.model("equal", "one"), world.model("equal", "two")
    world.release(one, "1", [])
    monkeypatch.setattr(KServe, "keep", lambda self: (_ for _ in ()).throw(UserError("another model answers")))
    refuses("another model answers\nproduction serves version 1 again", world.release, two, "2", [])
    assert world.serves == {one[1]: 100}
    assert world.controller.service(*PRODUCTION).percents[-4:] == [100, 0, 0, 100]


def test_who_answers_has_to_name_the_model(world: World) -> None:
    one = world.model("lying", "one")
    world.settings = limited(world, "2s")
    refuses("was not ready within 2s(.|\n)*production serves nothing now", world.release, one, "1")
    assert world.object() is None


def limited(world: World, seconds: str) -> Settings:
    known = world.settings.cluster
    serving_ = known.serving.model_copy(update={"ready_timeout": seconds})
    return world.settings.model_copy(update={"cluster": known.model_copy(update={"serving": serving_})})


def test_one_that_never_gets_ready_is_one_line_with_the_last_events(world: World) -> None:
    one, never = world.model("equal", "one"), world.model("never", "never")
    world.release(one, "1", [])
    said = {"other": "no matter", "face-mllm-predictor-00002-x": "ImagePullBackOff"}
    for number, (name, what) in enumerate(said.items()):
        about: dict[str, Any] = {"involvedObject": {"name": name}, "reason": "Failed", "message": what}
        about["lastTimestamp"] = f"2026-{number}"
        metadata = {"name": f"e{number}", "namespace": PRODUCTION[0]}
        world.cluster.put({"apiVersion": "v1", "kind": "Event", "metadata": metadata, **about})
    world.settings = limited(world, "2s")
    message = refuses("was not ready within 2s: RevisionMissing", world.release, never, "2", put := [])
    assert "last events: Failed: ImagePullBackOff\nproduction serves version 1 again" in message
    assert len(put) == 1
    assert world.serves == {one[1]: 100}


def test_what_a_killed_release_left_is_gone_on_with_and_can_still_be_put_back(world: World) -> None:
    one, two = world.model("equal", "one"), world.model("equal", "two")
    world.release(one, "1", [])
    killed = KServe(world.settings)
    killed.put(deploy.Deployed(two[0], two[1], "2"), killed.serving())
    killed.split().share(10)
    assert world.serves == {one[1]: 90, two[1]: 10}
    next_ = KServe(world.settings)
    assert (next_.serving().digest, next_.serving().version) == (one[1], "1")  # type: ignore[union-attr]
    world.kinds[two[1]] = "failing"
    put: list[str] = []
    revisions = len(world.controller.service(*PRODUCTION).revisions)
    world.release(two, "2", put)
    assert len(world.controller.service(*PRODUCTION).revisions) == revisions, "the same pod is no new revision"
    assert world.serves == {two[1]: 100}
    three = world.model("failing", "three")
    killed = KServe(world.settings)
    killed.put(deploy.Deployed(three[0], three[1], "3"), killed.serving())
    killed.split().share(50)
    refuses("production serves version 2 again", world.release, three, "3", put)
    assert world.serves == {two[1]: 100}


def test_staging_is_proved_and_ended_where_it_fails(world: World) -> None:
    good, bad = world.model("equal", "good"), world.model("different", "bad")
    endpoint = deploy.deploy(world.settings, *good, "1", QUESTIONS[0])
    assert endpoint.url == world.object(STAGING)["status"]["components"]["predictor"]["traffic"][0]["url"]
    assert world.object(STAGING)["metadata"]["labels"]["networking.knative.dev/visibility"] == "cluster-local"
    other = Probe(b"", "Is it 1?", "no", "no")
    refuses("staging answers otherwise", deploy.deploy, world.settings, *bad, "2", other)
    assert world.object(STAGING) is None
    assert world.object() is None


def patient(asleep: Callable[[Api], object] = lambda api: None) -> Callable[[str], Api]:
    """Connect as somebody for whom waiting takes no time; `asleep` happens at each pause."""

    def connected(namespace: str) -> Api:
        api, now = connect(namespace), [0.0]

        def sleep(seconds: float) -> None:
            now[0] += seconds
            asleep(connect(namespace))

        api.clock, api.sleep = lambda: now[0], sleep
        return api

    return connected


RELEASES = "face-mllm-release"
SPECS: dict[str, dict[str, Any]] = {
    "of the past": {"holderIdentity": "other", "renewTime": "2026-01-01T00:00:00.000000Z"},
    "of a clock ahead": {"holderIdentity": "other", "renewTime": "2996-01-01T00:00:00.000000Z"},
    "without a time": {"holderIdentity": "other"},
}


def lease_of(spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": RELEASES}, "spec": spec}


@pytest.mark.parametrize("spec", [*SPECS.values(), {}], ids=[*SPECS, "of nobody"])
def test_a_dead_holder_is_followed_whatever_its_clock_said(world: World, spec: dict[str, Any]) -> None:
    api = connect(PRODUCTION[0])
    api.create(lease.LEASE, lease_of(spec))
    with KServe(world.settings, patient()).held():
        found = api.get(lease.LEASE, RELEASES)
        assert found is not None
        assert found["spec"]["holderIdentity"] not in ("other", None)
    assert api.get(lease.LEASE, RELEASES) is None


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_of_two_releases_the_second_is_refused_whatever_the_clocks_say(world: World, spec: dict[str, Any]) -> None:
    connect(PRODUCTION[0]).create(lease.LEASE, lease_of(spec))
    renewed = patient(lambda api: api.patch(lease.LEASE, RELEASES, {"spec": {"leaseTransitions": 1}}))
    refuses(r"another release is under way.*\(other\)", KServe(world.settings, renewed).held().__enter__)
    found = connect(PRODUCTION[0]).get(lease.LEASE, RELEASES)
    assert found is not None
    assert found["spec"]["holderIdentity"] == "other"


@pytest.mark.parametrize("left", ["taken", "removed"])
def test_a_release_that_lost_its_lease_changes_nothing_and_records_nothing(world: World, left: str) -> None:
    one, two = world.model("equal", "one"), world.model("equal", "two")
    world.release(one, "1", [])
    api, target, put = connect(PRODUCTION[0]), KServe(world.settings), list[str]()
    given = {"put_back": put.append, "questions": QUESTIONS, "target": target}

    def lose(url: str) -> None:
        if left == "removed":
            api.delete(lease.LEASE, RELEASES)
        else:
            api.patch(lease.LEASE, RELEASES, {"spec": {"holderIdentity": "other"}})

    said = "other took" if left == "taken" else "somebody removed"
    with target.held():
        refuses(said, deploy.release, world.settings, *two, "2", QUESTIONS[0], parity=lose, **given)
        for change in (target.back, target.down, target.keep):
            refuses(said, change)
    assert (world.serves, put) == ({one[1]: 100}, [])
    found = api.get(lease.LEASE, RELEASES)
    assert found is None or found["spec"]["holderIdentity"] == "other", "what another one holds is not removed"


def test_an_api_that_is_away_for_a_while_is_waited_for(world: World) -> None:
    one, two = world.model("equal", "one"), world.model("equal", "two")
    world.release(one, "1", [])
    world.cluster.away = 2
    world.cluster.expire()
    world.release(two, "2", [])
    assert world.serves == {two[1]: 100}


@pytest.mark.parametrize(("default", "word"), [("Serverless", "Serverless"), ("RawDeployment", "Serverless")])
def test_the_mode_has_the_word_of_the_version(world: World, default: str, word: str) -> None:
    metadata = {"name": "inferenceservice-config", "namespace": "kserve"}
    data = {"data": {"deploy": json.dumps({"defaultDeploymentMode": default})}}
    world.cluster.put({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, **data})
    assert KServe(world.settings)._production.mode(None) == word


def test_a_cluster_without_kserve_is_one_line(world: World) -> None:
    model = world.model("equal", "one")
    world.cluster.remove("ConfigMap", "inferenceservice-config", "kserve")
    refuses("names no mode; say cluster.serving.mode", world.release, model, "1")
    del world.cluster.kinds["serving.kserve.io", "inferenceservices"]
    refuses("has no serving.kserve.io/v1beta1 InferenceService .404.; install KServe", world.release, model, "1")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("cluster.serving.models=null", "cluster.serving.models: null"),
        ("promote.decisions=null", "promote.decisions: null"),
        ("promote.model_name=Face_MLLM", "no name for KServe"),
        ("serve.device=cuda", "cluster.serving.pod.gpus: 0"),
        ("serve.canary.steps=[0.5, 100]", "whole percents"),
        ("serve.target=gitops", "cluster.serving.gitops: null"),
        ("serve.engine.name=vllm", "cluster.serving.vllm: null"),
        ("serve.retention={answers: true, days: 3}", "a pod keeps nothing"),
    ],
)
def test_settings_under_which_nothing_can_be_served_are_one_line(given: str, said: str) -> None:
    sets = [
        "serve.target=kserve",
        "cluster.serving.models=s3://m/models",
        "promote.decisions=https://git.example.com/d",
    ]
    rendering.refuse(load("laptop", sets))
    refuses(said, KServe, load("laptop", [*sets, given]), lambda namespace: None)


def test_a_release_asks_for_nothing_that_its_account_may_not(world: World, tmp_path: Path, monkeypatch: Any) -> None:
    world.cluster.roles += roles()
    world.cluster.tokens["releaser"] = "system:serviceaccount:face-mllm:releaser"
    with serving(world.cluster) as address:
        world.cluster.kubeconfig(tmp_path / "releaser", address, "releaser")
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "releaser"))
        refuses("ConfigMap inferenceservice-config of kserve: .* say cluster.serving.mode", world.stage)
        known = world.settings.cluster
        words = known.serving.model_copy(update={"mode": "Knative"})
        world.settings = world.settings.model_copy(update={"cluster": known.model_copy(update={"serving": words})})
        world.stage()
        with KServe(world.settings).held():
            world.release(world.model("equal", "one"), "1", [])
            refuses("production serves version 1 again", world.release, world.model("failing", "two"), "2", [])
        assert connect(PRODUCTION[0]).get(lease.LEASE, "face-mllm-release") is None
        with pytest.raises(ApiError, match="cannot get resource"):
            connect(PRODUCTION[0]).get(Kind("v1", "Secret", "secrets"), "face-mllm-models")


@pytest.mark.parametrize("account", ["pipeline-runner", "trainer"])
def test_the_account_of_a_run_may_serve_staging_and_nothing_else(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, account: str
) -> None:
    world.cluster.roles += roles()
    world.cluster.tokens[account] = f"system:serviceaccount:face-mllm:{account}"
    known = world.settings.cluster
    words = known.serving.model_copy(update={"mode": "Knative"})
    world.settings = world.settings.model_copy(update={"cluster": known.model_copy(update={"serving": words})})
    with serving(world.cluster) as address:
        world.cluster.kubeconfig(tmp_path / account, address, account)
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / account))
        world.stage()
        refuses("cannot get resource", world.release, world.model("equal", "one"), "1")


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    bare, work = tmp_path / "deploy.git", tmp_path / "work"
    git(tmp_path, "init", "-q", "--bare", "-b", "main", str(bare))
    git(tmp_path, "clone", "-q", str(bare), str(work))
    (work / "README").write_text("ours")
    git(work, "add", "README")
    git(work, "commit", "-q", "-m", "first")
    git(work, "push", "-q", "origin", "HEAD:main")
    return bare


def test_by_gitops_a_commit_is_what_the_cluster_comes_to_show(world: World, repository: Path) -> None:
    sets = {"repository": str(repository), "branch": "main", "file": "production/model.yaml"}
    known = world.settings.cluster
    changed = known.serving.model_copy(update={"gitops": Gitops(**sets)})
    serve = world.settings.serve.model_copy(update={"target": "gitops"})
    cluster = known.model_copy(update={"serving": changed})
    world.settings = world.settings.model_copy(update={"serve": serve, "cluster": cluster})
    end = threading.Event()

    def sync() -> None:
        """What Argo CD does."""
        last = ""
        while not end.wait(0.2):
            head = git(repository, "rev-parse", "main").strip()
            if head != last:
                listed = git(repository, "ls-tree", "-r", "--name-only", head)
                if "production/model.yaml" in listed:
                    body = yaml.safe_load(git(repository, "show", f"{head}:production/model.yaml"))
                    world.cluster.put(body | {"status": (world.object() or {}).get("status", {})})
                else:
                    world.cluster.remove("InferenceService", PRODUCTION[1], PRODUCTION[0])
                last = head

    thread = threading.Thread(target=sync, daemon=True)
    thread.start()
    try:
        one, two, worse = world.model("equal", "one"), world.model("equal", "two"), world.model("failing", "worse")
        world.release(one, "1", [])
        world.release(two, "2", [])
        refuses("production serves version 2 again", world.release, worse, "3", [])
        assert world.serves == {two[1]: 100}
    finally:
        end.set()
        thread.join()
    log = git(repository, "log", "--format=%s", "main").splitlines()
    assert log[-2] == f"face-mllm: version 1 ({one[1][:12]}) gets 100 % of the requests"
    assert log[0] == f"face-mllm: version 2 ({two[1][:12]}) gets 100 % of the requests"
    assert "README" in git(repository, "ls-tree", "--name-only", "main")


def test_what_a_server_counts_is_read_from_its_metrics() -> None:
    text = "# TYPE facemllm_requests counter\n"
    text += 'facemllm_requests_total{door="v1",status="200"} 7\nfacemllm_requests_total{door="health",status="200"} 9\n'
    text += 'facemllm_requests_total{door="page",status="200"} 1\nfacemllm_requests_total{door="v1",status="500"} 2\n'
    assert of_text(text) == {"200": 8, "500": 2}
