"""The way to the MLflow server: its address, a client once it is known to answer, its errors as one line,
and training curves from a worker process, which never hold up the training.

`mlflow` is imported inside functions: it takes three seconds, and a refused port should be reported before that.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from facemllm.core import progress
from facemllm.core.step import CLUSTER_RUN, PARENT_RUN
from facemllm.errors import UserError, one_line
from facemllm.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

PROBE_S, PATIENCE_S = 5.0, 60.0
_PAUSE_S = 1.0
_PART_BYTES = 16 * 2**20
SENT_AT_ONCE = 900  # points a request; MLflow takes 1000
BUFFERED = 200_000  # points kept while the server is away, about 30 MB
Point = tuple[str, float, int, int]
"""Name, value, time in ms, optimiser step."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout belongs to `--json`
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    # where MLflow keeps its artifacts in S3, larger files go there straight, in parts of this size, and not through it
    "MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE": str(_PART_BYTES),
    "MLFLOW_MULTIPART_UPLOAD_CHUNK_SIZE": str(_PART_BYTES),
}


def uri(settings: Settings) -> str:
    """Address of the tracking server: `tracking.uri`, or the local one on `services.mlflow_port`."""
    return settings.tracking.uri or f"http://127.0.0.1:{settings.services.mlflow_port}"


def connect(settings: Settings) -> MlflowClient:
    """A client of a server that answers. Raises UserError, within seconds, if there is none or it is not MLflow; a step
    of a pipeline's run waits `PATIENCE_S` for one that is away: its supervisor may just be starting it again."""
    address = uri(settings)
    if "://" not in address and address != "databricks":
        raise UserError(f"tracking.uri: '{address}' is no address; give one such as http://127.0.0.1:5000")
    served = address.startswith(("http://", "https://"))
    if served:
        wait_for(address, PATIENCE_S if {PARENT_RUN, CLUSTER_RUN} & set(os.environ) else 0)
    with guard(address):
        client = open_client(address)
        if served:
            client.search_experiments(max_results=1)  # `/version` answers without a login and under any host name
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
        if "Invalid Host header" in str(error):
            host = urlsplit(address).netloc
            mend = f"start that server with --allowed-hosts {host}, or set tracking.uri to a name that it goes by"
            raise UserError(f"MLflow at {address} does not go by the name {host}; {mend}") from error
        raise UserError(f"MLflow at {address}: {one_line(error)}") from error


class _Away(UserError):
    """No MLflow answers at an address."""


def wait_for(address: str, patience_s: float = PATIENCE_S) -> None:
    """Raise UserError unless MLflow answers at this address, or asks for a login, within so many seconds."""
    deadline, waited = time.monotonic() + patience_s, False
    while True:
        try:
            return _probe(address)
        except _Away as error:
            if time.monotonic() >= deadline:
                raise
            if not waited:
                progress.event(note=f"{error}; waiting for it, {patience_s:.0f} s at most")
            waited = True
            time.sleep(_PAUSE_S)


def _probe(address: str) -> None:
    import requests  # what MLflow itself uses: the same proxies and certificates hold

    mend = "start it with `facemllm services up`, or set tracking.uri"
    insecure = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("1", "true")
    verify = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or not insecure
    try:
        if urlsplit(address).hostname in LOOPBACK:
            _go_direct()
        answer = requests.get(f"{address.rstrip('/')}/version", timeout=PROBE_S, verify=verify)
    except requests.Timeout:
        raise _Away(f"MLflow at {address} does not answer within {PROBE_S:.0f} s; {mend}") from None
    except (requests.RequestException, ValueError) as error:
        if found := re.search(r"\[Errno -?\d+\] ([^'\")]+)", str(error)):
            raise _Away(f"no MLflow server at {address} ({found[1].strip()}); {mend}") from None
        raise _Away(f"{address} does not speak HTTP as MLflow does ({one_line(error, 120)}); {mend}") from None
    asks_for_login = answer.status_code in (401, 403)
    if not asks_for_login and not (answer.status_code == 200 and re.match(r"\d+\.\d+", answer.text)):
        raise UserError(
            f"what answers at {address} is not MLflow (GET /version gave {answer.status_code}); "
            "choose another services.mlflow_port, or set tracking.uri"
        )


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


class CurveLogger:
    """Logs a run's curves: `curve(step, {"loss": 0.7})` as often as wanted, then `curve.flush()` at the end.

    A call only buffers; a thread sends the points in batches every `interval_s` seconds. When the server is away it
    warns once, keeps the newest 200,000 points, and tries again ever less often. It never raises. Pickles without its
    buffer.
    """

    def __init__(self, uri: str, run_id: str, interval_s: float = 2.0) -> None:
        self.uri, self.run_id, self.interval_s = uri, run_id, interval_s
        self._points: deque[Point] = deque()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._client: MlflowClient | None = None
        self._warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        return CurveLogger, (self.uri, self.run_id, self.interval_s)

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Buffer the metrics of an optimiser step. Values that are no numbers are left out."""
        points = points_of(metrics, step)
        with self._lock:
            self._points.extend(points)
            while len(self._points) > BUFFERED:
                self._points.popleft()
            if self._thread is None:
                self._thread = threading.Thread(target=self._send_until_empty, name="curves", daemon=True)
                self._thread.start()

    def flush(self, timeout_s: float = 15.0) -> bool:
        """Send what is buffered, waiting at most `timeout_s`. False, with a warning, if some could not be sent."""
        deadline = time.monotonic() + timeout_s
        while self._thread is not None:
            if time.monotonic() > deadline:
                log.warning("MLflow at %s: some points of the training curves could not be sent", self.uri)
                return False
            self._wake.set()
            time.sleep(0.02)
        return True

    def _send_until_empty(self) -> None:
        pause = self.interval_s
        while True:
            self._wake.wait(pause)
            self._wake.clear()
            with self._lock:
                if not self._points:
                    self._thread = None  # the next call starts another
                    return
                batch = [self._points.popleft() for _ in range(min(len(self._points), SENT_AT_ONCE))]
            try:
                self._client = self._client or open_client(self.uri)
                send(self._client, self.run_id, batch)
                pause = 0.0 if len(self._points) >= SENT_AT_ONCE else self.interval_s
            except Exception as error:
                with self._lock:
                    self._points.extendleft(reversed(batch))
                if not self._warned:
                    log.warning("MLflow at %s takes no metrics now (%s); keeping them", self.uri, one_line(error))
                    self._warned = True
                pause = min(max(pause, 0.5) * 2, 60.0)


def points_of(metrics: Mapping[str, Any], step: int) -> list[Point]:
    """Metrics of a step as points of now. Characters that MLflow refuses in a name become `_`; non-numbers drop out."""
    now = int(time.time() * 1000)
    points = []
    for name, value in metrics.items():
        with suppress(TypeError, ValueError):
            points.append((re.sub(r"[^/\w.\- :]", "_", name), float(value), now, int(step)))
    return points


def send(client: MlflowClient, run_id: str, points: Sequence[Point], model_id: str | None = None) -> None:
    """Send points to a run, also as metrics of a logged model if one is named. Raises what MLflow raises."""
    from mlflow.entities import Metric

    metrics = [Metric(*point, model_id=model_id) for point in points]
    for start in range(0, len(metrics), SENT_AT_ONCE):
        client.log_batch(run_id, metrics=metrics[start : start + SENT_AT_ONCE])
