"""Every command that a cluster's pods are given, in the image: user 10001, read-only root, no capabilities, no network.

The commands are those that `pipeline.py compile` writes, run in their order on a fresh volume, as KFP's launcher would:
values and paths for outputs go in as its executor input, the value that a step returns is read from where it was
written. MLflow is a container of the image, too, and so is a git server that keeps decisions, asked over ssh; the
others share their loopback, and nothing else. Needs podman and the image (CONTRIBUTING.md says how to make both);
PODMAN and FACEMLLM_IMAGE name others than `podman` (with `runc`, where it is installed) and its default.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import specification
from facemllm.settings import load
from facemllm.workflow.steps import steps
from pipeline import GRAPHS
from tests.cluster import stores
from tests.kfp_workflow import executor_input
from tests.unit.test_k8s import needs_kubectl, one
from tests.unit.test_k8s import pods as pods_of

# crun refuses hybrid cgroups
PODMAN = shlex.split(os.environ.get("PODMAN", "podman --runtime=runc" if shutil.which("runc") else "podman"))
IMAGE = os.environ.get("FACEMLLM_IMAGE", load().cluster.image)
SMALL = ("ingest.identities=60", "validate.min_rows=50", "evaluate.bootstrap=100", "train.threads=1")
FEW = tuple(f"train.stages.{stage}.steps=2" for stage in ("align", "instruct", "specialize"))
HOME, DECISIONS = "/workspace/login", "ssh://git@127.0.0.1:2222/workspace/decisions.git"
ON_CLUSTER = {"storage.home": "/workspace/.facemllm", "tracking.uri": "http://127.0.0.1:5000"}
ON_CLUSTER |= {"promote.decisions": DECISIONS}
SAYS_WHERE = [f"--set={key}={value}" for key, value in ON_CLUSTER.items()]
OVERRIDES = tuple(f"cluster.overrides.{key}={value}" for key, value in ON_CLUSTER.items())
SETS = (*SMALL, *FEW, *OVERRIDES, "cluster.one_host=true", f"cluster.steps.defaults.env.HOME={HOME}")
RESTRICTED = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--user=10001:10001")
RESTRICTED += ("--ulimit=nofile=16384", "--ulimit=nproc=16384")  # podman's own need rights
ORDER = [name for name in steps(load("ci")) if name != "release"]


def podman(*words: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*PODMAN, *words], capture_output=True, text=True, check=False, **options)
    assert not check or done.returncode == 0, f"{shlex.join(words)[:300]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def missing() -> str:
    if shutil.which(PODMAN[0]) is None:
        return f"{PODMAN[0]} is not installed (Debian: apt-get install podman)"
    if podman("image", "exists", IMAGE, check=False).returncode:
        return f"there is no image {IMAGE} here; build it as CONTRIBUTING.md says, or name another in FACEMLLM_IMAGE"
    return ""


WHY = missing()
pytestmark = pytest.mark.skipif(bool(WHY), reason=WHY)


def answers(mlflow: str) -> None:
    """Wait until the MLflow of a container is up."""
    deadline = time.monotonic() + 300
    asked = ["wget", "-q", "-O", "-", "http://127.0.0.1:5000/health"]  # as the manifest's probes would
    while podman("exec", mlflow, *asked, check=False).stdout != "OK":
        assert time.monotonic() < deadline, podman("logs", mlflow).stderr[-3000:]
        time.sleep(1)


GIT = f"""
import asyncio, asyncssh, subprocess
from pathlib import Path

home = Path("{HOME}")
home.mkdir()
own, host = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
own.write_private_key(home / "key")
(home / "key").chmod(0o600)
own.write_public_key("/tmp/authorized")
(home / "known_hosts").write_text("[127.0.0.1]:2222 " + host.export_public_key().decode())
command = "ssh -i $HOME/key -o UserKnownHostsFile=$HOME/known_hosts"
(home / ".gitconfig").write_text("[core]\\n\\tsshCommand = " + command)
subprocess.run(["git", "init", "--quiet", "--bare", "/workspace/decisions.git"], check=True)

async def answer(asked):
    pipe = subprocess.PIPE
    git = subprocess.Popen(asked.command, shell=True, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)
    await asked.redirect(stdin=git.stdin, stdout=git.stdout, stderr=git.stderr)
    asked.exit(await asyncio.to_thread(git.wait))

async def main():
    keys = dict(server_host_keys=[host], authorized_client_keys="/tmp/authorized")
    await asyncssh.listen("127.0.0.1", 2222, process_factory=answer, encoding=None, **keys)
    print("ready")
    await asyncio.Event().wait()

asyncio.run(main())
"""
"""A git server, and a login to it as docs/cluster.md says."""


class Pods:
    """Containers of the image on one fresh volume, with one loopback of their own."""

    def __init__(self, name: str) -> None:
        self.volume, self.mlflow, self.git = name, f"{name}-mlflow", f"{name}-git"
        self.seconds: dict[str, float] = {}

    def run(self, *command: str, name: str = "", environment: dict[str, str] | None = None, **options: Any) -> Any:
        given = [f"--env={key}={value}" for key, value in (environment or {}).items()]
        network = f"--network=container:{self.mlflow}"
        began = time.monotonic()
        try:
            return podman("run", "--rm", network, *self.limits(), *given, IMAGE, *command, **options)
        finally:
            self.seconds[name] = time.monotonic() - began

    def limits(self) -> list[str]:
        """Of every container; /dev/shm as large as Ray's object store asks for."""
        kept = ["--tmpfs=/tmp:exec,mode=1777", "--shm-size=512m", f"--volume={self.volume}:/workspace"]
        kept.append(f"--volume={self.volume}:/git:ro")  # a home that nobody can write, as a Secret is
        return [*RESTRICTED, *kept]

    def start(self) -> None:
        podman("volume", "create", self.volume)
        server = "mlflow server --host 127.0.0.1 --port 5000 --workers 1 --serve-artifacts"
        server += " --backend-store-uri sqlite:////tmp/mlflow.db --artifacts-destination /tmp/artifacts"
        command = ["run", "--detach", "--name", self.mlflow, "--network=none", *self.limits(), IMAGE, *server.split()]
        podman(*command)
        answers(self.mlflow)
        command = ["run", "--detach", "--name", self.git, f"--network=container:{self.mlflow}"]
        podman(*command, *self.limits(), IMAGE, "python", "-c", GIT)
        while not (said := podman("logs", self.git)).stdout:
            assert not said.stderr, said.stderr[-3000:]
            time.sleep(1)

    def stop(self) -> None:
        podman("rm", "--force", "--time=0", self.git, self.mlflow, check=False)
        podman("volume", "rm", "--force", self.volume, check=False)


@pytest.fixture(scope="module")
def pods() -> Iterator[Pods]:
    made = Pods(f"face-mllm-test-{os.getpid()}")
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The specification of the profile `ci`, that of the release merged into it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(specification, "graphs", GRAPHS)
        documents = []
        for release in (False, True):
            file = tmp_path_factory.mktemp("spec") / "spec.yaml"
            specification.write_specification("ci", SETS, file, release)
            documents.append(next(yaml.safe_load_all(file.read_text("utf-8"))))
    whole, release = documents
    whole["components"] |= release["components"] | {"release-root": release["root"]}
    whole["deploymentSpec"]["executors"] |= release["deploymentSpec"]["executors"]
    return whole


class Run:
    """A run of the specification, task by task."""

    def __init__(self, spec: dict[str, Any], pods: Pods) -> None:
        self._pods, self._components = pods, spec["components"]
        self._executors = spec["deploymentSpec"]["executors"]
        dags = [spec["root"], *self._components.values()]
        self._tasks = {name: task for dag in dags for name, task in dag.get("dag", {}).get("tasks", {}).items()}
        self.values: dict[str, str] = {}

    def step(self, name: str, **given: Any) -> str:
        """Run the pod of a step; the value that it returns."""
        task = self._tasks[name.replace("_", "-")]
        component = self._components[task["componentRef"]["name"]]
        container = self._executors[component["executorLabel"]]["container"]
        taken = {key: self._value(source, given) for key, source in task["inputs"]["parameters"].items()}
        out = f"/tmp/out/{name}"
        executor_json = json.dumps(executor_input(component, taken, out))
        words = [executor_json if word == "{{$}}" else word for word in [*container["command"], *container["args"]]]
        shown = ["sh", "-ec", f'"$@" >&2; cat {out}/executor_output.json', "sh", *words]
        environment = {one["name"]: one["value"] for one in container.get("env", ())} | {"FACEMLLM_RUN": "run-1"}
        said = self._pods.run(*shown, name=name, environment=environment).stdout
        self.values[name] = json.loads(said)["parameterValues"]["Output"]
        return self.values[name]

    def _value(self, source: dict[str, Any], given: dict[str, Any]) -> Any:
        if "runtimeValue" in source:
            return source["runtimeValue"]["constant"]
        if "taskOutputParameter" in source:
            return self.values[source["taskOutputParameter"]["producerTask"].replace("-", "_")]
        if "taskFinalStatus" in source:
            return {"state": "SUCCEEDED", "pipelineJobResourceName": "run-1", "pipelineTaskName": "run"}
        name = source["componentInputParameter"]
        return given.get(name) or self.values[name.removeprefix("pipelinechannel--").removesuffix("-Output")]


@pytest.fixture(scope="module")
def ran(spec: dict[str, Any], pods: Pods) -> Iterator[Run]:
    run = Run(spec, pods)
    yield run
    print("\n" + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in pods.seconds.items() if name))


@pytest.mark.parametrize("step", [*ORDER, "finish"])
def test_a_steps_command_ends_well(ran: Run, step: str) -> None:
    assert ran.step(step)
    if step == "gate":
        assert ran.values[step] == "passed"


def test_an_approved_version_is_released_and_answers(ran: Run, pods: Pods) -> None:
    words = ["facemllm", "promote", "approve", ran.values["register"], "--by", "Ada Lovelace", "--reason", "a test"]
    pods.run(*words, "--profile=ci", *SAYS_WHERE, environment={"HOME": HOME})
    look = ["git", "-C", "/workspace/decisions.git", "rev-list", "--count", "decisions"]
    assert int(pods.run(*look).stdout) >= 2, "a request and an approval"
    assert ran.step("release", version=ran.values["register"]).startswith("http://127.0.0.1:")


def test_what_was_released_and_does_not_serve_is_served_by_the_job_that_reconciles(ran: Run, pods: Pods) -> None:
    words = ["facemllm", "promote", "reconcile", "--profile=ci", *SAYS_WHERE]
    said = pods.run(*words, environment={"HOME": "/git/login"}).stdout
    assert "(released, and nothing serves) serves in production at" in said


def test_it_is_user_10001_without_rights_who_can_write_beside_the_volume_to_tmp_alone(pods: Pods) -> None:
    look = "id -u; grep -E '^(CapEff|NoNewPrivs)' /proc/self/status; "
    look += "for p in /app /usr /tmp /workspace; do test -w $p && echo $p; done; true"
    said = pods.run("sh", "-c", look).stdout.split()
    assert said == ["10001", "CapEff:", "0" * 16, "NoNewPrivs:", "1", "/tmp", "/workspace"]


def test_what_it_cannot_compile_is_one_line(ran: Run, pods: Pods) -> None:
    table = f"/workspace/.facemllm/store/{ran.values['reformat']}"
    sets = [part for one in (*SMALL, *FEW, "train.compile=true") for part in ("--set", one)]
    words = ["python", "-m", "facemllm.train.torchrun", "align", table, "/tmp/aligned", "--profile", "ci", *sets]
    done = pods.run(*words, check=False)
    assert done.returncode == 1
    assert re.findall("^error: .*", done.stderr, re.M) == [
        "error: torch.compile needs the C++ compiler g++ and torch's headers, and neither is in our image; "
        "set train.compile: false"
    ]


@needs_kubectl
@pytest.mark.skipif(not stores.PYTHON.exists(), reason=stores.ABSENT)
def test_mlflow_serves_on_postgresql_with_a_login_as_its_manifest_says(tmp_path: Path) -> None:
    (tmp_path / "login").mkdir()
    login = one("gpu", "ConfigMap", "mlflow-login")["data"]["basic_auth.ini"]
    (tmp_path / "login/basic_auth.ini").write_text(login, "utf-8")
    ((_, pod),) = pods_of(one("gpu", "Deployment", "mlflow"))
    (server,) = pod["spec"]["containers"]
    name = f"face-mllm-test-{os.getpid()}-login"
    with stores.postgres(tmp_path / "postgres") as database:
        known = {**database.environment, "PGHOST": "/postgres"}  # its socket: the container has a network of its own
        known |= {"MLFLOW_ARTIFACTS_DESTINATION": "s3://mlflow/artifacts", "MLFLOW_FLASK_SERVER_SECRET_KEY": "key"}
        known |= {"MLFLOW_AUTH_ADMIN_PASSWORD": stores.ADMIN[1]}
        known |= {variable["name"]: variable["value"] for variable in server["env"]}
        given = [f"--env={key}={value}" for key, value in known.items()]
        given += [f"--volume={tmp_path / 'login'}:/login:ro", f"--volume={tmp_path / 'postgres'}:/postgres"]
        given += [*RESTRICTED, "--network=none", "--tmpfs=/tmp:mode=1777,size=512m"]
        for container in pod["spec"]["initContainers"]:
            podman("run", "--rm", *given, IMAGE, *container["command"])
        podman("run", "--detach", "--name", name, *given, IMAGE, *server["command"], *server["args"])
        try:
            answers(name)
            said = podman("exec", name, "python", "-c", ASKS_MLFLOW, *stores.ADMIN).stdout.split()
            assert said == ["401", "200"]
        finally:
            podman("rm", "--force", "--time=0", name, check=False)


ASKS_MLFLOW = """
import requests, sys
for login in (None, tuple(sys.argv[1:])):
    address = "http://localhost:5000/api/2.0/mlflow/experiments/search"
    print(requests.post(address, json={"max_results": 1}, auth=login, timeout=60).status_code)
"""


def test_its_commit_is_in_its_label_and_in_its_environment() -> None:
    config = json.loads(podman("image", "inspect", IMAGE).stdout)[0]["Config"]
    commit = config["Labels"]["org.opencontainers.image.revision"]
    assert f"FACEMLLM_COMMIT={commit}" in config["Env"]


def test_every_distribution_still_has_its_licence(pods: Pods) -> None:
    code = """
import importlib.metadata as metadata
for one in metadata.distributions():
    named = [file for file in one.files or () if ".dist-info/" in str(file) and "licen" in str(file).lower()]
    if [file for file in named if not file.locate().is_file()]: print(one.name)
"""
    assert pods.run("python", "-c", code).stdout == ""
