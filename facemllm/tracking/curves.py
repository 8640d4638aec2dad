"""Training curves from a worker process to MLflow, without ever holding up the training."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from facemllm.errors import one_line
from facemllm.tracking.client import open_client

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

SENT_AT_ONCE = 900  # points a request; MLflow takes 1000
BUFFERED = 200_000  # points kept while the server is away, about 30 MB

Point = tuple[str, float, int, int]
"""Name, value, time in ms, optimiser step."""


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
        with contextlib.suppress(TypeError, ValueError):
            points.append((re.sub(r"[^/\w.\- :]", "_", name), float(value), now, int(step)))
    return points


def send(client: MlflowClient, run_id: str, points: Sequence[Point], model_id: str | None = None) -> None:
    """Send points to a run, also as metrics of a logged model if one is named. Raises what MLflow raises."""
    from mlflow.entities import Metric

    metrics = [Metric(*point, model_id=model_id) for point in points]
    for start in range(0, len(metrics), SENT_AT_ONCE):
        client.log_batch(run_id, metrics=metrics[start : start + SENT_AT_ONCE])
