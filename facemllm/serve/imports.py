"""A server's imports, without the optional parts of its libraries that it does not use: a quarter of its start-up."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

UNUSED = (
    "kubernetes_validate",  # kubernetes, for KServe's client: JSON schemas, with a grammar compiled at import
    "accelerate",  # transformers: models over several devices, with boto3
    "scipy",  # transformers: losses of object detectors
)


@contextmanager
def without(names: tuple[str, ...] = UNUSED) -> Iterator[None]:
    """What is imported inside finds no package of these names, unless one is there already; others do afterwards."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)
