"""MLflow with a login over PostgreSQL and S3: models that are large, a road that is slow, a server that is killed."""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from facemllm.core import digests
from facemllm.promote import artifacts, registry
from facemllm.settings import Settings, load
from facemllm.signing import local
from facemllm.signing.authorization import authorize
from facemllm.tracking import client as mlflow_client
from facemllm.tracking import runs as tracking
from tests.approved import ADA, Home
from tests.cluster import stores
from tests.cluster.road import Road
from tests.evaluation_example import METRICS
from tests.refusing import refuses
from tests.unit.test_k8s import needs_kubectl, one, pods

pytestmark = pytest.mark.skipif(not stores.PYTHON.exists(), reason=stores.ABSENT)
MB = 2**20
PIPELINE, READER = ("pipeline", "the steps of a run"), ("reader", "somebody who looks")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="module")
def database(folder: Path) -> Iterator[stores.Postgres]:
    with stores.postgres(folder / "postgres") as running:
        yield running


@pytest.fixture(scope="module")
def s3(folder: Path) -> Iterator[stores.S3]:
    with stores.s3(folder / "s3", "mlflow", "faces", "backup") as running:
        yield running


@pytest.fixture(scope="module")
def road(s3: stores.S3) -> Iterator[Road]:
    with Road(int(s3.url.rpartition(":")[2]), rate=40 * MB).open() as opened:
        yield opened


@pytest.fixture(scope="module")
def mlflow(database: stores.Postgres, s3: stores.S3, road: Road, folder: Path) -> Iterator[stores.Mlflow]:
    """Reaches S3 by the slow road, as its clients do: the addresses that it signs are those of the road."""
    with stores.Mlflow(database, s3.at(road.url), folder / "mlflow").served() as running:
        for user in (PIPELINE, READER):
            running.add_user(*user)
        yield running


@pytest.fixture
def settings(
    mlflow: stores.Mlflow, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Settings:
    """Settings of the test's own, with the login of the pipeline's steps and no key of S3."""
    login(monkeypatch, *PIPELINE)
    for name in stores.KEYS:
        monkeypatch.delenv(name, raising=False)
    for name in mlflow_client.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    name = request.node.name
    places = [f"storage.home={tmp_path / 'home'}", f"tracking.uri={mlflow.uri}"]
    return load("laptop", [*places, f"tracking.experiment={name}", f"promote.model_name={name}"])


def login(monkeypatch: pytest.MonkeyPatch, name: str, password: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)


def model_of(folder: Path, size: int) -> Path:
    """A model folder with weights of so many bytes, all different."""
    (folder / "model" / "adapter").mkdir(parents=True)
    with (folder / "model" / "model.safetensors").open("wb") as out:
        for _ in range(0, size, 16 * MB):
            out.write(os.urandom(min(16 * MB, size - out.tell())))
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "model" / "lineage.json").write_text('{"sources": ["render"]}')
    return folder / "model"


def register(settings: Settings, model: Path, digest: str) -> registry.Version:
    return registry.register(settings, model, digest, METRICS, "e" * 64, {"passed": True})


def test_a_model_of_2_gb_is_registered_by_a_slow_road_while_mlflow_is_killed(
    settings: Settings, mlflow: stores.Mlflow, s3: stores.S3, road: Road, tmp_path: Path
) -> None:
    model = model_of(tmp_path, 2 * 1000**3)
    digest = digests.of_tree(model)
    started, restarted = road.passed, threading.Event()
    road.breaks_at = started + 300 * MB  # one part is lost: the file is sent again

    def again() -> None:
        mlflow.restart()
        restarted.set()

    road.at, road.then = started + 900 * MB, again
    made = register(settings, model, digest)
    assert restarted.is_set()
    assert road.broken == 1
    assert road.passed - started > 2 * 1000**3
    assert (made.version, made.digest) == (1, digest)

    again()
    (kept,) = registry.versions(settings)
    assert kept.digest == digest
    fetched = registry.fetch(settings, 1, tmp_path / "fetched")  # which holds the bytes against the digest
    assert (fetched / "adapter" / "adapter_config.json").is_file()
    s3.empty("mlflow")  # the backup below need not carry it


def test_through_the_server_it_does_not_pass(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "false")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    model = model_of(tmp_path, 20 * MB)
    refuses("MLflow at", lambda: register(settings, model, digests.of_tree(model)))


def test_a_file_that_mlflow_refuses_is_sent_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = model_of(tmp_path, MB)
    register(settings, model, digests.of_tree(model))
    login(monkeypatch, *READER)
    with mlflow_client.session(settings) as client:
        (found,) = registry.versions(settings)
        client = mlflow_client.open_client(settings.tracking.uri or "")
        model_id = found.source.removeprefix("models:/")
    refuses("Permission denied", lambda: upload(settings, client, model_id, model))


def upload(settings: Settings, client: Any, model_id: str, model: Path) -> None:
    with mlflow_client.guard(settings.tracking.uri or ""):
        artifacts.upload(client, model_id, model)


def test_who_has_no_login_reads_nothing_and_who_reads_writes_nothing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = model_of(tmp_path, MB)
    digest = digests.of_tree(model)
    register(settings, model, digest)
    login(monkeypatch, *READER)
    (found,) = registry.versions(settings)
    refuses("Permission denied", lambda: registry.set_alias(settings, found.version, "champion"))
    login(monkeypatch, READER[0], "wrong")
    refuses("401", lambda: registry.versions(settings))
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    refuses("401", lambda: registry.versions(settings))


def test_curves_of_a_training_outlast_a_kill_of_mlflow(settings: Settings, mlflow: stores.Mlflow) -> None:
    run_id = tracking.start_pipeline(settings, "nightly")
    curve = mlflow_client.CurveLogger(mlflow.uri, run_id, interval_s=0.05)
    for step in range(3000):
        if step == 1500:
            mlflow.restart()
        curve(step, {"loss": 1 / (step + 1)})
    assert curve.flush(60)
    history = mlflow_client.connect(settings).get_metric_history(run_id, "loss")
    assert sorted(point.step for point in history) == [*range(3000)]


@pytest.mark.parametrize(
    "tests",
    ["test_data_repository.py", "test_training_ranks.py::test_checkpoints_on_s3",
     "test_ray_train.py::test_an_elastic_run_with_checkpoints_on_s3_survives_a_kill"],
)  # fmt: skip
def test_what_is_tried_with_a_stand_in_of_s3_holds_with_a_server_by_a_slow_road(
    tests: str, s3: stores.S3, road: Road
) -> None:
    road.breaks_at, broken = road.passed + 20_000, road.broken
    environment = {**os.environ, **s3.environment, "S3_SERVER": road.url}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", f"tests/integration/{tests}"]
    done = subprocess.run(command, cwd=stores.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
    assert road.broken == broken + 1


class Pod:
    """Runs the containers of one of our CronJobs here, in their order: their commands and variables, with folders of
    `place` for volumes."""

    def __init__(self, place: Path, secrets: Mapping[str, Mapping[str, str]], bin: Path) -> None:
        self.place, self.secrets = place, secrets
        self.path = os.pathsep.join([str(bin), str(stores.RCLONE.parent), os.environ["PATH"]])

    def run(self, name: str) -> str:
        """Returns what the last container said."""
        backup = self.place / "backup"
        shutil.rmtree(backup, ignore_errors=True)
        backup.mkdir()
        ((_, pod),) = pods(one("gpu", "CronJob", name))
        for container in (*pod["spec"]["initContainers"], *pod["spec"]["containers"]):
            known = {"PATH": self.path, "HOME": str(self.place)}
            for secret in container.get("envFrom", ()):
                known |= self.secrets[secret["secretRef"]["name"]]
            for variable in container.get("env", ()):
                value = self._here(variable["value"])
                known[variable["name"]] = known[value[2:-1]] if value.startswith("$(") else value
            words = [self._here(word) for word in (*container["command"], *container.get("args", ()))]
            done = subprocess.run(words, env=known, capture_output=True, text=True, check=False, cwd=self.place)
            assert done.returncode == 0, (container["name"], done.stderr[-3000:])
        return done.stdout

    def _here(self, word: str) -> str:
        return re.sub(r"(?<![\w:$])/(backup|workspace)\b", str(self.place / r"\1"), word)


@needs_kubectl
def test_what_the_backup_keeps_the_restore_brings_back(
    settings: Settings, mlflow: stores.Mlflow, database: stores.Postgres, s3: stores.S3, tmp_path: Path
) -> None:
    home = tmp_path / "workspace" / ".facemllm"
    settings = settings.model_copy(update={"storage": settings.storage.model_copy(update={"home": str(home)})})
    model = model_of(tmp_path, 20 * MB)
    digest = digests.of_tree(model)
    register(settings, model, digest)
    shutil.copytree(model, home / "store" / digest)
    decided = Home(settings)
    decided.person(ADA, "approver", "requester")
    decided.approve(model)
    approvals = authorize(digest, decided.decisions, local.policy(settings)).approvals

    rclone = {f"RCLONE_CONFIG_TO_{name}": stores.KEYS[f"AWS_{name}"] for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")}
    rclone |= {
        "RCLONE_CONFIG_TO_ENDPOINT": s3.url,
        "RCLONE_CONFIG_TO_REGION": "us-east-1",
        "BUCKET": "backup/face-mllm",
    }
    store = {**database.environment, **stores.KEYS, "MLFLOW_S3_ENDPOINT_URL": s3.url}
    store |= {"MLFLOW_ARTIFACTS_DESTINATION": mlflow.artifacts}
    pod = Pod(tmp_path, {"mlflow-store": store, "mlflow-backup": rclone}, database.bin)
    pod.run("backup")
    pod.run("backup")  # the next night finds nothing new

    mlflow.stop()
    database.run("dropdb", "mlflow", "--force")
    database.run("createdb", "mlflow")
    s3.empty("mlflow")
    policy = settings.policy_file.read_text()
    shutil.rmtree(tmp_path / "workspace")
    home.mkdir(parents=True)
    assert "no private key here" in pod.run("restore")

    mlflow.start()
    (kept,) = registry.versions(settings)
    assert kept.digest == digest
    registry.fetch(settings, 1, tmp_path / "fetched")
    assert digests.of_tree(home / "store" / digest) == digest
    assert settings.policy_file.read_text() == policy
    assert authorize(digest, Home(settings).decisions, local.policy(settings)).approvals == approvals
    refuses("keys new 'pipeline' --role pipeline", local.pipeline_signer, settings)
    local.new_person_key(settings, "pipeline", ("pipeline", "releaser"), None)
    assert local.pipeline_signer(settings, "releaser").key_id == local.pipeline_signer(settings).key_id
    assert authorize(digest, Home(settings).decisions, local.policy(settings)).approvals == approvals
