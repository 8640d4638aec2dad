"""The whole way on a cluster: submit, training by RayJobs, approval, release, canary, rollback (`make demo-cluster`).

Every command that a person types and a pod is given is run, each in a process of its own. Real: Ray over three nodes
with a token, MLflow, the model server, git, files on S3's protocol. Stand-ins: the APIs of Kubeflow Pipelines and of
Kubernetes, with our roles and strict schemas, and behind them Argo, KubeRay's operator and KServe's controller; pods
are processes. What is printed is what docs/cluster.md tells.
"""

import base64
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from mlflow import MlflowClient

from facemllm.core.step import CLUSTER_RUN
from facemllm.promote import registry, releases
from facemllm.serve.deploy import curl_example
from facemllm.serve.kserve.rendering import DIGEST
from facemllm.settings import load
from facemllm.signing.decisions import Decisions
from facemllm.tracking.runs import commit
from tests import kfp_server, kubernetes_server
from tests.approved import ADA, GRACE
from tests.cluster.kuberay import KubeRay
from tests.cluster.pods import Clients, ServingPod, bare, secret, variables
from tests.integration.conftest import bucket as bucket
from tests.integration.conftest import stop_tree
from tests.kfp_workflow import Failed, Pod, Workflow
from tests.kserve_controller import KServe
from tests.kubernetes_objects import merged
from tests.kubernetes_server import Body, Cluster
from tests.unit.test_k8s import CUSTOM, ROOT, schema_faults

NAMESPACE, PRODUCTION, NAME = "face-mllm", "face-mllm-production", "face-mllm"
STAGES = ("align", "instruct", "specialize")
PROFILE = "demo"


def profile(work: Path, mlflow: str, decisions: str) -> Body:
    """The profile `ci`, smaller still, on a cluster: RayJobs of two workers, KServe, two people who decide."""
    places = {"storage.home": f"{work}/.facemllm", "storage.runs": f"{work}/runs", "tracking.uri": mlflow}
    own = {
        "storage": {"home": places["storage.home"], "runs": places["storage.runs"]},
        "tracking": {"uri": mlflow, "experiment": NAME},
        "ingest": {"identities": 60},
        "validate": {"min_rows": 50},
        "train": {"launcher": "rayjob", "workers": 2, "threads": 1, "stages": {s: {"steps": 4} for s in STAGES}},
        "evaluate": {"bootstrap": 100},
        "promote": {"model_name": NAME, "decisions": decisions, "rule": {"approvals": {"approver": 2}}},
        "serve": {"target": "kserve", "canary": {"max_p95_ratio": 50.0}},
        "cluster": {
            "mount": str(work),
            "one_host": True,
            "overrides": places,
            "serving": {"models": "s3://faces/models", "mode": "Knative", "reach": "public"},
            "steps": {
                "defaults": {"env": {"HF_HOME": f"{work}/.cache/huggingface"}},
                "train": {"cpu": "1", "memory": "2Gi"},
            },
        },
    }
    return dict(merged(yaml.safe_load((ROOT / "profiles/ci.yaml").read_text("utf-8")), own))


def faults(body: Body) -> list[str]:
    """What the strict schemas of KubeRay and KServe hold against what is asked of them."""
    body = {key: value for key, value in body.items() if key != "status"}
    return schema_faults(body) if (body["apiVersion"], body["kind"]) in CUSTOM else []


class Site:
    """A cluster on this machine, and a person at a terminal in its pod `tools`."""

    def __init__(self, folder: Path, mlflow: str, s3: dict[str, str]) -> None:
        self.folder, self.work, self.project = folder, folder / "w", folder / "project"
        self.work.mkdir()
        subprocess.run(["git", "init", "-q", "--bare", folder / "decisions.git"], check=True)
        decisions = f"file://{folder}/decisions.git"
        (self.project / "profiles").mkdir(parents=True)
        for file in (ROOT / "pipeline.py", ROOT / "params.yaml", *(ROOT / "profiles").iterdir()):
            (self.project / file.relative_to(ROOT)).symlink_to(file)
        text = yaml.safe_dump(profile(self.work, mlflow, decisions), sort_keys=False)
        (self.project / "profiles" / f"{PROFILE}.yaml").write_text(text, "utf-8")
        self.processes: list[subprocess.Popen[Any]] = []
        self.failed: list[str] = []
        self.commit = commit() or ""

        self.cluster = Cluster(roles=kubernetes_server.roles(), faults=faults)
        self.cluster.kinds["coordination.k8s.io", "leases"] = ("v1", "Lease")
        self.cluster.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": PRODUCTION}})
        secret(self.cluster, NAMESPACE, "face-mllm-s3", s3)
        for namespace in (NAMESPACE, PRODUCTION):
            secret(self.cluster, namespace, "face-mllm-models", s3)
        self.kuberay = KubeRay(self.cluster, folder, self.project)
        self.kserve = KServe(self.cluster, self._serve)
        self.kubeflow = kfp_server.Kubeflow()
        self.kubeflow.runs_by = self._run
        self.s3, self.mlflow, self.pods = s3, mlflow, 0
        self.shown = {str(self.work): "/workspace", mlflow: "http://mlflow:5000", str(folder): ""}
        self.shown |= {decisions: "ssh://git@git.example.com/face-mllm/decisions.git"}

    def open(self, kubernetes: str, kubeflow: str) -> None:
        """Take in the addresses of the two APIs."""
        for account in self.cluster.tokens:
            self.cluster.kubeconfig(self.folder / account, kubernetes, account)
        self.person = {**self._environment("releaser"), **self.s3, "KFP_TOKEN": kfp_server.TOKEN}
        self.person |= {"KF_PIPELINES_ENDPOINT": kubeflow, "KFP_NAMESPACE": NAMESPACE}
        self.shown |= {kubernetes: "https://kubernetes", kubeflow: "https://kubeflow.example.com/pipeline"}

    def _environment(self, account: str) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        about = {"FACEMLLM_COMMIT": self.commit, "PYTHONUNBUFFERED": "1", "KUBECONFIG": str(self.folder / account)}
        return {**bare(), "PATH": path, **about}

    def _run(self, run: Body) -> None:
        """What Argo does with a run."""
        folder, well = self.folder / f"run-{len(self.kubeflow.runs)}", False
        parameters = run.get("runtime_config", {}).get("parameters") or {}

        try:
            tell = partial(self.kubeflow.tell, run)
            flow = Workflow(run["pipeline_spec"], folder, partial(self._step, run), tell)
            well = flow.run(parameters)
        except Exception:
            traceback.print_exc()
        finally:
            self.kubeflow.end(run, well)

    def _step(self, run: Body, pod: Pod) -> None:
        """The process of a step's pod, with the token of the run's account."""
        given = []
        for of in pod.platform.get("secretAsEnv", ()):
            for one in of["keyToEnv"]:
                key = {"name": of["secretName"], "key": one["secretKey"], "optional": of.get("optional", False)}
                given.append({"name": one["envVar"], "valueFrom": {"secretKeyRef": key}})
        (label,) = pod.platform["fieldPathAsEnv"]
        assert label == {"name": CLUSTER_RUN, "fieldPath": "metadata.labels['pipeline/runid']"}
        environment = {**self._environment(run["service_account"]), "TMPDIR": str(pod.folder), **pod.environment}
        environment |= {**variables(self.cluster, NAMESPACE, given), CLUSTER_RUN: run["run_id"]}
        environment["RAY_raylet_start_wait_time_s"] = "120"  # of a busy machine
        with (pod.folder / "log").open("wb") as log:
            process = subprocess.Popen(pod.words, stdout=log, stderr=log, env=environment, cwd=self.project)
            self.processes.append(process)
        if process.wait():
            said = (pod.folder / "log").read_text("utf-8", "replace").strip()
            self.failed.append(said)
            raise Failed(re.split(r"(?m)^[\w.]*(?:Error|Exception|Refused): ", said)[-1][-500:])

    def _serve(self, body: Body) -> ServingPod:
        self.pods += 1
        return ServingPod(self.cluster, body, self.folder / f"serving-{self.pods}")

    def named(self, text: str) -> str:
        """What the log says: names as on a cluster in place of this machine's."""
        for here, name in sorted(self.shown.items(), key=lambda one: -len(one[0])):
            text = text.replace(here, name)
        return text

    def type(self, line: str, code: int = 0) -> str:
        """Type a command; it is printed with what it says, as it says it, and has to end with this code."""
        print(self.named(f"\n$ {line}"), flush=True)
        command = ["bash", "-c", line]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.person, cwd=self.project
        )
        self.processes.append(process)
        said = []
        assert process.stdout is not None
        for text in process.stdout:
            said.append(text)
            print(self.named(text), end="", flush=True)
        assert process.wait() == code, "\n".join([line, *self.failed[-1:]])[-6000:]
        return "".join(said)

    def log(self, task: str, word: str) -> None:
        """Print the lines with a word that a task's pod has written in the newest run."""
        file = min((self.folder / f"run-{len(self.kubeflow.runs)}").glob(f"{task}-*/log"))  # the last try
        lines = [line for line in file.read_text("utf-8").splitlines() if line.startswith(word)]
        print("\n".join([f"\nlog of the pod of {task}:", *map(self.named, lines)]), flush=True)

    def publish_policy(self) -> None:
        """Put the policy file's text into production's ConfigMap, as k8s/production does."""
        text = (self.work / ".facemllm/signing/policy.yaml").read_text("utf-8")
        about = {"name": "face-mllm-policy", "namespace": PRODUCTION}
        self.cluster.put({"apiVersion": "v1", "kind": "ConfigMap", "metadata": about, "data": {"policy.yaml": text}})

    def run(self) -> Body:
        """The newest run."""
        return list(self.kubeflow.runs.values())[-1]

    def tasks(self) -> dict[str, str]:
        """States of the steps of the newest run."""
        details = self.run()["run_details"]["task_details"]
        return {one["display_name"]: one["state"] for one in details if not one["display_name"].endswith("-driver")}

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                stop_tree(process)
        self.kuberay.close()
        self.kserve.close()


@pytest.fixture
def site(mlflow_server: Any, bucket: Any) -> Iterator[Site]:
    s3 = {name: os.environ[f"AWS_{name}"] for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "ENDPOINT_URL")}
    s3 = {f"AWS_{name}": value for name, value in {**s3, "REGION": "us-east-1"}.items()}
    with tempfile.TemporaryDirectory(prefix="e") as folder:  # short: Ray's sockets lie in it
        made = Site(Path(folder), mlflow_server.uri, s3)
        with kubernetes_server.serving(made.cluster) as kubernetes, kfp_server.serving(made.kubeflow) as kubeflow:
            made.open(kubernetes, kubeflow)
            yield made
            made.close()


def test_from_submit_to_rollback(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site.project)
    settings = load(PROFILE)
    with_profile = f"--profile {PROFILE}"

    def approve(version: int, who: str, why: str) -> str:
        return site.type(f'facemllm promote approve {version} --by "{who}" --reason "{why}" {with_profile}')

    def release(version: int, code: int = 0) -> str:
        words = f"python pipeline.py submit --release {version} {with_profile} --service-account releaser --follow"
        return site.type(words, code)

    def serves(version: int) -> str:
        found = site.cluster.get("InferenceService", NAME, PRODUCTION)
        assert found is not None
        url = str(found["status"]["url"])
        site.shown[url] = "https://face-mllm.example.com"
        site.type(f"curl -sS {url}/info | head -c 300; echo")
        info = httpx.get(f"{url}/info", trust_env=False, timeout=60).json()
        known = registry.find_version(settings, version)
        assert found["metadata"]["annotations"][DIGEST] == info["digest"] == known.digest
        assert {one["person"] for one in info["authorized"]["approvals"]} == {ADA, GRACE}
        assert registry.champion(settings).version == version  # type: ignore[union-attr]
        return url

    for who in (ADA, GRACE):
        site.type(f'facemllm keys new "{who}" --role approver --no-passphrase {with_profile}')
    site.publish_policy()

    site.type(f"python pipeline.py submit {with_profile} --follow")
    assert site.run()["service_account"] == "trainer"
    assert {*site.tasks().values()} == {"SUCCEEDED"}
    site.log("align", "RayJob")
    jobs = site.kuberay.jobs.values()  # one that failed is made anew, by the same name
    names = {one.name: one.name.rpartition("-")[0] for one in jobs}
    assert [*names.values()] == [f"train-{stage}" for stage in STAGES]
    makers = {one.user for one in site.cluster.asked if (one.verb, one.resource) == ("create", "rayjobs")}
    assert makers == {f"system:serviceaccount:{NAMESPACE}:trainer"}
    summary = json.loads((site.work / "runs" / site.run()["run_id"] / "summary.json").read_text("utf-8"))
    assert (summary["gate"]["passed"], summary["model"]["version"], summary["approval"]) == (True, "1", "pending")
    mlflow = MlflowClient(site.mlflow)
    nested = mlflow.search_runs([mlflow.get_experiment_by_name(NAME).experiment_id])
    trained = {run.data.tags.get("facemllm.step"): run.data.metrics for run in nested}
    assert all(trained[stage]["loss"] > 0 for stage in STAGES)

    site.type(f"facemllm promote list {with_profile}")
    approve(1, ADA, "figures are in order")
    assert "approvals are missing: 1 x approver" in release(1, code=1)
    assert site.cluster.get("InferenceService", NAME, PRODUCTION) is None
    approve(1, GRACE, "looked at 12 faces")
    release(1)
    url = serves(1)
    face = site.work / "runs" / summary["run"] / "face.jpg"
    asked = curl_example(f"{url}/v1/models/{NAME}:predict", "Which hair color?", shlex.quote(str(face)))
    (said,) = json.loads(site.type(asked))["predictions"]
    assert said["task"] == "attributes"

    site.type(f"python pipeline.py submit {with_profile} --set train.stages.specialize.steps=6 --follow")
    trained_now = {one.name for one in site.kuberay.jobs.values()} - names.keys()
    assert [name.rpartition("-")[0] for name in trained_now] == ["train-specialize"], "the other stages are recalled"
    for who, why in ((ADA, "better on hair"), (GRACE, "so it is")):
        approve(2, who, why)
    service = site.kserve.service(PRODUCTION, NAME)
    service.fails_at = 10
    message = release(2, code=1)
    assert "at 10 % of the requests it was worse" in message
    assert "production serves version 1 again" in message
    serves(1)
    service.fails_at = None
    with Clients(f"{url}/v1/models/{NAME}:predict", question(face)) as clients:
        release(2)
        serves(2)
        site.type(f'facemllm promote rollback --reason "complaints about hair" {with_profile}')
    assert len(clients.statuses) > 20
    assert {*clients.statuses} == {200}
    serves(1)
    site.type(f"facemllm audit {with_profile}")
    statements = [(one.decision, one.model) for one in releases.in_force(Decisions.open(settings))]
    first, second = (registry.find_version(settings, number).digest for number in (1, 2))
    history = [("release", first), ("release", second), ("rollback", first), ("release", second), ("rollback", first)]
    assert statements == history
    print(f"\nshares of the newest revision, as applied: {service.percents}")


def question(face: Path) -> Body:
    picture = base64.b64encode(face.read_bytes()).decode()
    return {"instances": [{"image": {"b64": picture}, "question": "Which hair color?"}]}
