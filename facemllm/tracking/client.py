"""The way to the MLflow server: its address, a client once it is known to answer, and its errors as one line.

`mlflow` is imported inside functions: it takes three seconds, and a refused port should be reported before that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from facemllm.errors import UserError, one_line
from facemllm.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient

PROBE_S = 5.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout belongs to `--json`
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}


def uri(settings: Settings) -> str:
    """Address of the tracking server: `tracking.uri`, or the local one on `services.mlflow_port`."""
    return settings.tracking.uri or f"http://127.0.0.1:{settings.services.mlflow_port}"


def connect(settings: Settings) -> MlflowClient:
    """A client of a server that answers. Raises UserError, within seconds, if there is none or it is not MLflow."""
    address = uri(settings)
    if "://" not in address and address != "databricks":
        raise UserError(f"tracking.uri: '{address}' is no address; give one such as http://127.0.0.1:5000")
    needs_login = address.startswith(("http://", "https://")) and _probe(address)
    with guard(address):
        client = open_client(address)
        if needs_login:
            client.search_experiments(max_results=1)
    return client


@contextmanager
def session(settings: Settings) -> Iterator[MlflowClient]:
    """A client as of `connect`, whose failures inside the block become UserErrors as of `guard`."""
    client = connect(settings)
    with guard(uri(settings)):
        yield client


@contextmanager
def guard(address: str) -> Iterator[None]:
    """Turn what MLflow or the network raises inside the block into a one-line UserError."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield
    except (MlflowException, RequestException) as error:
        raise UserError(f"MLflow at {address}: {one_line(error)}") from error


def _probe(address: str) -> bool:
    """Check that MLflow answers at this address; true when it asks for a login."""
    import requests  # what MLflow itself uses: the same proxies and certificates hold

    mend = "start it with `facemllm services up`, or set tracking.uri"
    insecure = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("1", "true")
    verify = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or not insecure
    try:
        if urlsplit(address).hostname in LOOPBACK:
            _go_direct()
        answer = requests.get(f"{address.rstrip('/')}/version", timeout=PROBE_S, verify=verify)
    except requests.Timeout:
        raise UserError(f"MLflow at {address} does not answer within {PROBE_S:.0f} s; {mend}") from None
    except (requests.RequestException, ValueError) as error:
        if found := re.search(r"\[Errno -?\d+\] ([^'\")]+)", str(error)):
            raise UserError(f"no MLflow server at {address} ({found[1].strip()}); {mend}") from None
        raise UserError(f"{address} does not speak HTTP as MLflow does ({one_line(error, 120)}); {mend}") from None
    if answer.status_code in (401, 403):
        return True
    if not (answer.status_code == 200 and re.match(r"\d+\.\d+", answer.text)):
        raise UserError(
            f"what answers at {address} is not MLflow (GET /version gave {answer.status_code}); "
            "choose another services.mlflow_port, or set tracking.uri"
        )
    return False


def _go_direct() -> None:
    """Keep loopback addresses off a proxy, which could not reach this machine's own ports."""
    for name in ("no_proxy", "NO_PROXY"):
        listed = [part for part in os.environ.get(name, "").split(",") if part]
        os.environ[name] = ",".join([*listed, *(host for host in LOOPBACK if host not in listed)])


def open_client(address: str) -> MlflowClient:
    """A client of this address, unchecked, whose requests outlast a restart of the server (about 15 s)."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=address, registry_uri=address)
