"""Where models are put into service: what staging, a release and its trial ask of this machine, or of KServe."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from facemllm.core.servers import Deployed
from facemllm.errors import UserError
from facemllm.serve.canary import Side


class Superseded(UserError):
    """Another release has taken over: this one may change nothing any more."""


@dataclass(frozen=True)
class Endpoint:
    """A model in service; `pid` is its server's, 0 where it is not of this machine. `adopted` is true when the same
    model served already."""

    stage: str
    url: str
    model: str
    digest: str
    pid: int
    adopted: bool

    @property
    def predict_url(self) -> str:
        """Where questions are posted (KServe's V1 protocol)."""
        return f"{self.url}/v1/models/{self.model}:predict"


class Split(Protocol):
    """Production's requests, shared by the model that serves and a new one, the canary."""

    def share(self, percent: float) -> None:
        """Give the canary its share, and count anew. Raises UserError where it does not get it."""

    def sides(self, *, latency: bool) -> tuple[Side, Side]:
        """What both did since then, the canary second. Raises UserError where that is not known any more."""

    def ask(self, canary: bool, body: Any) -> httpx.Response | None:
        """Post a question to one of both; None where that gets no request any more. Raises httpx.HTTPError."""

    def close(self) -> None:
        """Ask nothing more."""


class Target(Protocol):
    """Staging and production. Whoever changes production is in `held`; nothing gets there but by `put`.

    `keeps_adopted`: what serves already goes on where it cannot be proved again (the network between may have failed).
    """

    keeps_adopted: bool

    def held(self) -> AbstractContextManager[object]:
        """Keep other releases away. Raises UserError when one is under way; what changes production in the block raises
        Superseded once another one has taken over."""

    def serving(self) -> Deployed | None:
        """The model that production's requests go to."""

    def put(self, model: Deployed, before: Deployed | None) -> Endpoint:
        """Have a model run beside the one that serves, and get no request yet; the endpoint is its own. The one that
        serves, where it is the same in every way. Raises UserError when it does not start."""

    def split(self) -> Split:
        """The requests, to be shared by the two."""

    def keep(self) -> str:
        """Have what was put serve alone. Returns production's address. Raises UserError where another one answers."""

    def back(self) -> None:
        """Give every request to the model that served before, and end the one that was put."""

    def down(self) -> None:
        """Have nothing serve."""

    def stage(self, model: Deployed) -> Endpoint:
        """Serve a model as staging. Raises UserError when it does not start."""

    def unstage(self) -> None:
        """End staging."""

    def staged(self, model: Deployed) -> None:
        """Note a model that has proved itself in staging."""
