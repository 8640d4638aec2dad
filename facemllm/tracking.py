"""MLflow: one run per pipeline run, a nested run per step, with parameters, metrics, tables, figures and lineage tags.

Metric names are stable, so that runs compare:

    <task>/value  <task>/low  <task>/high           figure and 95 % interval; also <task>/n and <task>/unparsed
    <task>/baseline_majority  <task>/baseline_...   what needs no model, or a small one
    <task>/<item>/value ...                         the same for an item of a task (head_pose/yaw, attributes/Smiling)
    seconds  gate/passed  step/<step>/seconds  cost/<stage>/<figure>     on the pipeline's run alone
    train/loss ...                                  whatever the training loop hands to `CurveLogger`, by optimiser step

Tags: `facemllm.run`, `.profile`, `.package`, `.commit`, `.process` on every run; `.step`, `.key`, `.input.<name>`,
`.output` on a step's; `.model`, `.version`, `.gate`, `.approval` on the pipeline's.
`mlflow` is imported inside functions: it takes three seconds, and a refused port should be told before that.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import re
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from facemllm import digests
from facemllm.errors import UserError
from facemllm.settings import Settings, root

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

PROBE_S = 3.0
SENT_AT_ONCE = 900  # metrics a request; MLflow takes 1000
BUFFERED = 200_000  # points of a curve kept while the server is away
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout belongs to `--json`
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}


def uri(settings: Settings) -> str:
    """Address of the tracking server: `tracking.uri`, or the local one on `services.mlflow_port`."""
    return settings.tracking.uri or f"http://127.0.0.1:{settings.services.mlflow_port}"


def connect(settings: Settings) -> MlflowClient:
    """A client of a server that answers. Raises UserError, within seconds, if there is none or it is not MLflow."""
    address = uri(settings)
    needs_login = address.startswith(("http://", "https://")) and _probe(address)
    client = _client(address)
    if needs_login:
        with guard(address):
            client.search_experiments(max_results=1)
    return client


@contextmanager
def guard(address: str) -> Iterator[None]:
    """Turn what MLflow or the network raises inside the block into a one-line UserError."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield
    except (MlflowException, RequestException) as error:
        raise UserError(f"MLflow at {address}: {one_line(error)}") from error


def one_line(error: BaseException, limit: int = 300) -> str:
    """An exception's message as one line of at most `limit` characters; its type when it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _probe(address: str) -> bool:
    """Check that MLflow answers at this address; true when it asks for a login."""
    import httpx

    if urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1"):
        # a proxy set for the company network cannot reach this machine's own ports
        for name in ("no_proxy", "NO_PROXY"):
            os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1,localhost,::1"]))
    mend = "start it with `facemllm services up`, or set tracking.uri"
    try:
        verify = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() != "true"
        answer = httpx.get(f"{address.rstrip('/')}/version", timeout=PROBE_S, verify=verify)
    except httpx.TimeoutException:
        raise UserError(f"MLflow at {address} does not answer within {PROBE_S:.0f} s; {mend}") from None
    except httpx.ConnectError as error:
        raise UserError(f"no MLflow server at {address} ({one_line(error, 80)}); {mend}") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(f"{address} does not speak HTTP as MLflow does ({one_line(error, 80)}); {mend}") from None
    if answer.status_code in (401, 403):
        return True
    if not (answer.status_code == 200 and re.match(r"\d+\.\d+", answer.text)):
        raise UserError(
            f"what answers at {address} is not MLflow (GET /version gave {answer.status_code}); "
            "choose another services.mlflow_port, or set tracking.uri"
        )
    return False


def _client(address: str) -> MlflowClient:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=address, registry_uri=address)


@cache
def commit() -> str | None:
    """Git commit of the project folder, ending in `+changes` when tracked files differ; None outside a repository."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(root()), *words], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def experiment_id(settings: Settings, client: MlflowClient) -> str:
    """Id of the experiment `tracking.experiment`, created if absent. Raises UserError if it was deleted in MLflow."""
    from mlflow.exceptions import MlflowException

    name = settings.tracking.experiment
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:  # another process was quicker, or a real failure, which the look-up then raises
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise UserError(f"experiment '{name}' was deleted in MLflow; restore it there or choose tracking.experiment")
    return str(found.experiment_id)


def start_pipeline(settings: Settings, run_name: str) -> str:
    """Open the run of a pipeline run, with every setting as a parameter. Returns its id."""
    client = connect(settings)
    with guard(uri(settings)):
        tags = _common_tags(settings, run_name)
        run_id = str(client.create_run(experiment_id(settings, client), tags=tags, run_name=run_name).info.run_id)
        _log_params(client, run_id, flatten(settings.model_dump()))
    return run_id


def finish_pipeline(
    settings: Settings, parent_run_id: str, summary: Mapping[str, Any], status: str = "FINISHED"
) -> None:
    """Put a run's headline figures on the pipeline's run and close it, so that runs compare by these runs alone.

    `summary` has the shape of `summary.json`, or the part of it that was reached; `status` is FINISHED, FAILED, KILLED.
    """
    metrics = task_metrics(summary.get("tasks") or {}, items=False)
    if "seconds" in summary:
        metrics["seconds"] = float(summary["seconds"])
    for step in summary.get("steps") or ():
        metrics[f"step/{step['name']}/seconds"] = float(step["seconds"])
    gate, model = summary.get("gate") or {}, summary.get("model") or {}
    if "passed" in gate:
        metrics["gate/passed"] = float(gate["passed"])
    metrics |= numbers(summary.get("cost") or {}, "cost/")
    tags = {
        "facemllm.model": model.get("digest"),
        "facemllm.version": model.get("version"),
        "facemllm.gate": ("passed" if gate["passed"] else "refused") if "passed" in gate else None,
        "facemllm.approval": summary.get("approval"),
    }
    run = StepRun(uri(settings), parent_run_id, connect(settings))
    run.log_metrics(metrics)
    run.set_tags({k: v if isinstance(v, str) else json.dumps(v, default=str) for k, v in tags.items() if v is not None})
    with guard(run.uri):
        run.client.log_dict(parent_run_id, dict(summary), "summary.json")
        run.client.set_terminated(parent_run_id, status)


def reap(settings: Settings, run_name: str) -> list[str]:
    """Mark as KILLED the RUNNING runs of this name whose process is gone. Returns their ids.

    A process of another machine counts as gone: call this where a run of that name begins anew.
    """
    client = connect(settings)
    condition = f"attributes.status = 'RUNNING' and tags.`facemllm.run` = '{_quoted(run_name)}'"
    with guard(uri(settings)):
        runs = client.search_runs([experiment_id(settings, client)], condition, max_results=1000)
        stale = [run for run in runs if not _alive(run.data.tags.get("facemllm.process", ""))]
        for run in stale:
            client.set_terminated(run.info.run_id, "KILLED")
    return [str(run.info.run_id) for run in stale]


@dataclass(frozen=True)
class StepRun:
    """A step's open run. Its methods raise UserError when MLflow fails."""

    uri: str
    run_id: str
    client: MlflowClient

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters; nested mappings become dotted names."""
        with guard(self.uri):
            _log_params(self.client, self.run_id, flatten(params))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers, at an optimiser step if given."""
        with guard(self.uri):
            _log_points(self.client, self.run_id, _points(metrics, step or 0))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; long values are cut at MLflow's 8000 characters."""
        from mlflow.entities import RunTag

        with guard(self.uri):
            self.client.log_batch(self.run_id, tags=[RunTag(name, str(value)[:8000]) for name, value in tags.items()])

    def record(self, key: str, inputs: Mapping[str, str], output: str | None = None) -> None:
        """Tag the run with its store key, the digests of its inputs and, when there is one, of its result."""
        tags = {"facemllm.key": key} | {f"facemllm.input.{name}": digest for name, digest in inputs.items()}
        self.set_tags(tags if output is None else tags | {"facemllm.output": output})

    def log_table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Record a table (column name -> values) as `<name>.json`, which MLflow's evaluation view opens."""
        if len({len(values) for values in columns.values()}) > 1:
            raise ValueError(f"table {name}: columns differ in length")
        with guard(self.uri):
            self.client.log_table(self.run_id, {k: list(v) for k, v in columns.items()}, f"{name}.json")

    def log_figure(self, name: str, figure: Figure) -> None:
        """Record a matplotlib figure as `<name>.png`."""
        with guard(self.uri):
            self.client.log_figure(self.run_id, figure, f"{name}.png")

    def log_text(self, name: str, text: str) -> None:
        """Record a text as the file `name`."""
        with guard(self.uri):
            self.client.log_text(self.run_id, text, name)

    def log_artifacts(self, folder: Path, path: str | None = None) -> None:
        """Record all files of a folder, under `path`."""
        with guard(self.uri):
            self.client.log_artifacts(self.run_id, str(folder), path)

    def curve(self) -> CurveLogger:
        """A callable that logs training metrics to this run from any process."""
        return CurveLogger(self.uri, self.run_id)


@contextmanager
def step_run(settings: Settings, parent_run_id: str | None, step: str) -> Iterator[StepRun]:
    """A run for one step, nested in the pipeline's if there is one. It ends FINISHED, FAILED or KILLED as the block does.

    A failure of MLflow while closing never hides what the block raised.
    """
    client, address = connect(settings), uri(settings)
    with guard(address):
        parent = client.get_run(parent_run_id).data.tags if parent_run_id else {}
        tags = _common_tags(settings, parent.get("facemllm.run", step)) | {"facemllm.step": step}
        if parent_run_id:
            tags["mlflow.parentRunId"] = parent_run_id
        created = client.create_run(experiment_id(settings, client), tags=tags, run_name=step)
    run = StepRun(address, str(created.info.run_id), client)
    try:
        yield run
    except BaseException as error:
        with contextlib.suppress(UserError), guard(address):
            client.set_terminated(run.run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
            client.set_tag(run.run_id, "facemllm.error", one_line(error, 1000))
        raise
    with guard(address):
        client.set_terminated(run.run_id, "FINISHED")


class CurveLogger:
    """Logs training curves from a worker process: `curve(step, {"train/loss": 0.7})`, then `curve.flush()` at the end.

    A call only buffers; a thread sends the points in batches every `interval_s` seconds. When the server is away, it
    warns once, keeps up to 200,000 points (then drops the oldest), and tries again, ever less often. It never raises.
    Pickles without its buffer.
    """

    def __init__(self, uri: str, run_id: str, interval_s: float = 2.0) -> None:
        self.uri, self.run_id, self.interval_s = uri, run_id, interval_s
        self._points: deque[_Point] = deque()
        self._unsent = 0  # buffered, or on the way
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._client: MlflowClient | None = None
        self._warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        return CurveLogger, (self.uri, self.run_id, self.interval_s)

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Buffer the metrics of an optimiser step. Values that are no numbers are left out."""
        points = _points(metrics, step)
        with self._lock:
            self._points.extend(points)
            while len(self._points) > BUFFERED:
                self._points.popleft()
            self._unsent = max(self._unsent, 0) + len(points)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="curves", daemon=True)
                self._thread.start()

    def flush(self, timeout_s: float = 15.0) -> bool:
        """Send what is buffered, waiting at most `timeout_s`. False, with a warning, if some could not be sent."""
        deadline = time.monotonic() + timeout_s
        while self._thread is not None and time.monotonic() < deadline:
            self._wake.set()
            time.sleep(0.02)
        left = self._thread is not None
        if left:
            log.warning("MLflow at %s: some points of the training curves could not be sent", self.uri)
        return not left

    def _run(self) -> None:
        pause = self.interval_s
        while True:
            self._wake.wait(pause)
            self._wake.clear()
            with self._lock:
                if not self._points:
                    self._thread = None
                    return
                batch = [self._points.popleft() for _ in range(min(len(self._points), SENT_AT_ONCE))]
            try:
                self._client = self._client or _client(self.uri)
                _log_points(self._client, self.run_id, batch)
            except Exception as error:
                with self._lock:
                    self._points.extendleft(reversed(batch))
                if not self._warned:
                    log.warning("MLflow at %s takes no metrics now (%s); keeping them", self.uri, one_line(error))
                    self._warned = True
                pause = min(pause * 2, 60.0)
            else:
                pause = 0.0 if len(self._points) >= SENT_AT_ONCE else self.interval_s


def task_metrics(tasks: Mapping[str, Any], prefix: str = "", *, items: bool = True) -> dict[str, float]:
    """Figures of tasks (the `tasks` of a summary or of `metrics.json`) under their stable metric names."""
    flat: dict[str, float] = {}
    for name, figures in tasks.items():
        base = f"{prefix}{name}"
        chosen = {field: figures.get(field) for field in ("value", "low", "high", "n", "unparsed")}
        flat |= numbers(chosen, f"{base}/")
        baselines = figures.get("baselines") or {}
        values = {k: v.get("value") if isinstance(v, Mapping) else v for k, v in baselines.items()}
        flat |= numbers(values, f"{base}/baseline_")
        if items:
            flat |= task_metrics(figures.get("items") or {}, f"{base}/")
    return flat


def numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a nested mapping, by names joined with `/`; everything else is left out."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            flat[f"{prefix}{name}"] = float(value)
    return flat


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values under dotted names, as the strings MLflow keeps (JSON for anything but a string)."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


_Point = tuple[str, float, int, int]  # name, value, time in ms, step


def _points(metrics: Mapping[str, Any], step: int) -> list[_Point]:
    now = int(time.time() * 1000)
    points = []
    for name, value in metrics.items():
        with contextlib.suppress(TypeError, ValueError):
            points.append((re.sub(r"[^/\w.\- :]", "_", name), float(value), now, int(step)))
    return points


def _log_points(client: MlflowClient, run_id: str, points: Sequence[_Point]) -> None:
    from mlflow.entities import Metric

    for start in range(0, len(points), SENT_AT_ONCE):
        client.log_batch(run_id, metrics=[Metric(*point) for point in points[start : start + SENT_AT_ONCE]])


def _log_params(client: MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    every = [Param(name, value[:6000]) for name, value in params.items()]
    for start in range(0, len(every), 100):
        client.log_batch(run_id, params=every[start : start + 100])


def _common_tags(settings: Settings, run_name: str) -> dict[str, str]:
    tags = {
        "facemllm.run": run_name,
        "facemllm.profile": settings.profile,
        "facemllm.package": digests.of_package(),
        "facemllm.process": _process(),
    }
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    if head := commit():
        tags |= {"facemllm.commit": head, "mlflow.source.git.commit": head.removesuffix("+changes")}
    return tags


def _process() -> str:
    """This process as `host/pid/start time`: a process id alone is given again to others."""
    import psutil

    return f"{socket.gethostname()}/{os.getpid()}/{psutil.Process().create_time():.2f}"


def _alive(process: str) -> bool:
    import psutil

    host, _, rest = process.partition("/")
    pid, _, started = rest.partition("/")
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        return f"{psutil.Process(int(pid)).create_time():.2f}" == started
    except psutil.Error:
        return False


def _quoted(text: str) -> str:
    """A run name as it stands in a filter. Raises UserError for one that MLflow's filter language cannot hold."""
    if "'" in text:
        raise UserError(f"run name {text!r}: leave out the apostrophe")
    return text
