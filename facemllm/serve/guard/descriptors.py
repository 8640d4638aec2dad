"""How many files, connections among them, a process may have open."""

from __future__ import annotations

import resource


def allow_files(enough: int) -> None:
    """Let this process have so many files open, or as many as it may: the 1,024 that are usual are soon taken by
    connections, and then none is answered any more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(enough, hard) if hard >= 0 else enough, hard))
