"""What names a result keeps it, alone; what nothing names goes, beside steps at work; what cannot be asked stops it."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from facemllm.cli.main import app
from facemllm.core import claims, servers
from facemllm.core.digests import of_bytes
from facemllm.core.step import step_key
from facemllm.core.store import Store
from facemllm.gc import rubbish as listing
from facemllm.gc import sweep as sweeping
from facemllm.gc.roots import Roots, roots, sharing
from facemllm.gc.rubbish import Rubbish, rubbish
from facemllm.gc.sweep import sweep
from facemllm.promote.records import Records
from facemllm.settings import Settings, load
from facemllm.settings.data import seconds
from facemllm.tables import open_table
from facemllm.version.record import record
from facemllm.workflow.steps import steps
from tests import promoted, signed
from tests.refusing import refuses

DAY = 86_400.0
THING = of_bytes(b"thing")


@pytest.fixture(scope="module")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of MLflow's with its tables, which take seconds to make."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}", f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def settings(tmp_path: Path, empty_mlflow: Path) -> Settings:
    shutil.copyfile(empty_mlflow, tmp_path / "mlflow.db")
    return load("laptop", [f"storage.home={tmp_path / 'home'}", f"storage.runs={tmp_path / 'runs'}", mlflow(tmp_path)])


def mlflow(tmp_path: Path) -> str:
    return f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}"


def aged(path: Path, days: float = 30.0) -> Path:
    """A file or folder with all in it, as if nobody had touched it for so long."""
    at = time.time() - days * DAY
    for one in [*path.rglob("*"), path]:
        os.utime(one, (at, at))
    return path


def stored(settings: Settings, digest: str, step: str = "made", **inputs: str) -> Path:
    """A result in the store, with its record, a month old."""
    promoted.keep(settings.home, step, digest, inputs)
    (settings.home / "store" / digest / "file").write_text("bytes")
    return aged(settings.home / "store" / digest)


def client(settings: Settings) -> MlflowClient:
    return MlflowClient(settings.tracking.uri, settings.tracking.uri)


Naming = Callable[[Settings, Any], Callable[[], object]]
"""Names THING somehow, and gives what takes that back."""


def by_settings(settings: Settings, _: Any) -> Callable[[], object]:
    key = step_key(steps(settings)["ingest"], settings, {})
    facts = {"digest": THING, "step": "ingest", "inputs": {}, "output": THING}
    path = settings.home / "keys" / f"{key}.json"
    path.write_text(json.dumps(facts))
    return path.unlink


def by_run(settings: Settings, _: Any) -> Callable[[], object]:
    run = client(settings).create_run("0", tags={"facemllm.output": THING}).info.run_id
    return lambda: client(settings).delete_run(run)


def by_version(settings: Settings, _: Any) -> Callable[[], object]:
    mine = client(settings)
    mine.create_registered_model("another-profiles")
    tags = {"facemllm.digest": "0" * 64, "facemllm.lineage": json.dumps({"align": THING})}
    made = mine.create_model_version("another-profiles", "file:///nowhere", tags=tags)
    return lambda: mine.delete_model_version("another-profiles", made.version)


def by_decision(settings: Settings, _: Any) -> Callable[[], object]:
    promoted.decisions(settings.home)
    bundle = signed.bundle_files(model=THING)
    signed.Place(settings.signing, signed.usual()).open().append_bundle(bundle)
    return lambda: shutil.rmtree(settings.signing)


def by_revision(settings: Settings, tables: dict[str, Path]) -> Callable[[], object]:
    record(settings, tables["faces"], tables["conversations"])
    digest = open_table(tables["faces"]).digest
    (settings.home / "store" / THING).rename(settings.home / "store" / digest)
    return lambda: shutil.rmtree(settings.home / "data-repo")


def by_server(settings: Settings, _: Any) -> Callable[[], object]:
    servers.note_deployed(settings, "staging", servers.Deployed(Path("/model"), THING, "1"))
    return (settings.home / "services" / "staging.model").unlink


def by_run_folder(settings: Settings, _: Any) -> Callable[[], object]:
    summary = settings.runs / "gentle" / "summary.json"
    summary.parent.mkdir(parents=True)
    summary.write_text(json.dumps({"steps": [{"name": "align", "digest": THING}]}))
    return summary.unlink


def by_step_at_work(settings: Settings, _: Any) -> Callable[[], object]:
    held = claims.claim(settings.home, "k" * 64, "align", {"conversations": THING})
    held.__enter__()
    aged(settings.home / "store" / THING)  # so that it is the claim that keeps it
    return lambda: held.__exit__(None, None, None)


def listed(settings: Settings) -> tuple[Roots, list[Rubbish]]:
    records = Records(settings.home)
    kept = roots([settings], records)
    return kept, rubbish(settings, kept, records, 7 * DAY)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("settings", by_settings),
        ("MLflow run", by_run),
        ("version", by_version),
        ("decision", by_decision),
        ("revision", by_revision),
        ("server", by_server),
        ("run folder", by_run_folder),
        ("step at work", by_step_at_work),
    ],
)
def test_each_root_alone_keeps_its_result(
    settings: Settings, kind: str, name: Naming, faces_table, conversations_table, face_rows, conversation_rows
) -> None:
    rows = face_rows(4)
    tables = {"faces": faces_table(rows, "faces", about={"sources": ["render"]})}
    tables["conversations"] = conversations_table(conversation_rows(rows), "conversations")
    stored(settings, THING)
    take_back = name(settings, tables)
    here = {path.name for path in (settings.home / "store").iterdir()}
    kept, found = listed(settings)
    assert [one.path for one in found if one.what == "result"] == []
    assert {by for digest in here for by, _ in kept.named[digest]} == {kind}
    take_back()
    kept, found = listed(settings)
    assert [one.path.name for one in found if one.what == "result"] == [*here]
    assert here.isdisjoint(kept.named)


def test_a_version_keeps_all_that_is_behind_it_and_was_found_out_about_it(
    settings: Settings, faces_table, conversations_table, face_rows, conversation_rows
) -> None:
    rows = face_rows(4)
    tables = {"ingest": faces_table(rows, "faces", about={"sources": ["render"]})}
    tables["annotate"] = faces_table(rows[2:], "annotated", about={"sources": ["render"]})
    tables["reformat"] = conversations_table(conversation_rows(rows[2:]), "conversations")
    named = promoted.fill(settings.home, tables)
    other = stored(settings, of_bytes(b"other"), "specialize", conversations=named["reformat"])
    stored(settings, of_bytes(b"of other"), "evaluate", conversations=named["reformat"], model=other.name)
    aged(settings.home / "store")
    everything = {path.name for path in (settings.home / "store").iterdir()}
    mine = client(settings)
    mine.create_registered_model("face-mllm")
    version = mine.create_model_version("face-mllm", "file:///x", tags={"facemllm.digest": named["specialize"]})
    gone = {one.path.name for one in listed(settings)[1]}
    assert gone == {other.name, of_bytes(b"of other")}
    assert everything - gone == set(named.values())
    mine.delete_model_version("face-mllm", version.version)
    assert {one.path.name for one in listed(settings)[1]} == everything


def test_what_is_young_or_taken_into_use_stays(settings: Settings) -> None:
    stored(settings, THING)
    other = stored(settings, of_bytes(b"other"))
    aged(other, days=6)
    _, found = listed(settings)
    assert [one.path.name for one in found] == [THING]
    assert found[0].age_s == pytest.approx(30 * DAY, abs=60)
    assert claims.use(settings.home, [THING, "passed", ""]) is False
    assert sweep(settings.home, found, 7 * DAY) == [], "it was taken into use since it was listed"
    aged(settings.home / "store" / THING)
    assert sweep(settings.home, found, 7 * DAY) == found
    assert [path.name for path in (settings.home / "store").iterdir()] == [other.name]
    assert Store(settings.home).records()[THING]["step"] == "made", "what is remembered of it stays"


def test_work_caches_and_leftovers_that_nobody_needs_go(settings: Settings, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(listing.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    home, table = settings.home, stored(settings, THING)
    by_run(settings, None)
    key = step_key(steps(settings)["ingest"], settings, {})[:32]
    stay = [f"work/{key}/checkpoint", f"cache/pixels-{THING[:24]}-12345678.npy", "cache/.pixels-x.npy.lock"]
    stay += ["annotations/replies.sqlite", "dvc-remote/files/x", "mlflow/artifacts/x", "signing/keys/x", "cache/other"]
    go = [f"work/{'a' * 32}/checkpoint", "cache/pixels-000000000000000000000000-12345678.npy", "cache/features-1/0.npy"]
    go += ["store/.x.1.partial/file", ".data-repo.2.partial/file", "cache/kfp/tmp1/x", "cache/kfp/cache/old/x"]
    go += ["work/serving/facemllm-model-1/model/weights", f"work/.{'b' * 32}.lock", "keys/.k.json.3.partial"]
    for name in [*stay, *go]:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("x")
    (tmp_path / "tmp" / "facemllm-model-2").mkdir(parents=True)
    (home / "store" / ("c" * 64)).symlink_to(table)
    aged(home)
    aged(tmp_path / "tmp")
    found = listed(settings)[1]
    whole = {"cache/kfp/cache/old", "work/serving/facemllm-model-1", "store/.x.1.partial", ".data-repo.2.partial"}
    whole |= {f"work/{'a' * 32}", "cache/features-1", "cache/kfp/tmp1", *(name for name in go if name.count("/") == 1)}
    expected = {home / name for name in whole} | {tmp_path / "tmp" / "facemllm-model-2"}
    expected -= {home / ".data-repo.2.partial/file"}
    assert {one.path for one in found} == expected
    assert sweep(home, found, 7 * DAY) == found
    assert not any(path.exists() for path in expected)
    assert all((home / name).exists() for name in stay)
    assert (home / "store" / ("c" * 64)).is_symlink()
    assert listed(settings)[1] == []


AT_WORK = """
import sys, time
from pathlib import Path
from facemllm.core import claims
with claims.claim(Path(sys.argv[1]), "a" * 64, "align", {"conversations": sys.argv[2]}):
    print("at work", flush=True)
    sys.stdin.read()
"""


@contextmanager
def working(home: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process at work under the key aaaa, on THING."""
    command = [sys.executable, "-c", AT_WORK, str(home), THING]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "at work\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_what_a_step_works_with_is_not_touched_until_it_ends_even_killed(settings: Settings) -> None:
    home, work = settings.home, settings.home / "work" / ("a" * 32)
    stored(settings, THING)
    work.mkdir(parents=True)
    (work / "checkpoint").write_text("x")
    features = home / "cache" / "features-1"
    features.mkdir(parents=True)
    aged(home)
    before = listed(settings)[1]
    assert {one.path for one in before} == {work, home / "store" / THING, features}
    with working(home) as process:
        aged(home)
        kept, found = listed(settings)
        assert found == []
        assert kept.named[THING][0][0] == "step at work"
        assert kept.work["a" * 32].startswith(f"align (process {process.pid} on ")
        aged(home / "store")  # as if it had been taken into use long ago
        gone = [one.what for one in sweep(home, before, 7 * DAY)]
        assert gone == ["result"], "what began after the listing is told by its locks; a result by its age"
        assert work.is_dir()
        assert features.is_dir()
    aged(home)
    assert {one.path for one in listed(settings)[1]} == {work, features, home / "work" / f".{'a' * 32}.lock"}


def test_a_sweep_that_is_killed_leaves_nothing_that_looks_whole(settings: Settings, monkeypatch) -> None:
    for name in (b"one", b"two"):
        stored(settings, of_bytes(name))
    _, found = listed(settings)

    def killed(path: Path, **_: Any) -> None:
        (path / "file").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sweeping.shutil, "rmtree", killed)
        refuses(None, sweep, settings.home, found, 7 * DAY, error=KeyboardInterrupt)
    left = sorted((settings.home / "store").iterdir())
    assert len(left) == 2
    assert all(path.name.startswith(".") and path.name.endswith(".partial") for path in left)
    assert Records(settings.home).here == set()
    assert not Store(settings.home).recall(next((settings.home / "keys").iterdir()).stem)
    aged(settings.home)
    _, found = listed(settings)
    assert [one.what for one in found] == ["half-written"] * 2
    assert len(sweep(settings.home, found, 7 * DAY)) == 2
    assert list((settings.home / "store").iterdir()) == []


def unreachable(settings: Settings) -> Settings:
    return settings.model_copy(update={"tracking": settings.tracking.model_copy(update={"uri": "http://127.0.0.1:9"})})


def no_mlflow(settings: Settings) -> Settings:
    promoted.keep(settings.home, "align", of_bytes(b"tracked"), {}, run_id="1234")
    return settings.model_copy(update={"tracking": settings.tracking.model_copy(update={"uri": None})})


def other_mlflow(settings: Settings) -> Settings:
    promoted.keep(settings.home, "align", of_bytes(b"tracked"), {}, run_id="1234")
    return settings


def damaged(name: str) -> Callable[[Settings], Settings]:
    def damage(settings: Settings) -> Settings:
        path = settings.runs.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"half": ')
        return settings

    return damage


def no_policy(settings: Settings) -> Settings:
    promoted.decisions(settings.home)
    settings.policy_file.unlink()
    return settings


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (unreachable, "no MLflow server at http://127.0.0.1:9"),
        (no_mlflow, "has no MLflow of its own: set tracking.uri"),
        (other_mlflow, "knows none of the 1 runs that made these results"),
        (damaged("home/services/production.model"), "production.model cannot be read, so what it names is unknown"),
        (damaged("home/keys/k.json"), "damaged record.*remove that file, or restore it"),
        (damaged("runs/gentle/summary.json"), "summary.json cannot be read"),
        (no_policy, "there are decisions at .*, and no policy file"),
        (damaged("home/data-repo/file"), "is no data repository of ours"),
    ],
)
def test_what_cannot_be_asked_stops_it_with_one_line(settings: Settings, spoil, says: str) -> None:
    stored(settings, THING)
    error = refuses(says, listed, spoil(settings))
    assert "\n" not in str(error or "")
    assert (settings.home / "store" / THING).is_dir()


def test_the_command_lists_removes_on_demand_and_tells_json(settings: Settings, tmp_path: Path) -> None:
    stored(settings, THING)
    keeper = stored(settings, of_bytes(b"kept"))
    client(settings).create_run("0", tags={"facemllm.output": keeper.name})
    where = ["--set", f"storage.home={settings.home}", "--set", f"storage.runs={settings.runs}", "--set"]
    command = ["gc", *where, mlflow(tmp_path)]

    def said(*more: str) -> str:
        done = CliRunner().invoke(app, [*command, *more], catch_exceptions=False)
        assert done.exit_code == 0
        return done.stdout

    text = said()
    assert f"30 d  result          store/{THING[:38]}… " in text
    assert "1 things, 5 B may go; remove them with: --apply" in text
    assert "kept: 1 results (1 by MLflow run)" in text
    assert "nothing may go" in said("--older-than", "31d")
    assert (settings.home / "store" / THING).is_dir()
    facts = json.loads(said("--json", "--apply"))
    assert facts["applied"] is True
    assert [one["path"] for one in facts["rubbish"]] == [str(settings.home / "store" / THING)]
    assert [by[0].split(":")[0] for by in facts["kept"].values()] == ["MLflow run"]
    assert not (settings.home / "store" / THING).exists()
    refuses("an hour or more", CliRunner().invoke, app, [*command, "--older-than", "5s"], catch_exceptions=False)


def test_a_time_is_hours_or_days_and_an_hour_at_least() -> None:
    assert [seconds(text) for text in ("1h", "7d", "1.5d")] == [3600, 7 * DAY, 1.5 * DAY]
    for text in ("59s", "0.5h", "7", "-7d", "d", ""):
        refuses("an hour or more", seconds, text, error=ValueError)
    refuses("gc_older_than", load, "laptop", ["storage.gc_older_than=1m"])


def test_all_profiles_with_the_same_home_are_asked(project: Path) -> None:
    names = {one.profile for one in sharing("laptop", [])}
    assert {"laptop", "faceinsight", "ablation"} <= names
    assert "ci" not in names
    stages = ["train.stages.instruct.steps=3"]
    assert [one.profile for one in sharing("ci", stages)] == ["ci"]


def test_a_profile_that_an_override_does_not_fit_has_the_home_all_the_same(project: Path, tmp_path: Path) -> None:
    (project / "profiles" / "mine.yaml").write_text("ingest: {test_share: 0.5}\n")
    for home in (["@cluster"], [f"storage.home={tmp_path}"]):
        found = sharing("laptop", [*home, "ingest.validation_share=0.6"])
        assert {"mine", "faceinsight"} <= {one.profile for one in found}


@pytest.mark.parametrize("link", ["home/cache/kfp", "home/cache/kfp/outputs", "runs/mine"])
def test_what_a_link_leads_to_is_nobodys_rubbish(settings: Settings, tmp_path: Path, link: str) -> None:
    others = tmp_path / "others"
    for name in ("thesis", ".film.partial"):
        (others / name).mkdir(parents=True)
    (tmp_path / link).parent.mkdir(parents=True)
    aged(others)
    (tmp_path / link).symlink_to(others)
    assert listed(settings)[1] == []
