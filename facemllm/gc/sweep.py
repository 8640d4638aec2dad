"""Removing what may go, beside steps at work: under another name first, then for good.

The first name goes in one step, while nobody can take a result into use; what was used, claimed or changed since it was
listed stays. `.<name>.<random>.partial` is how the project names what is not whole: a sweep that is killed leaves
nothing else, and the next one removes it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from facemllm.core.claims import removing
from facemllm.core.files import beside, locked
from facemllm.errors import UserError
from facemllm.gc.rubbish import Rubbish, age_of, in_use


def sweep(home: Path, found: Sequence[Rubbish], grace_s: float) -> list[Rubbish]:
    """Remove what was found, and return what was removed.

    Raises UserError while another sweep is at work, or where the home cannot be locked.
    """
    gone: list[tuple[Rubbish, Path]] = []
    with locked(home / "gc.lock", f"another gc is at work in {home}"):
        with removing(home):
            for one in found:
                if in_use(home, one.what, one.path) or age_of(one.what, one.path) < grace_s:
                    continue
                if one.what == "lock":
                    with suppress(UserError), locked(one.path, "taken"):  # gone afterwards; renamed, two could hold it
                        gone.append((one, one.path))
                    continue
                aside = one.path if one.what in ("half-written", "private copy") else beside(one.path)
                with suppress(OSError):  # gone meanwhile
                    one.path.rename(aside)
                    gone.append((one, aside))
        for _, aside in gone:
            if aside.is_dir():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.unlink(missing_ok=True)
    return [one for one, aside in gone if not aside.exists()]
