"""Free ports for servers of tests. Blocks of them belong to one process of tests while it lives: between looking for a
port and listening on it nobody else takes it, however many such processes run beside each other."""

import fcntl
import socket
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

_BLOCKS = range(21000, 29700, 331)
_RAY_BASES = range(10400, 14800, 400)  # each with the 320 ports after it
_held: dict[int, Any] = {}


def _ours(base: int) -> bool:
    """Whether the block that begins there is this process's, or is so from now on."""
    if base not in _held:
        file = (Path(tempfile.gettempdir()) / f"facemllm-test-ports-{base}").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return False
        _held[base] = file
    return True


def free_port(span: int = 1) -> int:
    """The first of so many ports in a row on which nothing listens now."""
    for base in filter(_ours, _BLOCKS):
        with ExitStack() as stack, suppress(OSError):
            for port in range(base, base + span):
                stack.enter_context(socket.socket()).bind(("", port))
            return base
    raise AssertionError("no free port")


def free_ray_port() -> int:
    """The first of Ray's ports, where nobody listens: a run of the same profile may stand beside the tests."""
    for base in filter(_ours, _RAY_BASES):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", base)) != 0:
                return base
    raise AssertionError("no free ports for Ray")
