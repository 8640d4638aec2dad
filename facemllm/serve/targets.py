"""Which target `serve.target` names."""

from __future__ import annotations

from facemllm.serve.target import Target
from facemllm.settings import Settings


def target_of(settings: Settings) -> Target:
    """This machine, or KServe (by way of git where it is `gitops`)."""
    if settings.serve.target == "local":
        from facemllm.serve.local.target import Local

        return Local(settings)
    from facemllm.serve.kserve.target import KServe

    return KServe(settings)
