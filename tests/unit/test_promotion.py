"""Requests and decisions by version, releases, rollbacks, and what MLflow has no say in."""

import io
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from facemllm.core import servers, services
from facemllm.core.files import locked
from facemllm.core.servers import Deployed
from facemllm.errors import UserError
from facemllm.promote import artifacts, decide, overview, registry, releases
from facemllm.promote import bundle as bundles
from facemllm.promote.decide import Who
from facemllm.report import decision as shown
from facemllm.review import facts
from facemllm.serve import deploy, reconcile, release
from facemllm.serve.approval import Approval
from facemllm.serve.local import production as local_production
from facemllm.settings import load
from facemllm.signing import local, manifest
from facemllm.signing.authorization import authorize
from facemllm.signing.canonical import Refused
from facemllm.signing.decisions import Decisions
from facemllm.signing.policy import read_policy, revoke_key
from facemllm.signing.statements import Draft, sign
from tests.approved import ADA, GRACE, Home, Registry, bundle_files, make_home, make_model
from tests.refusing import refuses

FINE = "figures hold, card read"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path / "home")


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Registry:
    return Registry(monkeypatch)


@pytest.fixture(autouse=True)
def collected(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, Any]]:
    """What a version's bundle says beside the usual; in place of collecting it from a run."""
    said: dict[int, dict[str, Any]] = {}

    def collect(settings: Any, version: registry.Version) -> bundles.Bundle:
        files = bundle_files(version.digest, version.version, **said.get(version.version, {}))
        return bundles.Bundle(files, json.loads(files["bundle.json"]))

    monkeypatch.setattr(bundles, "collect", collect)
    return said


def add(home: Home, mlflow: Registry, number: int = 1) -> registry.Version:
    """A registered version whose model lies in the store."""
    made = make_model(home.settings.home / "new", f"weights {number}".encode())
    digest = manifest.of(made).digest
    (home.settings.home / "store").mkdir(exist_ok=True)
    made.rename(home.settings.home / "store" / digest)
    return mlflow.add(number, digest)


def approve(home: Home, number: int, person: str = ADA, reason: str = FINE) -> None:
    if decide.state(home.settings, number) == "pending":
        decide.request_unless_asked(home.settings, number)
    decide.decide(home.settings, number, "approve", reason, Who(person))


# decisions


def test_a_version_is_asked_for_and_decided_on(home: Home, mlflow: Registry) -> None:
    version, settings = add(home, mlflow), home.settings
    assert decide.state(settings, 1) == "pending"
    refuses("nobody asked for a decision", decide.decide, settings, 1, "approve", FINE, Who(ADA))
    asked = decide.request_unless_asked(settings, 1)
    assert asked is not None
    assert (asked.person, asked.role) == ("pipeline", "pipeline")
    assert decide.request_unless_asked(settings, 1) == asked, "once is enough"
    assert decide.request(settings, 1) == asked, "the same bundle, too"
    assert decide.state(settings, 1) == "requested"
    assert home.decisions.signature(version.digest) is not None

    refuses("needs a reason", decide.decide, settings, 1, "approve", " \n ", Who(ADA))
    refuses("no valid key of Nobody", decide.decide, settings, 1, "approve", FINE, Who("Nobody"))
    refuses("no version '9'", decide.decide, settings, 9, "approve", FINE, Who(ADA))
    made = decide.decide(settings, 1, "approve", "figures\nhold", Who(ADA))
    assert (made.person, made.role, made.reason, made.model) == (ADA, "approver", "figures hold", version.digest)
    assert decide.state(settings, 1) == "approved"
    assert mlflow.versions[1].tags[decide.APPROVAL].startswith("approved by Ada Lovelace until 2")
    assert mlflow.versions[1].tags[decide.STATEMENT] == made.id

    decide.decide(settings, 1, "revoke", "found a leak", Who(GRACE))
    assert decide.state(settings, 1) == "revoked"
    assert decide.await_decision(settings, 1, 0) == "rejected"
    decide.decide(settings, 1, "approve", "measured again", Who(ADA))
    assert decide.state(settings, 1) == "approved"
    statements = [(one["decision"], one["person"], one["counts"]) for one in overview.show(settings, 1)["statements"]]
    first = [("request", "pipeline", True), ("approve", ADA, False), ("revoke", GRACE, True), ("approve", ADA, True)]
    assert statements == first


def test_what_mlflow_says_decides_nothing(home: Home, mlflow: Registry) -> None:
    first, second, settings = add(home, mlflow, 1), add(home, mlflow, 2), home.settings
    approve(home, 1)
    forged = {decide.APPROVAL: "approved by Ada Lovelace until 2099-01-01", "facemllm.decision": "approved"}
    mlflow.versions[2] = mlflow.add(2, second.digest, tags=forged, aliases=("champion",))
    assert decide.state(settings, 2) == "pending"
    refuses("nobody has decided about it", release.switch, settings, 2, "release", error=Refused)
    assert registry.champion(settings) is None

    mlflow.add(2, first.digest, evaluation=first.evaluation)  # the digest of the approved one under another number
    for act in (decide.state, overview.show):
        refuses("registered as face-mllm version 1; somebody changed MLflow", act, settings, 2, error=Refused)
    refuses("MLflow says that", release.switch, settings, 2, "release", error=Refused)
    assert overview.list_versions(settings)[0][0]["state"] == "pending"
    mlflow.add(1, first.digest, evaluation="e" * 64)  # another evaluation
    assert decide.state(settings, 1) == "pending"


def test_a_model_that_its_gate_refuses_cannot_be_asked_for(home: Home, mlflow: Registry, collected: Any) -> None:
    add(home, mlflow)
    collected[1] = {"gate": {"passed": False, "reasons": ["age too high"]}}
    refuses("does not pass its gate: age too high", decide.request, home.settings, 1)
    assert home.decisions.bundles() == []


def test_two_people_where_the_policy_asks_for_them(tmp_path: Path, mlflow: Registry) -> None:
    rule = [
        "promote.rule={approvals: {approver: 1}, request_by: [requester], requester_may_approve: false, valid_days: 9}"
    ]
    home = make_home(tmp_path / "home", *rule)
    add(home, mlflow)
    assert decide.request_unless_asked(home.settings, 1) is None, "a person asks"
    decide.request(home.settings, 1, Who(ADA), "please look")
    refuses("asked for the decision", decide.decide, home.settings, 1, "approve", FINE, Who(ADA), error=Refused)
    assert decide.state(home.settings, 1) == "requested"
    assert overview.show(home.settings, 1)["may_sign"] == [GRACE]
    decide.decide(home.settings, 1, "approve", FINE, Who(GRACE))
    assert decide.state(home.settings, 1) == "approved"


def test_a_person_decides_on_a_machine_of_their_own(tmp_path: Path, mlflow: Registry) -> None:
    """As on a cluster: the pipeline's key lies on the volume, Ada's on her laptop, the policy in a repository."""
    subprocess.run(["git", "init", "-q", "--bare", tmp_path / "decisions.git"], check=True)
    decisions, published = f"promote.decisions=file://{tmp_path}/decisions.git", tmp_path / "policy.yaml"
    volume = Home(load("laptop", [f"storage.home={tmp_path}/volume", decisions]))
    laptop = Home(load("laptop", [f"storage.home={tmp_path}/laptop", decisions, f"promote.policy={published}"]))
    model = make_model(tmp_path / "model")
    digest = mlflow.add(1, manifest.of(model).digest).digest
    volume.keys["pipeline"] = local.pipeline_signer(volume.settings).key_id
    volume.say("request", volume.bundle(model), "pipeline", role="pipeline")

    laptop.person(ADA, "approver")
    refuses("nobody asked for a decision", decide.decide, laptop.settings, 1, "approve", "fine", Who(ADA))
    published.unlink()
    shutil.copy(volume.settings.policy_file, published)
    laptop.person(ADA, "approver")
    decide.decide(laptop.settings, 1, "approve", "fine", Who(ADA))
    refuses("which the policy does not list", authorize, digest, volume.decisions, local.policy(volume.settings))
    shutil.copy(published, volume.settings.policy_file)
    assert [one.person for one in authorize(digest, volume.decisions, local.policy(volume.settings)).approvals] == [ADA]


def test_a_run_waits_for_a_decision(home: Home, mlflow: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    add(home, mlflow)
    monkeypatch.setattr(decide, "POLL_S", 0.05)
    assert decide.await_decision(home.settings, 1, 0.1 / 60) == "pending"
    decide.request(home.settings, 1)
    deciding = threading.Timer(0.2, decide.decide, (home.settings, 1, "reject", "not yet", Who(ADA)))
    deciding.start()
    assert decide.await_decision(home.settings, 1, 1) == "rejected"
    deciding.join()


def test_mlflow_away_loses_no_decision(home: Home, mlflow: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    add(home, mlflow)

    def away(*_: Any) -> None:
        raise UserError("no MLflow server")

    monkeypatch.setattr(decide, "set_tags", away)
    approve(home, 1)
    assert decide.state(home.settings, 1) == "approved"


@pytest.mark.parametrize("tag", ["../../../etc", "", "A" * 64, f"{'a' * 64}/..", "\x1b[2J"])
def test_what_is_no_digest_names_no_folder(tag: str) -> None:
    tags = {"facemllm.digest": tag, "facemllm.evaluation": tag}
    stored = SimpleNamespace(name="face-mllm", version="1", tags=tags, source="models:/m-x", run_id=None, aliases=[])
    found = registry._version(SimpleNamespace(**vars(stored), creation_timestamp=0, description=None))
    assert (found.digest, found.evaluation) == ("", "")


def test_a_location_that_cannot_be_read_is_one_line(home: Home, tmp_path: Path) -> None:
    location = "http://127.0.0.1:9/x"
    client: Any = SimpleNamespace(get_logged_model=lambda _: SimpleNamespace(artifact_location=location))
    with pytest.raises(UserError, match=location):
        artifacts.download(home.settings, client, "m-1", tmp_path)


# tables


def printed(*parts: Any) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    for part in parts:
        console.print(part)
    return console.export_text()


def test_the_tables_say_what_a_person_decides_by(home: Home, mlflow: Registry, collected: Any) -> None:
    add(home, mlflow)
    example = json.loads((Path(__file__).parents[1] / "bundle_example" / "bundle.json").read_text("utf-8"))
    collected[1] = {name: example[name] for name in ("gate", "loosened", "tasks", "champion", "sources", "code")}
    text = printed(*shown.version_shown(overview.show(home.settings, 1)))
    assert "nobody asked for a decision yet: facemllm promote request 1" in text
    approve(home, 1, reason="[bold]looked[/] at it")
    text = printed(*shown.version_shown(overview.show(home.settings, 1)))
    assert "promote.champion_margin  1  0.01" in text
    assert "worse than version 0" in text
    assert "95 %" in text
    rules, page = overview.show(home.settings, 1)["rules"], facts.read(example).checks
    assert [(one["state"], one["kind"], one["key"]) for one in rules] == [(c.state, c.kind, c.key) for c in page]
    assert len(rules) == len(example["gate"]["checks"])
    lines = [line.split() for line in text.splitlines()]
    assert all(any(line[:1] == [one["kind"]] and one["key"].split()[0] in line for line in lines) for one in rules)
    assert "[bold]looked[/] at it" in text
    assert max(len(part.partition(".")[2]) for part in text.split() if part.replace(".", "").isdigit()) <= 4
    table = printed(shown.versions_table(overview.list_versions(home.settings)[0]))
    head = "version digest registered gate decision production aliases"
    assert table.split("\n")[0].split() == head.split()
    assert "approved by Ada Lovelace until 2" in table


# releases


class Production:
    """Production's servers, in place of processes; models in `bad` fail their proof, those in `worse` their trial."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.running: Deployed | None = None
        self.bad: set[str] = set()
        self.worse: set[str] = set()
        self.answered: list[str] = []
        monkeypatch.setattr(local_production, "serving", lambda settings: self.running)
        monkeypatch.setattr(local_production, "beside", self.beside)
        monkeypatch.setattr(local_production, "back", self.back)
        monkeypatch.setattr(services, "up", lambda *_: services.Running(1, "http://127.0.0.1:1", False, {}))
        monkeypatch.setattr(services, "down", self.down)
        monkeypatch.setattr(deploy, "_prove", self.prove)
        monkeypatch.setattr(deploy, "Trial", self.trial)
        monkeypatch.setattr("facemllm.serve.release.probes_of", lambda *_: [None])
        monkeypatch.setattr(deploy, "parity_of", lambda *_: lambda url: None)
        monkeypatch.setattr(
            "facemllm.serve.release.ledger",
            SimpleNamespace(require=lambda *_: None, sources_of_model=lambda folder: []),
        )

    @property
    def serves(self) -> str | None:
        return self.running.digest if self.running else None

    def beside(self, settings: Any, model: Deployed, before: Deployed | None) -> tuple[Deployed, services.Running]:
        name = "production-b" if before and before.name == "production-a" else "production-a"
        if before and before.digest == model.digest:
            name = before.name
        return replace(model, name=name), services.Running(1, "http://127.0.0.1:2", False, {})

    def back(self, settings: Any) -> None:
        self.running = servers.deployed(settings, "production")

    def down(self, settings: Any, names: list[str]) -> None:
        self.running = None

    def prove(self, endpoint: deploy.Endpoint, probe: Any) -> None:
        self.answered.append(endpoint.digest)
        if endpoint.digest in self.bad:
            raise UserError("production answers otherwise than evaluation")

    def trial(self, chosen: Any, split: Any, probes: Any) -> Any:
        def run() -> None:
            if split._both[1].digest in self.worse:
                raise UserError("at 10 % of the requests it was worse: slow")

        return SimpleNamespace(run=run)


@pytest.fixture
def production(monkeypatch: pytest.MonkeyPatch) -> Production:
    return Production(monkeypatch)


def recorded(home: Home) -> list[tuple[str, str, str | None]]:
    return [(one.decision, one.model, one.replaces) for one in releases.in_force(home.decisions)]


def test_releases_and_rollbacks_are_recorded(home: Home, mlflow: Registry, production: Production) -> None:
    a, b, c = (add(home, mlflow, number).digest for number in (1, 2, 3))
    for number in (1, 2, 3):
        approve(home, number)
    refuses("no version was released before", release.former, home.settings)
    release.switch(home.settings, 1, "release")
    release.switch(home.settings, 1, "release")  # as a run does every time
    assert recorded(home) == [("release", a, None)]
    refuses("no version was released before", release.former, home.settings)
    release.switch(home.settings, 2, "release")
    release.switch(home.settings, 3, "release")
    assert mlflow.versions[3].aliases == ("champion",)
    champion = registry.champion(home.settings)
    assert champion is not None
    assert (champion.version, champion.digest, champion.evaluation) == (3, c, mlflow.versions[3].evaluation)
    assert release.former(home.settings).version == 2
    release.switch(home.settings, 2, "rollback", "complaints")
    assert release.former(home.settings).version == 1, "not back to the one that was rolled back"
    release.switch(home.settings, 1, "rollback", "more complaints")
    release.switch(home.settings, 3, "release", "mended")
    assert release.former(home.settings).version == 1
    last = [("rollback", b, c), ("rollback", a, b), ("release", c, a)]
    assert recorded(home) == [("release", a, None), ("release", b, a), ("release", c, b), *last]
    rows, notes = overview.list_versions(home.settings)
    assert [row["production"] for row in rows] == [True, False, False]
    assert notes == []


def test_an_alias_moved_by_hand_is_reported_and_changes_nothing(
    home: Home, mlflow: Registry, production: Production
) -> None:
    a = add(home, mlflow, 1)
    add(home, mlflow, 2)
    approve(home, 1)
    release.switch(home.settings, 1, "release")
    mlflow.set_alias(home.settings, 2, "champion")
    champion = registry.champion(home.settings)
    assert champion is not None
    assert champion.version == 1
    _, notes = overview.list_versions(home.settings)
    said = f"MLflow's alias champion was moved to version 2; by signed releases {a.digest[:12]} is in production"
    assert notes == [said]


def test_what_is_not_approved_is_not_released(home: Home, mlflow: Registry, production: Production) -> None:
    version = add(home, mlflow)
    decide.request(home.settings, 1)
    refuses("approvals are missing: 1 x approver", release.switch, home.settings, 1, "release", error=Refused)
    approve(home, 1)
    weights = home.settings.home / "store" / version.digest / "model.safetensors"
    weights.write_bytes(b"other")
    refuses("bytes do not match the digest of version 1", release.switch, home.settings, 1, "release", error=Refused)
    assert (production.answered, recorded(home)) == ([], [])


def test_a_model_that_fails_its_proof_gives_way_to_the_former(
    home: Home, mlflow: Registry, production: Production
) -> None:
    a, b = (add(home, mlflow, number).digest for number in (1, 2))
    approve(home, 1)
    approve(home, 2)
    production.bad = {b}
    refuses("production serves nothing now", release.switch, home.settings, 2, "release")
    production.bad = set()
    release.switch(home.settings, 1, "release")
    for failing in ("bad", "worse"):
        production.bad, production.worse = set(), set()
        setattr(production, failing, {b})
        refuses("production serves version 1 again", release.switch, home.settings, 2, "release")
        assert production.serves == a
        assert recorded(home)[-2:] == [("release", b, a), ("rollback", a, b)]
    assert (
        "version 2 failed: at 10 % of the requests it was worse: slow" in releases.in_force(home.decisions)[-1].reason
    )
    champion = registry.champion(home.settings)
    assert champion is not None
    assert champion.version == 1
    assert release.problem(home.settings) == ""

    decide.decide(home.settings, 1, "revoke", "found a leak", Who(ADA))
    refuses("version 1 could not be put back: .*found a leak", release.switch, home.settings, 2, "release")
    assert production.serves is None


def test_nothing_answers_before_it_is_recorded(
    home: Home, mlflow: Registry, production: Production, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash at any moment: what ever served is among the recorded releases."""
    add(home, mlflow)
    approve(home, 1)

    class Crash(BaseException):
        pass

    def crash(*_: Any) -> None:
        raise Crash

    monkeypatch.setattr(local_production, "beside", crash)
    with pytest.raises(Crash):
        release.switch(home.settings, 1, "release")
    assert [one[0] for one in recorded(home)] == ["release"]
    monkeypatch.setattr(releases, "record", crash)
    monkeypatch.setattr(local_production, "beside", production.beside)
    other = add(home, mlflow, 2)
    approve(home, 2)
    with pytest.raises(Crash):
        release.switch(home.settings, 2, "release")
    assert other.digest not in production.answered


def test_after_a_release_that_was_killed_the_model_that_serves_is_put_back(
    home: Home, mlflow: Registry, production: Production, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c = (add(home, mlflow, number).digest for number in (1, 2, 3))
    for number in (1, 2, 3):
        approve(home, number)
    release.switch(home.settings, 1, "release")

    class Killed(BaseException):
        pass

    def killed(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(local_production, "beside", killed)
    with pytest.raises(Killed):
        release.switch(home.settings, 2, "release")
    assert production.serves == a
    assert "the newest signed release is" in release.problem(home.settings)
    monkeypatch.setattr(local_production, "beside", production.beside)
    production.worse = {c}
    refuses("production serves version 1 again", release.switch, home.settings, 3, "release")
    assert production.serves == a
    assert recorded(home)[-3:] == [("release", b, a), ("release", c, b), ("rollback", a, c)]
    assert release.problem(home.settings) == ""


def test_a_former_model_whose_approval_only_expired_serves_on(
    home: Home, mlflow: Registry, production: Production, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (add(home, mlflow, number).digest for number in (1, 2))
    approve(home, 1)
    approve(home, 2)
    release.switch(home.settings, 1, "release")
    usual = release.authorize

    def expired(digest: str, *rest: Any) -> Any:
        if digest == a:
            raise Refused("expired", "the approval expired")
        return usual(digest, *rest)

    monkeypatch.setattr(release, "authorize", expired)
    production.worse = {b}
    said = "serves version 1 as before, but this could not be recorded: the approval expired"
    refuses(said, release.switch, home.settings, 2, "release")
    assert production.serves == a


def test_of_two_releases_at_once_one_wins_and_the_other_is_told(
    home: Home, mlflow: Registry, production: Production, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (add(home, mlflow, number).digest for number in (1, 2))
    approve(home, 1)
    approve(home, 2)
    with locked(home.settings.home / "signing" / ".release.lock"):
        refuses("another release is under way", release.switch, home.settings, 1, "release")

    usual = Decisions.append

    def slower(self: Decisions, envelope: bytes) -> Any:
        """Another machine's release reaches the repository between what this one saw and its own."""
        monkeypatch.setattr(Decisions, "append", usual)
        releases.record(home.settings, home.decisions, "release", asked(home, a), a, "")
        return usual(self, envelope)

    monkeypatch.setattr(Decisions, "append", slower)
    said = refuses("another release was first", release.switch, home.settings, 2, "release")
    assert a[:12] in said
    assert production.answered == []
    assert recorded(home) == [("release", a, None)]
    release.switch(home.settings, 2, "release")
    assert recorded(home)[-1] == ("release", b, a)


def asked(home: Home, model: str) -> str:
    return next(e.statement.bundle for e in home.decisions.statements(model) if e.statement)


def test_a_release_signed_by_an_approver_or_a_revoked_key_counts_for_nothing(
    home: Home, mlflow: Registry, production: Production
) -> None:
    version = add(home, mlflow)
    approve(home, 1)
    bundle = asked(home, version.digest)
    with pytest.raises(Refused) as refused:
        home.say("release", bundle, ADA, "", role="approver")
    assert refused.value.check == "role"
    release.switch(home.settings, 1, "release")
    policy = home.settings.policy_file
    pipeline = next(key for key in read_policy(policy).keys.values() if key.person == "pipeline")
    revoke_key(policy, pipeline.id, "lost", pipeline.not_before)
    assert releases.in_force(home.decisions) == []
    assert "which no signed release names" in release.problem(home.settings)


# a server's approval


def watched(home: Home, digest: str) -> Approval:
    place = home.settings.home / "signing"
    return Approval(digest, str(place / "decisions"), place / "policy.yaml", place / "server.json")


WITHDRAWN: dict[str, tuple[Callable[[Home, str], object], str]] = {
    "revoked": (lambda home, bundle: home.say("revoke", bundle, GRACE, "leak"), "revoked: "),
    "rejected": (lambda home, bundle: home.say("reject", bundle, GRACE, "leak"), "rejected: "),
    "key revoked": (
        lambda home, bundle: revoke_key(
            home.settings.policy_file,
            home.keys[ADA],
            "lost",
            local.policy(home.settings).keys[home.keys[ADA]].not_before,
        ),
        "revoked_key: ",
    ),
    "history removed": (lambda home, bundle: shutil.rmtree(home.settings.home / "signing/decisions"), "history: "),
}


@pytest.mark.parametrize("case", WITHDRAWN)
def test_a_server_leaves_service_when_its_approval_is_withdrawn(home: Home, tmp_path: Path, case: str) -> None:
    act, check = WITHDRAWN[case]
    model = make_model(tmp_path / "model")
    bundle = home.approve(model)
    approval = watched(home, manifest.of(model).digest)
    found = approval.require()
    assert found.bundle == bundle
    info = approval.info()
    assert ([one["person"] for one in info["approvals"]], info["withdrawn"]) == ([ADA], None)
    heard: list[bool] = []
    changed = threading.Event()
    end = approval.watch(lambda ready: (heard.append(ready), changed.set()), every_s=0.02)
    act(home, bundle)
    assert changed.wait(30)
    assert heard[0] is False
    assert approval.withdrawn.startswith(check)
    assert approval.info()["withdrawn"] == approval.withdrawn
    if case == "revoked":
        changed.clear()
        home.say("approve", bundle, ADA, "mended")
        assert changed.wait(30)
        assert heard == [False, True]
    end.set()


def test_time_alone_and_what_cannot_be_read_end_no_service(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model")
    home.approve(model)
    approval = watched(home, manifest.of(model).digest)
    approval.require()
    for error in (
        Refused("expired", "held until"),
        Refused("clock", "it is"),
        UserError("unreadable"),
        OSError("gone"),
    ):

        def fail(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("facemllm.serve.approval.authorize", fail)
        approval.look()
        assert approval.withdrawn == ""
        with pytest.raises(type(error)):
            approval.require()


def test_the_flags_of_production_name_the_places_of_the_settings(tmp_path: Path) -> None:
    for given in ([], ["promote.decisions=team/decisions", "promote.policy=team/policy.yaml"]):
        settings = load("laptop", [f"storage.home={tmp_path / 'home'}", *given])
        flags = servers.approved_by(settings)
        assert flags["policy"] == settings.policy_file
        assert flags["checkpoint"] == settings.checkpoint.absolute()
        assert str(flags["decisions"]) == Decisions.open(settings, read_policy_of(settings)).place
    address = load("laptop", [f"storage.home={tmp_path}", "promote.decisions=git@example.com:team/decisions.git"])
    assert servers.approved_by(address)["decisions"] == "git@example.com:team/decisions.git"
    command = servers.model_server(address, "production", tmp_path, "d", "1").command
    assert command[command.index("--policy") + 1] == str(address.policy_file)
    assert "--policy" not in servers.model_server(address, "staging", tmp_path, "d", "1").command


def read_policy_of(settings: Any) -> Any:
    if settings.promote.policy is None:
        return local.policy(settings)
    from facemllm.signing.policy import Policy

    return Policy({}, local.new_rule(settings))


def test_a_replayed_release_changes_nothing(home: Home, mlflow: Registry, production: Production) -> None:
    a, b = (add(home, mlflow, number).digest for number in (1, 2))
    approve(home, 1)
    approve(home, 2)
    release.switch(home.settings, 1, "release")
    release.switch(home.settings, 2, "release")
    again = Draft("release", asked(home, a), a, "old", "releaser", home.decisions.previous(a), replaces=None)
    home.decisions.append(sign(again, local.pipeline_signer(home.settings, "releaser")))
    assert recorded(home) == [("release", a, None), ("release", b, a)]


def test_promotion_has_no_circle_of_imports() -> None:
    found = {}
    for path in Path("facemllm/promote").glob("*.py"):
        text = path.read_text("utf-8")
        named = re.findall(r"^from facemllm\.promote import (.+)$", text, re.MULTILINE)
        others = {name.strip() for line in named for name in line.split(",")}
        found[path.stem] = others | set(re.findall(r"^from facemllm\.promote\.(\w+) import", text, re.MULTILINE))
    left = dict(found)
    while free := [name for name, needs in left.items() if not needs & set(left)]:
        for name in free:
            del left[name]
    assert left == {}


# what is approved and does not serve


def test_what_was_approved_since_its_last_release_is_released_once(
    home: Home, mlflow: Registry, production: Production
) -> None:
    settings = home.settings
    assert reconcile.reconcile(settings) == (None, None)
    a, b = (add(home, mlflow, number).digest for number in (1, 2))
    approve(home, 1)
    due, endpoint = reconcile.reconcile(settings)
    assert due is not None
    assert endpoint is not None
    assert (due.digest, endpoint.digest, production.serves) == (a, a, a)
    assert reconcile.reconcile(settings) == (None, None)
    approve(home, 2)
    production.worse.add(b)
    refuses("production serves version 1 again", reconcile.reconcile, settings)
    assert reconcile.due(settings) is None, "it waits for a new approval"
    assert recorded(home) == [("release", a, None), ("release", b, a), ("rollback", a, b)]


def test_a_release_that_was_killed_is_gone_on_with(home: Home, mlflow: Registry, production: Production) -> None:
    a, b = (add(home, mlflow, number).digest for number in (1, 2))
    for number in (1, 2):
        approve(home, number)
        release.switch(home.settings, number, "release")
    production.running = Deployed(Path(), a, "1")
    found = reconcile.due(home.settings)
    assert found == reconcile.Due(b, f"released, and model {a[:12]} serves")
    reconcile.reconcile(home.settings)
    assert recorded(home) == [("release", a, None), ("release", b, a)], "and not recorded twice"


def test_what_somebody_else_released_meanwhile_is_left_alone(
    home: Home, mlflow: Registry, production: Production, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = add(home, mlflow, 1).digest
    approve(home, 1)
    looks = iter([reconcile.Due(digest, "approved"), None])
    monkeypatch.setattr(reconcile, "due", lambda settings: next(looks))
    refuses("released by somebody else meanwhile", reconcile.reconcile, home.settings)
    assert recorded(home) == []
