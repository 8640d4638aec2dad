"""The audit: who decided what when in place of what, what counts for nothing and why, and a history that only grows."""

import json
from datetime import timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from facemllm.cli.main import app
from facemllm.promote import notices
from facemllm.promote.audit import as_text, audit, verify
from facemllm.settings import Settings
from facemllm.signing.canonical import Refused, utc_now
from facemllm.signing.policy import write_policy
from tests import promoted, signed
from tests.refusing import refuses

SECOND = signed.OTHER


@pytest.fixture
def home(tmp_path: Path) -> Settings:
    return promoted.settings_of(tmp_path / "home")


@pytest.fixture
def place(home: Settings) -> signed.Place:
    """Version 1 was asked for, approved and released; then version 2 in its place, and rolled back."""
    place = promoted.decisions(home.home)
    files = signed.bundle_files(SECOND, name="face-mllm")
    whole = json.loads(files["bundle.json"])
    whole["model"]["version"] = 2
    files["bundle.json"] = signed.canonical(whole)
    second = {"model": SECOND, "bundle": place.open().append_bundle(files)}
    place.add("pipeline", "request", role="pipeline", reason="run laptop")
    place.add("ada", "approve")
    place.add("pipeline", "release", reason="")
    place.add("ada", "request", reason="better at ages", **second)
    place.add("bob", "approve", **second)
    place.add("pipeline", "release", reason="", replaces=signed.MODEL, **second)
    place.add("pipeline", "rollback", reason="wrong about glasses", replaces=SECOND)
    return place


def run(home: Settings, *words: str) -> tuple[int, str]:
    where = ["--set", f"storage.home={home.home}", "--set", "tracking.uri=http://127.0.0.1:9"]
    done = CliRunner().invoke(app, ["audit", *words, *where])
    return done.exit_code, done.stdout


def test_who_did_what_in_place_of_what(home, place) -> None:
    rows = audit(home)
    done = [(row["decision"], row["person"], row["version"][:11], row["replaces_version"]) for row in rows]
    one, two = f"face-mllm 1 ({signed.MODEL[:12]})", f"face-mllm 2 ({SECOND[:12]})"
    assert done == [
        ("request", "pipeline", one[:11], None),
        ("approve", "Ada Lovelace", one[:11], None),
        ("release", "pipeline", one[:11], None),
        ("request", "Ada Lovelace", two[:11], None),
        ("approve", "Bob Noyce", two[:11], None),
        ("release", "pipeline", two[:11], one),
        ("rollback", "pipeline", one[:11], two),
    ]
    assert [row["refused"] for row in rows] == [None] * 7
    text = as_text(rows)
    assert f"in place of {two}; wrong about glasses" in text
    assert f"{utc_now():%Y-%m-%d}" in text.splitlines()[0]
    assert "Bob Noyce (approver)" in text
    code, out = run(home, "--json")
    assert (code, json.loads(out)["statements"]) == (0, rows)
    assert run(home)[1].rstrip("\n") == text


@pytest.mark.parametrize("name", ["2", "v2", SECOND[:8], SECOND])
def test_of_one_version_alone(home, place, name) -> None:
    assert {row["model"] for row in audit(home, name)} == {SECOND}
    assert len(audit(home, name)) == 3


def test_a_version_nobody_decided_about_is_a_line(home, place) -> None:
    refuses("no signed decision is about version '9', and no MLflow server", audit, home, "9")
    assert audit(home, "abcdef") == []


def test_what_counts_for_nothing_says_which_check_failed(home, place) -> None:
    mallory = signed.sign(
        signed.Draft("approve", place.bundle, signed.MODEL, "trust me", "approver"), signed.signer("mallory")
    )
    place.put_statement(mallory)
    good = json.loads(place.envelope("ada", "approve", reason="again"))
    good["signatures"][0]["sig"] = json.loads(mallory)["signatures"][0]["sig"]
    place.put_statement(signed.canonical(good))
    rows = audit(home)
    assert [row["refused"] for row in rows[7:]] == ["unknown_key", "signature"]
    assert {row["person"] for row in rows[7:]} == {None}, "an unsigned name is not repeated"
    text = as_text(rows)
    assert "COUNTS FOR NOTHING (unknown_key)" in text
    assert "trust me" not in text
    known = signed.usual(signed.FOUR_EYES)
    write_policy(home.home / "signing" / "policy.yaml", known)
    assert "role" in {row["refused"] for row in audit(home)}, "the pipeline may not ask by this policy"


def test_an_approval_by_who_asked_counts_for_nothing_where_the_policy_says_so(home) -> None:
    place = promoted.decisions(home.home)
    place.add("ada", "request")
    place.add("ada", "approve")
    assert [row["refused"] for row in audit(home)] == [None, None]
    write_policy(home.home / "signing" / "policy.yaml", signed.usual(signed.FOUR_EYES))
    assert [row["refused"] for row in audit(home)] == [None, "requester"]


def test_verify_names_the_first_commit_that_does_not_only_add(home, place) -> None:
    assert run(home, "verify") == (0, f"9 commits only ever added; 7 statements; head {place.open().head[:12]}\n")
    statement = next(row for row in audit(home) if row["decision"] == "approve")
    path = place.file_of(statement["id"])
    bad = signed.forge(place.path, {path: b"{}"})
    signed.forge(place.path, {f"statements/{signed.MODEL}/{'8' * 64}.json": b"{}"})
    assert bad[:12] in refuses(None, verify, home, error=Refused)
    done = CliRunner().invoke(app, ["audit", "verify", "--set", f"storage.home={home.home}"])
    assert done.exit_code == 1
    assert isinstance(done.exception, Refused)


@pytest.mark.parametrize("how", ["dropped", "backdated", "rewound", "removed"])
def test_verify_sees_what_was_taken_away_or_dated_back(home, place, how) -> None:
    verify(home)
    decisions = place.open("checkpoint.json")
    decisions.remember()
    statement = next(row for row in audit(home) if row["decision"] == "approve")
    path = place.file_of(statement["id"])
    if how == "dropped":
        bad = signed.forge(place.path, {}, remove=(path,))
        assert bad[:12] in refuses(None, verify, home, error=Refused)
    elif how == "backdated":
        early = utc_now() - timedelta(days=9)
        bad = signed.forge(place.path, {f"statements/{signed.MODEL}/{'8' * 64}.json": b"{}"}, at=early)
        assert bad[:12] in refuses(None, verify, home, error=Refused)
    elif how == "rewound":
        signed.git(place.path, "update-ref", "refs/heads/decisions", "refs/heads/decisions~2")
        refuses(None, verify, home, error=Refused)
    else:
        place.path.rename(place.path.with_name("elsewhere"))
        refuses(None, verify, home, error=Refused)


def test_before_anybody_decided_nothing_is_made(home) -> None:
    assert run(home) == (0, "nobody has asked for a decision yet\n")
    assert run(home, "verify") == (0, "nobody has asked for a decision yet\n")
    assert not home.home.exists()


def test_approvals_about_to_expire_are_told_once_each(home, place, monkeypatch) -> None:
    notified: list[tuple[str, str]] = []
    monkeypatch.setattr(notices, "notify", lambda settings, event, facts: not notified.append((event, facts["model"])))
    assert notices.tell_expiring(home, 30) == []
    [one, two] = notices.tell_expiring(home, 91)
    assert notified == [("expiring", signed.MODEL), ("expiring", SECOND)]
    assert (one["version"], one["person"]) == (1, "Ada Lovelace")
    assert set(two) <= {*notices.FACTS, "sent"}
    place.add("bob", "revoke", reason="wrong about glasses", model=SECOND, bundle=two["bundle"])
    assert len(notices.tell_expiring(home, 91)) == 1
    assert notices.tell_expiring(home, 91, utc_now() + timedelta(days=200)) == []
    done = CliRunner().invoke(app, ["promote", "notify", "--expiring", "9", "--set", f"storage.home={home.home}"])
    assert done.exit_code == 1
    assert "nobody would hear of it" in str(done.exception)


def test_a_notice_that_reaches_nobody_fails_the_cron_job_and_is_one_line(home, place, monkeypatch, caplog) -> None:
    monkeypatch.setattr(notices, "LIMIT_S", 0.2)
    monkeypatch.setenv("FACEMLLM_WEBHOOK_SECRET", "s")
    where = ["--set", f"storage.home={home.home}", "--set", "promote.notify.webhook=http://127.0.0.1:9/"]
    done = CliRunner().invoke(app, ["promote", "notify", "--expiring", "100", *where])
    assert done.exit_code == 1
    assert "2 of 2 notices did not reach everybody" in str(done.exception)
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == ["notice 'expiring' was not sent"] * 2
