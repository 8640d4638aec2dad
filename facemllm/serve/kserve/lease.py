"""One release at a time: a Lease of Kubernetes, which ends with its holder even if that is killed.

As client-go elects a leader: no clock of another machine is believed. A holder is taken for dead when its lease has not
changed for two minutes of our own, and every change of one is bound to the resource version that was looked at.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from facemllm.core import progress
from facemllm.core.kubernetes import Api, ApiError, Kind, Object
from facemllm.errors import UserError, one_line
from facemllm.serve.target import Superseded

log = logging.getLogger(__name__)

LEASE = Kind("coordination.k8s.io/v1", "Lease", "leases")
_SECONDS, _EVERY_S, _LOOK_S = 120, 30.0, 5.0


class Lease:
    """The lease of this name, while we are its holder."""

    def __init__(self, api: Api, name: str) -> None:
        self._api, self._name = api, name
        self._me = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"

    def acquire(self, taken: str) -> None:
        """Become its holder. Raises UserError with the words `taken` and the holder's name where another one lives."""
        body: Object = {"apiVersion": LEASE.api_version, "kind": LEASE.name, "metadata": {"name": self._name}}
        body["spec"] = self._spec() | {"acquireTime": _now()}
        while (found := self._api.get(LEASE, self._name)) is None:
            try:
                self._api.create(LEASE, body)
                return
            except ApiError as error:
                if error.reason != "AlreadyExists":
                    raise
        if self._alive(found) or not self._written(found, body["spec"]):
            raise UserError(f"{taken} ({found.get('spec', {}).get('holderIdentity')})")

    def keep(self) -> None:
        """Renew it. Raises Superseded where another one holds it meanwhile."""
        while True:
            found = self._api.get(LEASE, self._name)
            holder = (found or {}).get("spec", {}).get("holderIdentity")
            if found is None or holder != self._me:
                who = f"{holder} took" if holder else "somebody removed"
                raise Superseded(f"{who} the lease {self._name} meanwhile; this release stopped and changes nothing")
            if self._written(found, self._spec()):
                return

    def drop(self) -> None:
        """Be its holder no more; where that fails it runs out."""
        with suppress(UserError):
            self.keep()  # nobody takes over what was renewed just now
            self._api.delete(LEASE, self._name)

    def _spec(self) -> Object:
        return {"holderIdentity": self._me, "leaseDurationSeconds": _SECONDS, "renewTime": _now()}

    def _alive(self, found: Object) -> bool:
        """Whether its holder changes it while we look."""
        if not (holder := found.get("spec", {}).get("holderIdentity")):
            return False
        version, until = found["metadata"]["resourceVersion"], self._api.clock() + _SECONDS
        progress.event(note=f"{holder} holds the lease {self._name}; waiting up to {_SECONDS} s to see if it lives")
        while self._api.clock() < until:
            self._api.sleep(_LOOK_S)
            again = self._api.get(LEASE, self._name)
            if again is None or again["metadata"]["resourceVersion"] != version:
                return True
        return False

    def _written(self, found: Object, spec: Object) -> bool:
        """Change what was found; False where somebody else did first."""
        version = found["metadata"]["resourceVersion"]
        try:
            self._api.patch(LEASE, self._name, {"metadata": {"resourceVersion": version}, "spec": spec})
            return True
        except ApiError as error:
            if error.reason not in ("Conflict", "NotFound"):
                raise
            return False


@contextmanager
def held(api: Api, name: str, taken: str) -> Iterator[Lease]:
    """Hold the lease of this name; while another process holds it, UserError with the words `taken` and its name.

    It is renewed meanwhile, and may be taken over when it has not been for two minutes.
    """
    lease, end = Lease(api, name), threading.Event()
    lease.acquire(taken)

    def renew() -> None:
        while not end.wait(_EVERY_S):
            try:
                lease.keep()
            except Superseded as error:
                if not end.is_set():
                    log.warning("%s", error)
                return
            except UserError as error:
                log.warning("the lease %s could not be renewed: %s", name, one_line(error))

    threading.Thread(target=renew, name="lease", daemon=True).start()
    try:
        yield lease
    finally:
        end.set()
        lease.drop()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
