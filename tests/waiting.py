"""Waiting for what other processes do."""

import subprocess
import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str] | None = None, seconds: float = 60):
    """Until it holds; the process that is to bring it about must live as long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
