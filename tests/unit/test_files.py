"""Files that appear whole or not at all, and locks between threads and processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from facemllm.core.files import atomic_file, locked
from facemllm.errors import UserError


@pytest.mark.parametrize("wait_s", [0.0, 0.1])
def test_a_lock_refuses_or_waits_and_leaves_nothing(tmp_path: Path, wait_s: float):
    lock = tmp_path / "work" / ".lock"
    order: list[str] = []

    def second() -> None:
        with locked(lock):
            order.append("second")

    with locked(lock):
        with (
            pytest.raises(UserError, match=rf"^taken \(lock {lock}, pid {os.getpid()}\)$"),
            locked(lock, "taken", wait_s),
        ):
            pass
        waits = threading.Thread(target=second)
        waits.start()
        waits.join(0.1)
        order.append("first")
    waits.join(5)
    assert order == ["first", "second"]
    assert not lock.parent.exists()


def hold(lock: Path, pipe) -> None:
    with locked(lock):
        pipe.send("held")
        signal.pause()


def test_a_killed_holder_leaves_the_lock_to_the_next(tmp_path: Path):
    here, there = multiprocessing.get_context("fork").Pipe()
    holder = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path / "lock", there))
    holder.start()
    assert here.recv() == "held"
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with locked(tmp_path / "lock", "taken"):
        pass


def test_writers_of_the_same_file_do_not_meet_and_old_leftovers_go(tmp_path):
    path, old, new, other = (tmp_path / n for n in ("a.npy", ".b.npy.7.partial", ".c.npy.7.partial", ".d"))
    for left in (old, new, other):
        left.touch()
    for left in (old, other):
        os.utime(left, (time.time() - 90_000,) * 2)
    with atomic_file(path, tidy=True) as one, atomic_file(path) as two:
        one.write_bytes(b"one")
        two.write_bytes(b"two")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "e.npy"):
        pass  # nothing was written
    assert sorted(tmp_path.iterdir()) == [new, other, path]
