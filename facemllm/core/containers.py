"""What a pod asks for, by its settings, in Kubernetes' words: shared by all that writes pods itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from facemllm.settings.cluster import Pod, Variables

USER = 10001
"""Of the image."""
RESTRICTED: Mapping[str, Any] = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
"""The security context of every container."""


def resources(pod: Pod, gpus: bool = True) -> dict[str, Any]:
    """Equal requests and limits; without its `gpus` where another container of the pod computes."""
    asked = {"cpu": str(pod.cpu), "memory": str(pod.memory)}
    if gpus and pod.gpus:
        asked[str(pod.accelerator)] = str(pod.gpus)
    return {"requests": asked, "limits": dict(asked)}


def references(kind: str, given: Mapping[str, Variables] | None) -> Iterator[dict[str, Any]]:
    """Environment variables out of Secrets (`kind` secretKeyRef) or ConfigMaps (configMapKeyRef)."""
    for source, chosen in (given or {}).items():
        for key, variable in chosen.env.items():
            reference = {"name": source, "key": key, **({"optional": True} if chosen.optional else {})}
            yield {"name": variable, "valueFrom": {kind: reference}}
