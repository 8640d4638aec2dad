"""The decisions repository: what is added stays, wherever it lies and whoever else writes."""

import base64
import json
import multiprocessing
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from facemllm.core.digests import of_bytes
from facemllm.errors import UserError
from facemllm.signing import statements
from facemllm.signing.authorization import authorize
from facemllm.signing.canonical import Refused, canonical, utc_now
from facemllm.signing.decisions import Decisions
from facemllm.signing.git import Git
from facemllm.signing.standing import standing
from facemllm.signing.statements import PAYLOAD_TYPE, Draft
from tests.refusing import refuses
from tests.signed import MODEL, OTHER, Place, bundle_files, forge, git, sign, signer, usual


def test_what_is_added_is_read(tmp_path: Path) -> None:
    place = Place(tmp_path)
    asked = place.add("pipeline", "request", role="pipeline")
    approved = place.add("ada", "approve")
    read = place.open()
    for entries in (read.statements(MODEL), read.statements()):
        assert [entry.statement for entry in entries] == [asked, approved]
    assert approved.previous == (asked.id,)
    assert read.statements(OTHER) == []
    assert read.bundles() == [place.bundle]
    assert read.bundle(place.bundle)["model"]["digest"] == MODEL
    assert read.bundle_file(place.bundle, "card.md") == b"# face-mllm"
    words = [change.message.split()[0] for change in read.history()]
    assert words == ["bundle", "request", "approve"]
    assert read.history()[-1].commit == read.head == read.statements()[-1].commit
    refuses("no sbom.json", read.bundle_file, place.bundle, "sbom.json")
    refuses("no bundle.json of bundle", read.bundle, OTHER)


def test_adding_again_changes_nothing(tmp_path: Path) -> None:
    place = Place(tmp_path)
    envelope = place.envelope("ada", "request")
    place.open().append(envelope)
    head = place.open().head
    assert place.open().append(envelope).decision == "request"
    place.open().append_bundle(bundle_files())
    place.open().append_signature(MODEL, b"{}")
    place.open().append_signature(MODEL, b"{1}")
    assert place.open().history()[-2].commit == head
    assert (place.open().signature(MODEL), place.open().signature(OTHER)) == (b"{}", None)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"bundle.json": b'{"a": 1}'}, "canonical"),
        ({}, "strict JSON"),
        (bundle_files() | {"more.md": b"x"}, "does not give the digest of more.md"),
        (bundle_files() | {"../x": b"# face-mllm"}, "no file name"),
        (bundle_files() | {"/etc/x": b"# face-mllm"}, "no file name"),
        (bundle_files() | {".git": b"# face-mllm"}, "no file name"),
        (bundle_files() | {"a\nb": b"# face-mllm"}, "no file name"),
        (bundle_files() | {"a/b/c/d": b"# face-mllm"}, "no file name"),
    ],
)
def test_no_such_bundle(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    assert "\n" not in refuses(words, Decisions(tmp_path / "d", usual()).append_bundle, files)


def test_what_is_not_kept(tmp_path: Path) -> None:
    """A statement is refused before it is added, with the check that it fails."""
    place = Place(tmp_path)
    head = place.open().head
    cases = {
        "unknown_key": place.envelope("mallory", "approve"),
        "role": place.envelope("pipeline", "approve"),
        "missing": place.envelope("ada", "approve", bundle=OTHER),
        "other_model": place.envelope("ada", "approve", model=OTHER),
        "history": place.envelope("ada", "approve", previous=("0" * 64,)),
        "not_yet_valid": place.envelope("ada", "approve", issued=utc_now() + timedelta(hours=1)),
        "malformed": b"{}",
    }
    for check, envelope in cases.items():
        with pytest.raises(Refused) as refused:
            place.open().append(envelope)
        assert refused.value.check == check
    assert place.open().head == head


@pytest.mark.parametrize("name", ["with space", "ä漢", "-dash", "quote'\"$(id)", "new\nline", "a:b"])
def test_odd_paths_without_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Neither name, nor home, nor configuration of a user; settings and hooks of git that would get in the way."""
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("GIT_INDEX_FILE", "/nowhere")
    place = Place(tmp_path / name)
    place.add("ada", "request")
    assert len(place.open().statements()) == 1


def test_hooks_and_settings_of_the_repository_do_nothing(tmp_path: Path) -> None:
    place = Place(tmp_path)
    trap = tmp_path / "sprung"
    hooks = place.path / "hooks"
    hooks.mkdir()
    for name in ("reference-transaction", "pre-commit", "post-commit", "pre-push", "update", "post-index-change"):
        (hooks / name).write_text(f"#!/bin/sh\necho {name} >> '{trap}'\n")
        (hooks / name).chmod(0o755)
    for setting in ("core.fsmonitor", "core.pager", "core.editor", "gpg.program", "core.sshCommand", "diff.external"):
        git(place.path, "config", setting, f"touch '{trap}'")
    git(place.path, "config", "commit.gpgSign", "true")
    place.add("ada", "request")
    place.add("ada", "approve")
    assert authorize(MODEL, place.open(), place.policy).approvals
    assert not trap.exists()
    git(place.path, "update-ref", "refs/heads/x", "decisions")
    assert trap.exists(), "the trap works for plain git"


def test_a_missing_object_is_not_fetched(tmp_path: Path) -> None:
    """Git fetches what a partial clone lacks, by a command that the repository's own settings name."""
    place = Place(tmp_path)
    trap, command = tmp_path / "sprung", tmp_path / "command"
    command.write_text(f"#!/bin/sh\ntouch '{trap}'\n")
    command.chmod(0o755)
    for setting in ("extensions.partialClone=o", "remote.o.promisor=true", "remote.o.url=file:///none"):
        git(place.path, "config", *setting.split("="))
    git(place.path, "config", "remote.o.uploadpack", str(command))
    name = git(place.path, "rev-parse", "decisions:bundles")
    (place.path / "objects" / name[:2] / name[2:]).unlink()
    with pytest.raises(Refused, match="missing or damaged"):
        place.open()
    assert not trap.exists()
    subprocess.run(["git", "-C", str(place.path), "cat-file", "-p", name], capture_output=True)
    assert trap.exists(), "the trap works for plain git"


def test_a_work_tree_is_left_alone(tmp_path: Path) -> None:
    """Decisions in a plain repository: nothing is read from its work tree, nothing written to it."""
    plain = tmp_path / "decisions"
    plain.mkdir()
    git(plain, "init", "--quiet", "--initial-branch=main")
    (plain / "statements").symlink_to("/etc")
    place = Place(tmp_path)
    place.add("ada", "request")
    assert git(plain, "rev-list", "--count", "decisions") == "2"
    assert sorted(path.name for path in plain.iterdir()) == [".git", "statements"]


def test_what_is_no_repository(tmp_path: Path) -> None:
    (tmp_path / "decisions").mkdir()
    (tmp_path / "decisions" / "thesis.tex").write_text("x")
    refuses("no git repository", Decisions, tmp_path / "decisions", usual())
    refuses("needs a folder for its copy", Decisions, "https://example.invalid/d.git", usual())
    assert Decisions(tmp_path / "none", usual()).statements() == []
    assert not (tmp_path / "none").exists(), "reading makes nothing"


def remote(folder: Path, bare: bool) -> str:
    repository = folder / "remote"
    repository.mkdir(parents=True)
    git(repository, "init", "--quiet", "--initial-branch=main", *(["--bare"] if bare else []))
    return f"file://{repository}"


@pytest.mark.parametrize("bare", [True, False], ids=["bare", "plain"])
def test_a_remote(tmp_path: Path, bare: bool) -> None:
    """Two machines and one repository at an address: each sees what the other added."""
    address = remote(tmp_path, bare)
    here, there = (Place(tmp_path / name, address=address) for name in ("here", "there"))
    waiting = here.open()
    there.add("pipeline", "request", role="pipeline")
    there.add("ada", "approve")
    waiting.refresh()
    assert standing(waiting, here.policy, here.bundle).state == "approved"
    here.add("bob", "reject")
    with pytest.raises(Refused, match="reject by Bob"):
        authorize(MODEL, there.open(), there.policy)
    assert git(tmp_path / "remote", "rev-list", "--count", "decisions") == "4"


def test_a_remote_out_of_reach(tmp_path: Path) -> None:
    place = Place(tmp_path, address=remote(tmp_path, True))
    place.add("pipeline", "request", role="pipeline")
    place.add("ada", "approve")
    envelope = place.envelope("bob", "approve")
    (tmp_path / "remote").rename(tmp_path / "away")
    allowed = authorize(MODEL, place.open(), place.policy)
    assert allowed.stale is not None
    assert "out of reach" in allowed.stale
    assert "\n" not in refuses("nothing was recorded: .*out of reach", place.open().append, envelope)
    refuses("out of reach", Decisions, place.where, place.policy, None, tmp_path / "other clones")
    (tmp_path / "away").rename(tmp_path / "remote")
    place.open().append(envelope)
    assert authorize(MODEL, place.open(), place.policy).stale is None


def test_a_remote_that_was_rewritten(tmp_path: Path) -> None:
    place = Place(tmp_path, address=remote(tmp_path, True))
    place.add("pipeline", "request", role="pipeline")
    open_all_along = place.open()
    place.add("ada", "approve")
    kept = place.open().head
    open_all_along.refresh()
    envelope = place.envelope("bob", "reject")
    git(tmp_path / "remote", "update-ref", "refs/heads/decisions", "decisions~1")
    with pytest.raises(Refused, match=f"lacks commit {kept}"):
        authorize(MODEL, place.open(), place.policy)
    with pytest.raises(Refused, match=f"commit {kept} is gone, it was rewritten"):
        open_all_along.append(envelope)


def test_pushes_that_race(tmp_path: Path) -> None:
    """Six machines, each with a clone of its own, append at once: nothing is lost, nobody waits for another's lock."""
    address = remote(tmp_path, True)
    places = [Place(tmp_path / str(number), address=address) for number in range(6)]
    places[0].add("pipeline", "request", role="pipeline")
    at_once([(place, "bob", "reject") for place in places])
    found = places[0].open()
    assert counted(found) == {"request": 1, "reject": 6}
    found.verify_history()


def test_eight_approvals_and_eight_rejections_at_once(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.add("pipeline", "request", role="pipeline")
    at_once([(place, "ada", "approve")] * 8 + [(place, "bob", "reject")] * 8)
    found = place.open()
    assert counted(found) == {"request": 1, "approve": 8, "reject": 8}
    assert standing(found, place.policy, place.bundle).state == "rejected"
    with pytest.raises(Refused) as refused:
        authorize(MODEL, found, place.policy)
    assert refused.value.check == "rejected"
    found.verify_history()
    assert not list(tmp_path.glob("**/*.lock")), "no lock is left"
    place.add("ada", "approve")
    assert authorize(MODEL, place.open(), place.policy).approvals, "who has seen all of them may decide anew"


def counted(decisions: Decisions) -> Counter[str]:
    return Counter(entry.statement.decision for entry in decisions.statements(MODEL) if entry.statement)


def at_once(tasks: list[tuple[Place, str, str]]) -> None:
    """Processes that each add one statement, signed before any other's was there, all started by one event."""
    context = multiprocessing.get_context("fork")
    start, failures = context.Event(), context.Queue()

    def work(number: int, place: Place, who: str, decision: str) -> None:
        try:
            envelope = place.envelope(who, decision, reason=f"number {number}")
            ready.wait()
            start.wait()
            place.open(f"checkpoint-{number % 3}.json").append(envelope)
        except BaseException as error:
            failures.put(repr(error))

    ready = context.Barrier(len(tasks) + 1)
    children = [context.Process(target=work, args=(number, *task)) for number, task in enumerate(tasks)]
    for child in children:
        child.start()
    ready.wait()
    start.set()
    for child in children:
        child.join()
    assert failures.empty(), failures.get()


def test_a_killed_writer_leaves_nothing_behind(tmp_path: Path) -> None:
    """Objects without a commit, and a lock whose holder is gone: the next one writes as if nothing was."""
    place = Place(tmp_path)
    (place.path / "objects" / "ab").mkdir(exist_ok=True)
    (place.path / "objects" / "ab" / "tmp_obj_x").write_bytes(b"half")
    (tmp_path / ".decisions.append.lock").write_text("pid 1")
    place.add("ada", "request")
    place.open().verify_history()


def test_a_clock_that_runs_ahead_does_not_stop_others(tmp_path: Path) -> None:
    """A commit of another machine is two minutes ahead: the next follows at its time, and history holds."""
    place = Place(tmp_path)
    forge(place.path, {f"signatures/{OTHER}.json": b"{}"}, at=utc_now() + timedelta(minutes=2))
    place.add("ada", "request")
    place.open().verify_history()
    times = [change.committed_at for change in place.open().history()]
    assert times == sorted(times)
    forge(place.path, {f"signatures/{MODEL}.json": b"{}"}, at=utc_now() + timedelta(days=2))
    with pytest.raises(Refused) as refused:
        place.add("ada", "approve")
    assert refused.value.check == "clock"


def test_a_commit_of_a_forge(tmp_path: Path) -> None:
    """Another committer, a signature by git and a long message are all a forge's right."""
    place = Place(tmp_path)
    tree = git(place.path, "rev-parse", "decisions^{tree}")
    parent = git(place.path, "rev-parse", "decisions")
    at = int(time.time())
    raw = f"tree {tree}\nparent {parent}\nauthor A <a@b> {at} +0200\ncommitter Forge <f@g> {at} +0000\n"
    raw += "gpgsig -----BEGIN PGP SIGNATURE-----\n \n tree 0\n -----END PGP SIGNATURE-----\n\nMerged by Forge\n\nlong\n"
    made = git(place.path, "hash-object", "-w", "-t", "commit", "--stdin", data=raw.encode())
    git(place.path, "update-ref", "refs/heads/decisions", made)
    place.open().verify_history()
    assert place.open().history()[-1].message == "Merged by Forge"


def test_a_rejection_of_another_model_put_in_a_models_folder(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.add("pipeline", "request", role="pipeline")
    place.add("ada", "approve")
    other = place.open().append_bundle(bundle_files(OTHER))
    rejection = place.envelope("bob", "reject", model=OTHER, bundle=other, previous=())
    place.put_statement(rejection, MODEL)
    refused = [entry.refused.check for entry in place.open().statements(MODEL) if entry.refused]
    assert refused == ["other_model"]
    assert authorize(MODEL, place.open(), place.policy).approvals


def test_packed_objects_are_read_as_well(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.add("pipeline", "request", role="pipeline")
    place.add("ada", "approve")
    reader = place.open()
    git(place.path, "gc", "--quiet", "--prune=now")
    assert authorize(MODEL, reader, place.policy) == authorize(MODEL, place.open(), place.policy)


def test_verification_is_of_all_even_when_read_before(tmp_path: Path) -> None:
    """A folder of an old commit is damaged on disk after it was read: the whole history says so, and where."""
    place = Place(tmp_path)
    place.add("ada", "request")
    reader = place.open()
    old = git(place.path, "rev-parse", "decisions~1^{tree}")
    file = place.path / "objects" / old[:2] / old[2:]
    file.unlink()
    reader.refresh()
    with pytest.raises(Refused, match=old[:12]):
        reader.verify_history()


def test_a_thousand_statements(tmp_path: Path) -> None:
    """As many commits, about as many models: read, verified and judged; the time is printed, and no test."""
    place = Place(tmp_path)
    stream, at = [f"reset refs/heads/decisions\nfrom {place.open().head}\n"], int(time.time())
    for number in range(1000):
        model = of_bytes(b"%d" % number)
        draft = Draft("request", place.bundle, model, "x", "requester")
        envelope = sign(draft, signer("ada"))
        path = f"statements/{model}/{of_bytes(envelope)}.json"
        stream.append(
            f"commit refs/heads/decisions\ncommitter x <x@x> {at} +0000\ndata 1\nx\n"
            f"M 100644 inline {path}\ndata {len(envelope)}\n{envelope.decode()}\n"
        )
    git(place.path, "fast-import", "--quiet", data="".join(stream).encode())
    started = time.perf_counter()
    found = place.open().statements()
    took = time.perf_counter() - started
    assert len([entry for entry in found if entry.statement]) == 1000
    print(f"1,000 statements read and verified in {took:.2f} s")


def payload(envelope: bytes) -> bytes:
    from facemllm.signing.statements import opened

    return opened(envelope).payload


def test_a_reader_is_shut_with_its_owner(tmp_path: Path) -> None:
    place = Place(tmp_path)
    before = children()
    for _ in range(3):
        place.open().bundle(place.bundle)
    assert children() == before


def children() -> int:
    found = subprocess.run(["ps", "-o", "args=", "--ppid", str(os.getpid())], capture_output=True, text=True).stdout
    return found.count("cat-file")


def test_the_checkpoint_is_never_moved_back(tmp_path: Path) -> None:
    place = Place(tmp_path)
    early = place.open()
    place.add("ada", "request")
    place.open().remember(utc_now() + timedelta(minutes=1))
    kept = (tmp_path / "checkpoint.json").read_bytes()
    early.remember()
    assert (tmp_path / "checkpoint.json").read_bytes() == kept == canonical(json.loads(kept))
    shutil.rmtree(place.path)
    with pytest.raises(Refused, match="lacks commit"):
        place.open().check()


def test_a_revocation_cannot_be_swallowed_by_who_is_faster(tmp_path: Path) -> None:
    """Whoever sees a statement before it is committed may take its file's name, or add its words with no signature."""
    place = Place(tmp_path)
    place.add("ada", "request")
    place.add("bob", "approve")
    envelope = place.envelope("bob", "revoke")
    place.put({f"statements/{MODEL}/{of_bytes(envelope)}.json": b"{}"})
    with pytest.raises(UserError, match="NOTHING WAS RECORDED"):
        place.open().append(envelope)
    again = place.envelope("bob", "revoke")
    junk = json.loads(again)
    junk["signatures"][0]["sig"] = base64.b64encode(b"x" * 70).decode()
    place.put_statement(json.dumps(junk).encode())
    decisions = place.open()
    decisions.append(again)
    with pytest.raises(Refused) as refused:
        authorize(MODEL, decisions, place.policy)
    assert refused.value.check == "revoked"


def test_a_commit_of_a_time_to_come_hides_no_revocation(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.add("ada", "request")
    place.add("bob", "approve")
    place.put({f"statements/{MODEL}/{'7' * 64}.json": b"{}"}, at=utc_now() + timedelta(days=20_000))
    decisions = place.open()
    with pytest.raises(Refused) as refused:
        authorize(MODEL, decisions, place.policy)
    assert refused.value.check == "clock"
    with pytest.raises(Refused) as refused:
        decisions.append(place.envelope("bob", "approve"))
    assert refused.value.check == "clock"
    decisions.append(place.envelope("bob", "revoke"))
    with pytest.raises(Refused) as refused:
        authorize(MODEL, decisions, place.policy)
    assert refused.value.check == "revoked"


def test_junk_costs_no_signature_and_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What somebody without a key can pile up about a model is looked at once, and not parsed."""
    place = Place(tmp_path)
    place.add("ada", "request")
    place.add("ada", "approve")
    honest, strange = place.envelope("ada", "approve"), "a" * 64
    files = {}
    for number in range(20_000):
        payload = base64.b64encode(b'{"number":%d}' % number).decode()
        signed = {"keyid": strange, "sig": base64.b64encode(b"%d" % number).decode()}
        data = canonical({"payload": payload, "payloadType": PAYLOAD_TYPE, "signatures": [signed]})
        name = of_bytes(data) if number % 2 else of_bytes(b"%d" % number)  # half of them named after something else
        files[f"statements/{MODEL}/{name}.json"] = honest if number % 100 == 0 else data
    pile_up(place, files)
    place.put_statement(place.envelope("bob", "revoke", previous=()))

    counts = Counter[str]()

    def counted(module: Any, name: str, size: Callable[..., int]) -> None:
        usual = getattr(module, name)

        def call(*given: Any) -> Any:
            counts[name] += size(*given)
            return usual(*given)

        monkeypatch.setattr(module, name, call)

    counted(statements, "holds", lambda *_: 1)
    counted(statements, "parse", lambda data, *_: len(data))
    counted(statements, "parse_canonical", lambda data, *_: len(data))
    counted(Git, "objects", lambda *_: 1)
    decisions = place.open()
    refused = pytest.raises(Refused, match="revoke by Bob Noyce")
    with refused:
        authorize(MODEL, decisions, place.policy)
    assert counts["holds"] == 3  # request, approval, revocation
    assert counts["parse"] + counts["parse_canonical"] < 10_000
    counts.clear()
    with refused:
        authorize(MODEL, decisions, place.policy)
    assert counts["objects"] == 0


def pile_up(place: Place, files: dict[str, bytes]) -> None:
    """Add many files in one commit, with one process of git."""
    lines = [b"commit refs/heads/decisions\ncommitter x <x@x> %d +0000\ndata 0\n" % datetime.now(UTC).timestamp()]
    lines.append(b"from refs/heads/decisions^0\n")
    lines += [b"M 100644 inline %s\ndata %d\n%s\n" % (path.encode(), len(data), data) for path, data in files.items()]
    git(place.path, "fast-import", "--quiet", data=b"".join(lines))
