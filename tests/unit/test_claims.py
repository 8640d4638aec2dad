"""Steps at work at once in one home: real processes that are started together, some of them killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from facemllm.core import claims, digests
from facemllm.core.files import settle
from facemllm.core.store import Store
from tests.refusing import refuses

# A component's process: it is ready once everything is loaded, starts at a word, and runs steps as KFP would.
COMPONENT = """
import json, socket, sys
from contextlib import nullcontext
from facemllm.core import claims, digests
if len(sys.argv) > 1:  # another machine, on a volume that keeps no locks between the two
    socket.gethostname = lambda: sys.argv[1]
    claims.claim = lambda *_: nullcontext()
from facemllm.settings import load
from facemllm.workflow.runner import execute
from facemllm.workflow.steps import steps
import facemllm.ingest.run, facemllm.heads.render
digests.of_code("facemllm.ingest.run")
print("ready", flush=True)
for line in sys.stdin:
    step, overrides, inputs = json.loads(line)
    try:
        print(execute(step, load("ci", overrides), **inputs), flush=True)
    except Exception as error:
        print("error:", error, flush=True)
"""
SMALL = ["ingest.images_per_identity=1", "ingest.image_size=32", "ingest.workers=1"]


class Component:
    """A process that runs steps, one after the other."""

    def __init__(self, log: Path, machine: str = "") -> None:
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMPONENT, *([machine] if machine else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("wb"),
            text=True,
        )
        assert self.answer() == "ready"

    def start(self, home: Path, identities: int, *more: str) -> None:
        overrides = [*SMALL, f"storage.home={home}", f"ingest.identities={identities}", *more]
        self.process.stdin.write(json.dumps(["ingest", overrides, {}]) + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Component, Component]]:
    logs = tmp_path_factory.mktemp("logs")
    both = Component(logs / "one"), Component(logs / "other")
    yield both
    for one in both:
        one.kill()


@pytest.fixture(scope="module")
def lone(two: tuple[Component, Component], tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """What a run by itself gives, by the number of people."""
    found = {}
    for identities in (12, 13):
        two[0].start(tmp_path_factory.mktemp("lone"), identities)
        found[identities] = two[0].answer()
    assert all(len(digest) == 64 for digest in found.values())
    assert found[12] != found[13]
    return found


def check(home: Path, *expected: str) -> None:
    """These results are in the store, whole, and nothing else is left."""
    assert sorted(path.name for path in (home / "store").iterdir()) == sorted(expected)
    for digest in expected:
        table = json.loads((home / "store" / digest / "manifest.json").read_text())
        assert table["digest"] == digest
        for shard in table["shards"]:
            assert digests.of_file(home / "store" / digest / shard["name"]) == shard["sha256"]
    assert len(list((home / "keys").glob("*.json"))) == len(expected)
    assert not list((home / "work").glob("*"))


@pytest.mark.parametrize("repetition", range(12))
def test_two_at_once_are_both_right(two, lone, tmp_path: Path, repetition: int) -> None:
    for count in ((12, 13) if repetition % 2 else (12, 12),):
        for component, identities in zip(two, count, strict=True):
            component.start(tmp_path, identities)
        assert [component.answer() for component in two] == [lone[identities] for identities in count]
        check(tmp_path, *{lone[identities] for identities in count})


def test_on_a_volume_without_locks_two_machines_do_the_work_twice_and_both_are_right(lone, tmp_path: Path) -> None:
    apart = Component(tmp_path / "one", "one"), Component(tmp_path / "other", "other")
    for repetition in range(6):
        home = tmp_path / f"home-{repetition}"
        for component in apart:
            component.start(home, 12)
        assert [component.answer() for component in apart] == [lone[12]] * 2
        check(home, lone[12])
    for component in apart:
        component.kill()


def at_work(home: Path) -> claims.Claim:
    """The one step that is at work, once it has begun to write."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (found := claims.claims(home)) and list((home / "work").glob("*/.result-*")):
            return found[0]
        time.sleep(0.01)
    raise AssertionError("nothing is at work")


def test_the_second_of_the_same_waits_for_the_first_says_so_and_recalls_it(two, tmp_path: Path) -> None:
    first, second = two
    first.start(tmp_path, 40)
    assert at_work(tmp_path).step == "ingest"
    os.kill(first.process.pid, signal.SIGSTOP)
    second.start(tmp_path, 40)
    said = f"waiting for process {first.process.pid} on "
    deadline = time.monotonic() + 60
    while said not in second.log.read_text():
        assert time.monotonic() < deadline, second.log.read_text()
        time.sleep(0.01)
    os.kill(first.process.pid, signal.SIGCONT)
    digest = first.answer()
    assert second.answer() == digest
    check(tmp_path, digest)


@pytest.mark.parametrize("same", [True, False])
def test_a_killed_one_leaves_the_other_right(lone, two, tmp_path: Path, same: bool) -> None:
    victim = Component(tmp_path / "log")
    home = tmp_path / "home"
    victim.start(home, 12 if same else 400)
    at_work(home)
    os.kill(victim.process.pid, signal.SIGSTOP)
    two[0].start(home, 12)
    if not same:
        assert two[0].answer() == lone[12], "another key waits for nobody"
    victim.kill()
    if same:
        assert two[0].answer() == lone[12]
        check(home, lone[12])
    else:
        assert [path.name for path in (home / "store").iterdir()] == [lone[12]]
        assert claims.claims(home) == [], "a claim ends with its holder"


def folder(path: Path, text: str) -> Path:
    path.mkdir(parents=True)
    (path / "file").write_text(text)
    return path


def test_a_whole_result_stays_and_a_broken_one_is_replaced(tmp_path: Path) -> None:
    store, digest = Store(tmp_path), digests.of_tree(folder(tmp_path / "first", "whole"))
    kept = store.keep("k" * 64, tmp_path / "first", digest, {})
    inode = kept.stat().st_ino
    with (kept / "file").open() as reader:
        store.keep("j" * 64, folder(tmp_path / "second", "whole"), digest, {})
        assert kept.stat().st_ino == inode, "whoever serves from it goes on doing so"
        (kept / "file").write_text("damaged")
        store.keep("i" * 64, folder(tmp_path / "third", "whole"), digest, {})
        assert reader.read() == "damaged"
    assert digests.of_tree(kept) == digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keys", "store"]
    refuses("cannot write", settle, folder(tmp_path / "fourth", "x"), tmp_path / "keys" / f"{'k' * 64}.json")


def test_what_another_machine_builds_is_left_alone_for_a_day(tmp_path: Path) -> None:
    store = Store(tmp_path)
    work = store.work("k" * 64)
    dead = folder(work / "result-00000000-old", "x")
    live, mine = folder(work / ".result-00000000-new.partial", "x"), folder(work / f"result-{store_host()}-x", "x")
    os.utime(dead, (time.time() - 90_000,) * 2)
    (work / "checkpoint").write_text("to go on from")
    with store.attempt("k" * 64) as out:
        assert out.parent == work
        assert not out.exists()
        assert sorted(path.name for path in work.iterdir()) == sorted([live.name, "checkpoint"])
        assert not mine.exists()
        folder(out, "made")
        store.keep("k" * 64, out, digests.of_tree(out), {})
    assert [path.name for path in work.iterdir()] == [live.name]


def store_host() -> str:
    from facemllm.core.store import _here

    return _here()


def test_nothing_is_forgotten_while_a_step_is_at_work(tmp_path: Path) -> None:
    with claims.claim(tmp_path, "k" * 64, "align", {"conversations": "d" * 64}):
        said = rf"align \(process {os.getpid()} on .*\) is at work in {tmp_path}; wait for it"
        refuses(said, claims.alone(tmp_path).__enter__)
    with claims.alone(tmp_path):
        pass


RESUMING = """
import os, signal, sys
from pathlib import Path
from facemllm.core import digests
from facemllm.core.step import Outcome, Step
from facemllm.settings import load
from facemllm.workflow import runner

def work(c):
    note = c.work / "checkpoint"
    done = int(note.read_text()) if note.exists() else 0
    c.out.mkdir()
    (c.out / "half").write_text("half")
    while done < 9:
        done += 1
        note.write_text(str(done))
        if done == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        print(done, flush=True)
    (c.out / "half").rename(c.out / "whole")
    return Outcome(digests.of_tree(c.out), "made")

step = Step(name="ingest", module="facemllm.ingest.run", sections=lambda s: {}, inputs={}, work=work)
runner.steps = lambda settings: {"ingest": step}
print(runner.execute("ingest", load("ci", [f"storage.home={sys.argv[1]}"])))
"""


def test_a_killed_steps_work_is_taken_up_by_the_next_run_of_the_same_key(tmp_path: Path) -> None:
    def run(home: str, stop: int) -> tuple[int, list[str]]:
        command = [sys.executable, "-c", RESUMING, str(tmp_path / home), str(stop)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        return done.returncode, done.stdout.split()

    alone = run("lone", 0)[1][-1]
    assert run("home", 4) == (-signal.SIGKILL, ["1", "2", "3"])
    assert run("home", 7) == (-signal.SIGKILL, ["5", "6"])
    work = next(path for path in (tmp_path / "home" / "work").iterdir() if path.is_dir())
    assert len(list(work.glob("result-*"))) == 1, "what the first left half-made went when the second began"
    assert run("home", 0) == (0, ["8", "9", alone])
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["keys", "store", "use.lock"]
    assert [path.name for path in (tmp_path / "home" / "store" / alone).iterdir()] == ["whole"]
    assert run("home", 0) == (0, [alone])
