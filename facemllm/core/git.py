"""Git as a command: it asks nobody, says what goes wrong in English, and is deaf to the variables that steer git."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

from facemllm.errors import UserError


def environment(**more: str) -> dict[str, str]:
    """The variables of a git command: this process's without git's own, and `more`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    return {**kept, "LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", **more}


def run(
    command: Sequence[str],
    variables: dict[str, str],
    purpose: str,
    data: bytes = b"",
    wait_s: float | None = None,
    place: object = "the repository",
) -> subprocess.CompletedProcess[bytes]:
    """A git command that has ended, well or not. `purpose` says what needs git, `place` what `wait_s` is waited for.

    Raises UserError when git is not installed, or gives no answer in that time.
    """
    try:
        return subprocess.run(command, env=variables, input=data, capture_output=True, timeout=wait_s)
    except FileNotFoundError:
        raise UserError(f"git is not installed; {purpose} (apt install git)") from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"git gave no answer in {wait_s:g} s; is {place} reachable, and are all of its files plain ones?"
        ) from None
