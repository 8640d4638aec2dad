"""One release at a time: a Lease of Kubernetes, which ends with its holder even if that is killed."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta

from facemllm.core.kubernetes import Api, ApiError, Kind, Object
from facemllm.errors import UserError, one_line

log = logging.getLogger(__name__)

LEASE = Kind("coordination.k8s.io/v1", "Lease", "leases")
_SECONDS, _EVERY_S = 120, 30.0


@contextmanager
def held(api: Api, name: str, taken: str) -> Iterator[None]:
    """Hold the lease of this name; while another process holds it, UserError with the words `taken` and its name.

    It is renewed meanwhile, and may be taken over when it has not been for two minutes.
    """
    me, end = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}", threading.Event()
    _acquire(api, name, me, taken)

    def renew() -> None:
        while not end.wait(_EVERY_S):
            try:
                api.patch(LEASE, name, {"spec": {"renewTime": _now()}})
            except UserError as error:
                log.warning("the lease %s could not be renewed: %s", name, one_line(error))

    renewing = threading.Thread(target=renew, name="lease", daemon=True)
    renewing.start()
    try:
        yield
    finally:
        end.set()
        with suppress(UserError):  # else it runs out
            found = api.get(LEASE, name)
            if found is not None and found["spec"].get("holderIdentity") == me:
                api.delete(LEASE, name)


def _acquire(api: Api, name: str, me: str, taken: str) -> None:
    spec = {"holderIdentity": me, "leaseDurationSeconds": _SECONDS, "acquireTime": _now(), "renewTime": _now()}
    body: Object = {"apiVersion": LEASE.api_version, "kind": LEASE.name, "metadata": {"name": name}, "spec": spec}
    while (found := api.get(LEASE, name)) is None:
        try:
            api.create(LEASE, body)
            return
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
    held = found["spec"]
    if datetime.fromisoformat(held["renewTime"]) + timedelta(seconds=_SECONDS) > datetime.now(UTC):
        raise UserError(f"{taken} ({held.get('holderIdentity')})")
    try:  # of two who take it over, the second finds another resource version
        version = found["metadata"]["resourceVersion"]
        api.patch(LEASE, name, {"metadata": {"resourceVersion": version}, "spec": spec})
    except ApiError as error:
        if error.reason == "Conflict":
            raise UserError(taken) from None
        raise


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
