"""A process that is tied to another ends with it, also where a shell stands between them."""

import signal
import subprocess
import sys

TIED = """
import sys, time
from facemllm.core.machine import die_with
die_with(int(sys.argv[1]))
print('tied', flush=True)
"""


def test_a_process_ends_with_the_one_it_is_tied_to() -> None:
    engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    step = subprocess.Popen(
        [sys.executable, "-c", f"{TIED}time.sleep(60)", str(engine.pid)], stdout=subprocess.PIPE, text=True
    )
    assert step.stdout is not None
    assert step.stdout.readline() == "tied\n"
    assert step.poll() is None
    engine.kill()
    engine.wait()
    assert step.wait(timeout=10) == -signal.SIGKILL


def test_a_process_whose_engine_is_gone_ends_too() -> None:
    engine = subprocess.Popen([sys.executable, "-c", ""])
    engine.wait()
    tied = [sys.executable, "-c", f"{TIED}time.sleep(60)", str(engine.pid)]
    assert subprocess.run(tied, timeout=30, stdout=subprocess.DEVNULL).returncode == -signal.SIGKILL
