"""What production's proxy sends where: the model that serves, and a canary with its share of the requests.

All of it is one file, `<home>/services/production.model`, replaced whole: there is no moment in between. A canary holds
its share only as long as the process that drives it lives; when that ends, even killed, everything goes to the model
that served before.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from facemllm.core.files import atomic_write, read_json
from facemllm.core.processes import Identity
from facemllm.core.servers import Deployed


@dataclass(frozen=True)
class Routes:
    """`percent` of the requests go to `canary` while the process `owner` lives, the others to `stable`."""

    stable: Deployed
    canary: Deployed | None = None
    percent: float = 0.0
    owner: Identity | None = None

    @classmethod
    def read(cls, path: Path) -> Routes | None:
        """The routes in a file; None where there is none that can be read."""
        data = read_json(path)
        try:
            canary, owner = data.get("canary"), data.get("owner")
            stable = Deployed.of(data)
            given = Deployed.of(canary) if canary else None, float(data.get("percent", 0)), owner and Identity(**owner)
            return cls(stable, *given)
        except (KeyError, TypeError, ValueError):
            return None

    def write(self, path: Path) -> None:
        """Replace the file in one step."""
        data: dict[str, Any] = asdict(self.stable)
        if self.canary is not None:
            data |= {"canary": asdict(self.canary), "percent": self.percent, "owner": self.owner and asdict(self.owner)}
        atomic_write(path, json.dumps(data, indent=2, default=str).encode())

    def driven(self) -> bool:
        """Whether there is a canary and the process that drives it lives."""
        return self.canary is not None and self.owner is not None and self.owner.process() is not None
