"""Descriptions of faces: `annotate(settings, faces, out)`, a Ray Data job over a pluggable annotator.

    facemllm annotate FACES OUT [--estimate]

On a running Ray head 4,000 faces take the oracle a few seconds of one core; starting Ray for itself adds about ten. A
model takes as long as it takes: the job adds a few per cent (`benchmarks/annotation.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the courier is of this package, too, and has to start fast
    from facemllm.settings import Settings


def annotate(settings: Settings, faces: Path, out: Path) -> Mapping[str, Any]:
    """Write `faces` with captions and the annotator's labels to `out`. Returns the manifest.

    Raises UserError if `faces` is no sound table, `out` exists, the ledger forbids it, or the annotator cannot go on.
    """
    from facemllm.annotate import run as step

    return step.annotate(settings, faces, out)


def estimate(settings: Settings, faces: Path) -> Mapping[str, Any]:
    """What `annotate` would ask for, and what that would cost. Raises UserError as `annotate` would."""
    from facemllm.annotate import cost

    return cost.estimate(settings, faces)
