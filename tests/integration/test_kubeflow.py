"""`submit`, `status`, `retry` and `schedule` against a stand-in for Kubeflow's API that asks who is there."""

import datetime
import ipaddress
import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from typer.testing import CliRunner, Result

import commands
from cluster import client, runs, schedules, specification
from cluster import commands as of_cluster
from facemllm.errors import UserError, message_of
from facemllm.settings import load
from facemllm.workflow.runs import RunView
from tests.kfp_server import SESSION, TOKEN, Kubeflow, serving
from tests.kfp_workflow import Failed, Pod, Workflow

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("quick_kfp", "quick", "project")]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, bytes]]:
    @lru_cache(None)
    def whole(profile: str, overrides: tuple[str, ...], release: bool) -> tuple[Any, bytes]:
        file = tmp_path_factory.mktemp("spec") / "spec.yaml"
        settings = specification.write_specification(profile, overrides, file, release)
        return settings, file.read_bytes()

    return whole


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiled: Callable[..., tuple[Any, bytes]]) -> None:
    """Each specification is compiled once; nobody waits; nobody of this machine's environment asks."""

    @contextmanager
    def kept(profile: str, overrides: list[str], release: bool = False) -> Iterator[tuple[Any, str]]:
        settings, content = compiled(profile, tuple(overrides), release)
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            (file := Path(folder) / "face-mllm.yaml").write_bytes(content)
            yield settings, str(file)

    monkeypatch.setattr(of_cluster, "specification", kept)
    monkeypatch.setattr(schedules, "specification", kept)
    monkeypatch.setattr(runs, "POLL_S", 0.0)
    monkeypatch.setattr(client, "PAUSE_S", 0.0)
    for name in ("KFP_COOKIE", "KF_PIPELINES_SA_TOKEN_PATH", "KFP_NAMESPACE", "KF_PIPELINES_ENDPOINT", "KFP_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KFP_TOKEN", TOKEN)


@pytest.fixture
def kubeflow() -> Kubeflow:
    return Kubeflow()


@pytest.fixture
def endpoint(kubeflow: Kubeflow) -> Iterator[str]:
    with serving(kubeflow) as address:
        yield address


@pytest.fixture
def ask(endpoint: str) -> Callable[..., Result]:
    """`ask("submit", ...)`: the command against the stand-in, in the namespace that is ours."""

    def run(command: str, *words: str, namespace: str | None = "face-mllm", at: str = endpoint) -> Result:
        where = ["--endpoint", at, *(["--namespace", namespace] if namespace else [])]
        return CliRunner().invoke(commands.app, [command, *words, *where])

    return run


def line(done: Result) -> str:
    """What a command that was refused says: one line."""
    assert isinstance(done.exception, UserError), done.exception
    said = message_of(done.exception)
    assert "\n" not in said
    return said


def test_a_run_is_submitted_as_somebody_and_followed_to_its_summary(ask, kubeflow, project) -> None:
    done = ask("submit", "--follow", "--json", "--service-account", "pipeline-runner", "--experiment", "mine")
    assert done.exception is None, done.output
    (run,) = kubeflow.runs.values()
    assert (run["display_name"], run["service_account"]) == ("face-mllm laptop", "pipeline-runner")
    assert [one["display_name"] for one in kubeflow.experiments.values()] == ["mine"]
    assert kubeflow.experiments[run["experiment_id"]]["namespace"] == "face-mllm"
    assert {headers.get("authorization") for *_, headers in kubeflow.asked} == {f"Bearer {TOKEN}"}
    summary = json.loads(done.stdout)
    file = project / "runs" / "kubeflow-00000000" / "summary.json"
    assert json.loads(file.read_text()) == summary
    assert summary["kubeflow"] == {"run_id": run["run_id"], "state": "SUCCEEDED", "experiment_id": "experiment-0"}
    states = {step["name"]: (step["state"], step["seconds"]) for step in summary["steps"]}
    assert states.pop("release") == ("skipped", None)
    assert set(states.values()) == {("done", 1.0)}
    assert (summary["profile"], summary["seconds"] > 10) == ("laptop", True)
    assert 'storage.home="/workspace/.facemllm"' in summary["overrides"]
    shown = [one.split()[:2] for one in done.stderr.splitlines() if one.startswith(("ingest", "await"))]
    assert shown == [[step, state] for step in ("ingest", "await_approval") for state in ("running", "done")]


TO_KSERVE = ["--set", "serve.target=kserve", "--set", "cluster.serving.models=s3://faces/models"]
TO_KSERVE += ["--set", "promote.decisions=https://git.example.com/decisions.git"]


def test_a_run_that_starts_rayjobs_has_the_account_that_may(ask, kubeflow) -> None:
    assert ask("submit", "--set", "train.launcher=rayjob").exception is None
    assert ask("schedule", "--cron", "0 0 3 * * *", "--set", "annotate.launcher=rayjob").exception is None
    started = [*kubeflow.runs.values(), *kubeflow.recurring.values()]
    assert [one["service_account"] for one in started] == ["trainer", "trainer"]
    for words, account in (
        (["submit"], "pipeline-runner"),
        (["submit", "--service-account", "own"], "own"),
        (["submit", "--set", "cluster.account=null"], None),
        (["submit", "--release", "3"], "pipeline-runner"),
        (["submit", "--release", "3", *TO_KSERVE], "releaser"),
        (["submit", "--release", "3", *TO_KSERVE, "--set", "train.launcher=rayjob"], "releaser"),
    ):
        assert ask(*words).exception is None
        assert [*kubeflow.runs.values()][-1].get("service_account") == account, words
    runs = len(kubeflow.runs)
    wrong = ["--service-account", "pipeline-runner"]
    said = line(ask("submit", "--set", "train.launcher=rayjob", *wrong))
    assert said.startswith("--service-account pipeline-runner: this run starts RayJobs, which cluster.launcher_account")
    assert "changes production in KServe" in line(ask("submit", "--release", "3", *TO_KSERVE, *wrong))
    assert len(kubeflow.runs) == runs


def test_where_the_volume_is_mounted_the_runs_own_summary_is_told(tmp_path) -> None:
    settings = load("laptop", [f"storage.runs={tmp_path}"])
    (tmp_path / "the-run").mkdir()
    (tmp_path / "the-run" / "summary.json").write_text('{"gate": {"passed": true}, "steps": []}')
    run = SimpleNamespace(run_id="the-run", state="SUCCEEDED", experiment_id="e")
    summary = runs.summary(run, RunView.of(settings, tmp_path / "none"), settings, [])
    kubeflow = {"run_id": "the-run", "state": "SUCCEEDED", "experiment_id": "e"}
    assert summary == {"gate": {"passed": True}, "steps": [], "kubeflow": kubeflow}


def test_without_following_the_id_is_all_it_prints(ask, kubeflow) -> None:
    assert ask("submit").stdout == f"{next(iter(kubeflow.runs))}\n"
    done = ask("submit", "--release", "3", "--json")
    assert json.loads(done.stdout) == {"run": list(kubeflow.runs)[1]}
    released = list(kubeflow.runs.values())[1]
    assert released["runtime_config"]["parameters"] == {"version": "3"}
    assert released["display_name"] == "release 3, laptop"
    assert list(released["pipeline_spec"]["pipeline_spec"]["deploymentSpec"]["executors"]) == ["exec-release"]


def test_a_failed_run_is_told_and_goes_on_by_retry(ask, kubeflow, project) -> None:
    kubeflow.failing = {"align": "train.use_gpu is true, but\nPyTorch sees no GPU here"}
    said = line(ask("submit", "--follow"))
    (run_id,) = kubeflow.runs
    assert said.startswith("align: train.use_gpu is true, but PyTorch sees no GPU here (run ")
    assert f"pipeline.py retry {run_id}" in said
    summary = json.loads((project / "runs" / "kubeflow-00000000" / "summary.json").read_text())
    assert {step["name"]: step["state"] for step in summary["steps"]}["align"] == "failed"
    status = ask("status", run_id)
    assert status.stdout.splitlines()[0] == "face-mllm laptop: FAILED"
    assert "align          failed   1.0 s         train.use_gpu is true" in status.stdout
    assert ask("retry", run_id, "--follow").exception is None
    assert kubeflow.runs[run_id]["state"] == "SUCCEEDED"
    assert "must be Failed/Error to retry" in line(ask("retry", run_id))
    assert json.loads(ask("status", run_id, "--json").stdout)["state"] == "SUCCEEDED"
    assert "knows no such thing (404): ResourceNotFoundError: Run nothing not found" in line(ask("status", "nothing"))


def test_tasks_run_as_the_specification_says_and_are_told(ask, kubeflow, tmp_path) -> None:
    started: list[str] = []

    def start(pod: Pod) -> None:
        step, _, left = pod.folder.name.rpartition("-")
        started.append(step)
        if (step, left) == ("evaluate", "3"):
            raise Failed("evicted")
        executor = json.loads(next(word for word in pod.words if word.startswith('{"inputs"')))
        assert None not in executor["inputs"]["parameterValues"].values()
        value = "refused" if step == "gate" else f"{step}'s"
        (pod.folder / "executor_output.json").write_text(json.dumps({"parameterValues": {"Output": value}}))

    def run(one: dict[str, Any]) -> None:
        flow = Workflow(one["pipeline_spec"], tmp_path / "pods", start, partial(kubeflow.tell, one))
        kubeflow.end(one, flow.run({}))

    kubeflow.runs_by = run
    done = ask("submit", "--follow", "--json")
    assert done.exception is None, done.output
    states = {step["name"]: step["state"] for step in json.loads(done.stdout)["steps"]}
    assert {name for name, state in states.items() if state == "done"} == {*started} - {"finish"}
    assert (states["gate"], states["register"]) == ("done", "skipped")
    assert started.count("evaluate") == 2, "as its retry policy says"
    assert started[0] == "ingest"
    assert started[-1] == "finish"
    assert started.index("reformat") < started.index("align") < started.index("specialize") < started.index("gate")


def test_where_no_pod_was_made_kubeflow_says_why(ask, kubeflow) -> None:
    kubeflow.undriven = {"ingest": 'configmaps "kfp-launcher" is \x1b[31mforbidden\x1b[0m'}
    said = line(ask("submit", "--follow"))
    assert said.startswith('ingest: configmaps "kfp-launcher" is forbidden (run ')
    (run_id,) = kubeflow.runs
    shown = [one.split(maxsplit=2) for one in ask("status", run_id).stdout.splitlines()]
    assert ["ingest", "failed", 'configmaps "kfp-launcher" is forbidden'] in shown
    kubeflow.runs[run_id] |= {"error": {"code": 2, "message": "no such volume"}, "run_details": {"task_details": []}}
    assert "the run ended FAILED: no such volume (run " in line(ask("status", run_id, "--follow"))


def test_a_canceled_run_is_not_to_be_retried_and_a_release_has_one_step(ask, kubeflow) -> None:
    run_id = ask("submit").stdout.strip()
    kubeflow.runs[run_id]["state"] = "CANCELED"
    said = line(ask("status", run_id, "--follow"))
    assert "was canceled; submit it anew" in said
    assert "retry" not in said
    released = ask("submit", "--release", "3").stdout.strip()
    assert ask("status", released).stdout.splitlines()[1:] == ["release        waiting"]
    done = ask("status", released, "--follow", "--json")
    states = {step["name"]: step["state"] for step in json.loads(done.stdout)["steps"]}
    assert (states.pop("release"), set(states.values())) == ("done", {"skipped"})
    assert "give the number of a version" in line(ask("submit", "--release", "abc; rm -rf"))
    assert len(kubeflow.runs) == 2


def test_a_session_that_ends_on_the_way_is_told_and_the_run_named(ask, kubeflow) -> None:
    run_id = ask("submit").stdout.strip()
    kubeflow.looks = lambda: setattr(kubeflow, "pages", 1000)
    said = line(ask("status", run_id, "--follow"))
    assert "answers with a page and not as the API" in said
    assert said.endswith(f"(then go on: pipeline.py status {run_id} --follow)")


def test_what_an_answer_says_of_waiting_silences_nobody(ask, kubeflow) -> None:
    run_id = ask("submit").stdout.strip()
    kubeflow.busy_for = "21600"
    looked = iter([lambda: setattr(kubeflow, "busy", 2)])
    kubeflow.looks = lambda: next(looked, lambda: None)()
    done = ask("status", run_id, "--follow")
    assert done.exception is None
    assert "is away; waiting for it, up to 60 s" in done.stderr


def test_of_two_who_make_the_experiment_the_second_takes_it(ask, kubeflow) -> None:
    assert ask("submit").exception is None
    kubeflow.hidden = 1
    assert ask("submit").exception is None
    assert len(kubeflow.experiments) == 1


def test_an_api_that_is_away_is_waited_for(ask, kubeflow) -> None:
    run_id = ask("submit").stdout.strip()
    looked = iter([lambda: setattr(kubeflow, "busy", 3), lambda: setattr(kubeflow, "away", 9)])
    kubeflow.looks = lambda: next(looked, lambda: None)()
    done = ask("status", run_id, "--follow")
    assert done.exception is None
    assert done.stderr.count("is away; waiting for it") == 2
    assert kubeflow.runs[run_id]["state"] == "SUCCEEDED"


def test_an_api_that_stays_away_is_told_after_a_while(ask, kubeflow, monkeypatch) -> None:
    run_id = ask("submit").stdout.strip()
    monkeypatch.setattr(client, "PATIENCE_S", 0.0)
    kubeflow.looks = lambda: setattr(kubeflow, "away", 100)
    said = line(ask("status", run_id, "--follow"))
    assert said.startswith("no Kubeflow Pipelines API answers at http://127.0.0.1")


def test_a_token_that_expires_on_the_way_is_told_and_a_file_is_read_anew(ask, kubeflow, monkeypatch, tmp_path) -> None:
    run_id = ask("submit").stdout.strip()
    kubeflow.looks = lambda: setattr(kubeflow, "tokens", {"another"})
    said = line(ask("status", run_id, "--follow"))
    assert "does not take the token in KFP_TOKEN (401): Unauthenticated: the token is expired" in said
    assert TOKEN not in said
    monkeypatch.delenv("KFP_TOKEN")
    (file := tmp_path / "token").write_text("another\n")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(file))

    def rotate() -> None:
        kubeflow.tokens = {"rotated"}
        file.write_text("rotated\n")

    kubeflow.looks = rotate
    assert ask("status", run_id, "--follow").exception is None


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, r"asks who you are (401): Unauthenticated: Request header error: there is no user identity header."),
        ({"KFP_TOKEN": "stale"}, "does not take the token in KFP_TOKEN (401)"),
        ({"KFP_COOKIE": "authservice_session=old"}, "does not take the session in KFP_COOKIE (401)"),
        ({"KFP_TOKEN": "two words"}, "KFP_TOKEN is no token; set it anew"),
        ({"KFP_COOKIE": "no-value"}, "KFP_COOKIE is no cookie, as NAME=VALUE; set it anew"),
    ],
)
def test_nobody_and_strangers_are_refused_in_one_line(ask, kubeflow, monkeypatch, environment, says) -> None:
    monkeypatch.delenv("KFP_TOKEN")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said = line(ask("submit"))
    assert says in said
    assert not any(value in said for value in environment.values())
    assert kubeflow.runs == {}


def test_a_session_is_enough(ask, kubeflow, monkeypatch) -> None:
    monkeypatch.delenv("KFP_TOKEN")
    monkeypatch.setenv("KFP_COOKIE", SESSION)
    assert ask("submit").exception is None
    assert len(kubeflow.runs) == 1


def test_where_kubeflow_has_one_user_no_namespace_is_needed(ask, kubeflow) -> None:
    kubeflow.multi_user = False
    assert ask("submit", namespace=None).exception is None
    assert ask("schedule", "--cron", "0 0 3 * * *", namespace=None).exception is None
    assert (len(kubeflow.runs), len(kubeflow.recurring)) == (1, 1)


def test_a_pod_asks_its_own_cluster_with_its_own_token(endpoint, kubeflow, monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("KFP_TOKEN")
    (token := tmp_path / "token").write_text(TOKEN)
    (namespace := tmp_path / "namespace").write_text("face-mllm")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(token))
    monkeypatch.setattr(client, "_NAMESPACE", namespace)
    monkeypatch.setattr(client, "IN_CLUSTER", endpoint)
    done = CliRunner().invoke(commands.app, ["submit"])
    assert done.exception is None
    assert kubeflow.experiments["experiment-0"]["namespace"] == "face-mllm"


def test_wrong_places_are_told_in_one_line(ask, endpoint, kubeflow) -> None:
    base = endpoint.removesuffix("/pipeline")
    assert "in namespace kubeflow-x (403): PermissionDenied" in line(ask("submit", namespace="kubeflow-x"))
    assert "serves many users: give --namespace" in line(ask("submit", namespace=None))
    assert "is not the API of Kubeflow Pipelines (404)" in line(ask("submit", at=base))
    assert "answers with a page and not as the API" in line(ask("submit", at=f"{base}/login"))
    assert "no Kubeflow Pipelines API answers at http://127.0.0.1:9" in line(ask("submit", at="http://127.0.0.1:9/x"))
    unknown = line(ask("submit", at="http://kubeflow.invalid/pipeline"))
    assert "no Kubeflow Pipelines API answers at http://kubeflow.invalid/pipeline" in unknown
    assert "give an address such as" in line(ask("submit", at="kubeflow"))
    assert "secret" not in line(ask("submit", at="https://ada:secret@kubeflow/pipeline"))
    assert "no endpoint: give --endpoint" in line(CliRunner().invoke(commands.app, ["submit"]))
    kubeflow.busy = 5
    assert "is in trouble (503)" in line(ask("submit"))
    assert kubeflow.runs == {}


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate of 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kubeflow")])
    day = datetime.timedelta(days=1)
    now = datetime.datetime.now(datetime.UTC)
    built = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    built = built.serial_number(1).not_valid_before(now - day).not_valid_after(now + day)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = built.add_extension(address, False).add_extension(x509.BasicConstraints(True, None), True)
    pem = folder / "cert.pem", folder / "key.pem"
    pem[0].write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    pem[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, *plain))
    return pem


def test_a_certificate_is_trusted_by_a_bundle_alone(ask, kubeflow, tmp_path) -> None:
    pair = certificate(tmp_path)
    with serving(kubeflow, pair) as address:
        said = line(ask("submit", at=address))
        assert "its certificate is not trusted" in said
        assert "give --ca FILE" in said
        assert kubeflow.asked == []
        assert ask("submit", "--ca", str(pair[0]), at=address).exception is None
    assert "no such file; give the PEM bundle" in line(ask("submit", "--ca", str(tmp_path / "none.pem")))


def test_a_schedule_is_one_a_name_and_makes_up_for_nothing(ask, kubeflow) -> None:
    first = ask("schedule", "--cron", "0 0 3 * * *")
    assert first.exception is None, first.output
    for name in ("another", "a third"):
        one = {**kubeflow.recurring[first.stdout.strip()], "recurring_run_id": name, "display_name": name}
        kubeflow.recurring[name] = one
    second = ask("schedule", "--cron", "0 0 4 * * *", "--service-account", "pipeline-runner")
    assert f"runs every day at 04:00 UTC, in place of {first.stdout.strip()}" in second.stderr
    ours = [one for one in kubeflow.recurring.values() if one["display_name"] == "face-mllm laptop"]
    (ours,) = ours
    assert ours["recurring_run_id"] == second.stdout.strip()
    assert ours["trigger"]["cron_schedule"]["cron"] == "0 0 4 * * *"
    assert (ours["no_catchup"], int(ours["max_concurrency"]), ours["service_account"]) == (True, 1, "pipeline-runner")
    assert set(kubeflow.recurring) >= {"another", "a third"}
    assert "five fields" in line(ask("schedule", "--cron", "0 3 * * *"))
    assert "give one of --cron" in line(ask("schedule"))


REVISION = schedules.Data("ab" * 20, "cd" * 32)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> list[schedules.Data | None]:
    """The newest revision that the data repository has, the last of the list."""
    newest: list[schedules.Data | None] = [REVISION]
    monkeypatch.setattr(schedules, "watched", lambda *_: load())
    monkeypatch.setattr(schedules, "newest_data", lambda _: newest[-1])
    return newest


def test_a_new_revision_of_the_data_has_one_run(ask, kubeflow, data) -> None:
    started = ask("schedule", "--on-data")
    assert started.exception is None, started.output
    (run,) = kubeflow.runs.values()
    assert started.stdout.strip() == run["run_id"]
    assert run["display_name"] == f"face-mllm laptop on data-{'cd' * 8}"
    again = ask("schedule", "--on-data")
    assert (again.exception, again.stdout, len(kubeflow.runs)) == (None, "", 1)
    assert "has had its run" in again.stderr
    assert ask("status", run["run_id"]).stdout.startswith("face-mllm laptop on data-cdcdcdcdcdcdcdcd: PENDING")
    summary = json.loads(ask("status", run["run_id"], "--follow", "--json").stdout)
    assert f"version.restore={'ab' * 20}" in summary["overrides"]
    data.append(schedules.Data("ef" * 20, "cd" * 32))
    assert ask("schedule", "--on-data").stdout == "", "the same bytes under another name"
    data.append(schedules.Data("ef" * 20, "01" * 32))
    assert ask("schedule", "--on-data").stdout != ""
    assert len(kubeflow.runs) == 2
    data.append(None)
    assert "no revision of the data" in ask("schedule", "--on-data").stderr


def test_of_two_who_look_at_once_one_starts_the_run(endpoint, kubeflow, data, compiled) -> None:
    compiled("laptop", (f"version.restore={'ab' * 20}",), False)
    gate, found = threading.Barrier(4), []

    def look() -> None:
        api = client.connect(endpoint, "face-mllm", None)
        gate.wait()
        found.append(schedules.by_data(api, "laptop", (), REVISION, experiment="e", account=None))

    threads = [threading.Thread(target=look) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len([one for one in found if one]) == len(kubeflow.runs) == 1
    assert len(found) == 4


def test_a_claim_that_no_run_came_of_is_taken_over_once_it_is_old(ask, kubeflow, data) -> None:
    ask("schedule", "--on-data")
    kubeflow.runs.clear()  # its maker was killed between the claim and the run
    assert ask("schedule", "--on-data").stdout == "", "it may be about to start one"
    for version in kubeflow.versions.values():
        version["created_at"] = "2026-01-01T00:00:00Z"
    assert ask("schedule", "--on-data").stdout != ""
    assert ask("schedule", "--on-data").stdout == ""
    assert len(kubeflow.runs) == 1


def test_where_no_repository_is_the_command_says_so(ask, tmp_path) -> None:
    said = line(ask("schedule", "--on-data", "--repository", str(tmp_path / "none")))
    assert f"no data repository at {tmp_path / 'none'} here" in said


def test_a_run_of_settings_that_are_not_here_is_told_as_such(ask, kubeflow) -> None:
    run_id = ask("submit").stdout.strip()
    spec = kubeflow.runs[run_id]["pipeline_spec"]["pipeline_spec"]
    for dag in (one["dag"] for one in (spec["root"], *spec["components"].values()) if "dag" in one):
        for task in dag["tasks"].values():
            task.get("inputs", {}).get("parameters", {}).get("profile", {})["runtimeValue"] = {"constant": "mine"}
    said = line(ask("status", run_id))
    assert said.startswith(f"run {run_id} is of a checkout that knew profile mine otherwise (no profile 'mine'")
