"""A stand-in for the REST API of Kubeflow Pipelines 2.17, on loopback: its paths, bodies and refusals.

It takes nobody at their word: a token or a session that it knows, a namespace that is theirs, a spec of the right form.
Runs go on by one task each time that somebody looks at them, unless `runs_by` has them really run
(tests/kfp_workflow.py).
"""

from __future__ import annotations

import json
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.parser import BytesParser
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.answering import Answering, Loopback

Body = dict[str, Any]
API = "/apis/v2beta1"
TOKEN, SESSION = "a-token", "authservice_session=a-session"


class Refused(Exception):
    """An answer other than 200: its status, and KFP's message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Kubeflow:
    """What the API holds, and how it behaves. `away` requests are cut off, `busy` ones answered with 503, or with 429
    and `busy_for` seconds to wait, `pages` are those of a login; `failing` are steps whose next attempt fails,
    `undriven` those whose driver does; `hidden` lists of experiments are empty; `looks` is called before a run is
    shown; `runs_by` runs a new run, in a thread."""

    def __init__(self) -> None:
        self.tokens, self.sessions, self.namespaces = {TOKEN}, {SESSION}, {"face-mllm"}
        self.multi_user, self.away, self.busy = True, 0, 0
        self.pages, self.hidden, self.busy_for = 0, 0, ""
        self.failing: dict[str, str] = {}
        self.undriven: dict[str, str] = {}
        self.experiments: dict[str, Body] = {}
        self.runs: dict[str, Body] = {}
        self.recurring: dict[str, Body] = {}
        self.pipelines: dict[str, Body] = {}
        self.versions: dict[str, Body] = {}
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.looks: Callable[[], object] = lambda: None
        self.runs_by: Callable[[Body], object] | None = None
        self.page = 2
        self.now = datetime.now(UTC)
        self.lock = threading.RLock()

    def stamp(self) -> str:
        self.now += timedelta(seconds=1)
        return self.now.isoformat().replace("+00:00", "Z")

    def identify(self, headers: dict[str, str]) -> None:
        given = headers.get("authorization", "")
        if given.removeprefix("Bearer ") in self.tokens and given.startswith("Bearer "):
            return
        if headers.get("cookie", "") in self.sessions:
            return
        if not given and not headers.get("cookie"):
            raise Refused(401, "Unauthenticated: Request header error: there is no user identity header.")
        raise Refused(401, "Unauthenticated: the token is expired or of another audience")

    def allow(self, namespace: str | None) -> str:
        if not self.multi_user:
            return ""
        if not namespace:
            raise Refused(400, "Invalid input error: a namespace is required in multi-user mode")
        if namespace not in self.namespaces:
            raise Refused(403, f"PermissionDenied: user is not authorized in namespace {namespace}")
        return namespace

    def spec(self, body: Body) -> Body:
        """The compiled pipeline of a run or schedule, in its two parts, or that of the version it names."""
        if reference := body.get("pipeline_version_reference"):
            version = self.versions.get(reference["pipeline_version_id"])
            if version is None or version["pipeline_id"] != reference["pipeline_id"]:
                raise Refused(404, "ResourceNotFoundError: PipelineVersion not found")
            return dict(version["pipeline_spec"])
        whole = body.get("pipeline_spec") or {}
        if set(whole) != {"pipeline_spec", "platform_spec"} or "root" not in whole["pipeline_spec"]:
            raise Refused(400, "Invalid input error: a pipeline spec and a platform spec are needed")
        return dict(whole)

    def experiment(self, body: Body) -> Body:
        if body.get("experiment_id") not in self.experiments:
            raise Refused(404, "ResourceNotFoundError: Experiment not found")
        found = self.experiments[body["experiment_id"]]
        self.allow(found["namespace"])
        return found

    def tasks(self, spec: Body) -> list[Body]:
        """The tasks of a run as KFP lists them: a driver beside each, those of conditions flat among the others."""
        names, todo = [], [spec["pipeline_spec"]["root"]["dag"]]
        while todo:
            for name, task in todo.pop(0)["tasks"].items():
                component = spec["pipeline_spec"]["components"][task["componentRef"]["name"]]
                todo += [component["dag"]] if "dag" in component else []
                names += [name]
        every = [one for name in names for one in (f"{name}-driver", name)]
        return [{"task_id": str(n), "display_name": name, "state": "PENDING"} for n, name in enumerate(every)]

    def advance(self, run: Body) -> None:
        """One task further."""
        tasks = run["run_details"]["task_details"]
        for task in tasks:
            step = task["display_name"]
            if step.removesuffix("-driver") in self.undriven:
                error = {"code": 2, "message": self.undriven.pop(step.removesuffix("-driver"))}
                task |= {"state": "FAILED", "error": error}
                run |= {"state": "FAILED", "finished_at": self.stamp()}
                return
            if task["state"] == "RUNNING":
                task["end_time"] = self.stamp()
                task["state"] = "FAILED" if step in self.failing else "SUCCEEDED"
                if task["state"] == "FAILED":
                    task["error"] = {"code": 2, "message": self.failing.pop(step)}
                    run |= {"state": "FAILED", "finished_at": self.stamp()}
                return
            if task["state"] == "PENDING":
                task |= {"state": "RUNNING", "start_time": self.stamp()}
                run["state"] = "RUNNING"
                return
        run |= {"state": "SUCCEEDED", "finished_at": self.stamp()}

    def tell(self, run: Body, task: str, state: str, message: str = "") -> None:
        """What became of a task that is really run; its driver has ended before it starts."""
        with self.lock:
            driver, one = (
                next(one for one in run["run_details"]["task_details"] if one["display_name"] == name)
                for name in (f"{task}-driver", task)
            )
            at = "start_time" if state == "RUNNING" else "end_time"
            driver["state"] = "SUCCEEDED"
            one.update({"state": state, at: _now(), **({"error": {"code": 2, "message": message}} if message else {})})

    def end(self, run: Body, well: bool) -> None:
        """The end of a run that was really run."""
        with self.lock:
            run.update(state="SUCCEEDED" if well else "FAILED", finished_at=_now())

    def answer(self, method: str, path: str, query: dict[str, str], body: Body) -> Body:
        """What a request of somebody known gets."""
        for verb, form, work in ROUTES:
            if verb == method and (found := re.fullmatch(form, path)):
                return work(self, query, body, *found.groups())
        raise Refused(404, f"Not Found: {method} {path}")


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _filtered(kept: dict[str, Body], query: dict[str, str]) -> list[Body]:
    found = list(kept.values())
    for one in json.loads(query["filter"])["predicates"] if query.get("filter") else ():
        if one["key"] != "display_name" or one["operation"] != 1:  # of what a filter may ask for, the part that we use
            raise Refused(400, f"Invalid input error: invalid field in the filter: {one['key']}")
        found = [each for each in found if each["display_name"] == one["stringValue"]]
    return found


def _experiments(kubeflow: Kubeflow, query: dict[str, str], body: Body) -> Body:
    kubeflow.allow(query.get("namespace"))
    if kubeflow.hidden:
        kubeflow.hidden -= 1
        return {}
    return {"experiments": _filtered(kubeflow.experiments, query)}


def _new_experiment(kubeflow: Kubeflow, query: dict[str, str], body: Body) -> Body:
    kubeflow.allow(body.get("namespace"))
    if any(one["display_name"] == body["display_name"] for one in kubeflow.experiments.values()):
        raise Refused(409, "AlreadyExistError: an experiment of this name")
    one = {**body, "experiment_id": f"experiment-{len(kubeflow.experiments)}", "created_at": kubeflow.stamp()}
    kubeflow.experiments[one["experiment_id"]] = one
    return one


def _new_run(kubeflow: Kubeflow, query: dict[str, str], body: Body) -> Body:
    kubeflow.experiment(body)
    spec = kubeflow.spec(body)
    wanted = set(spec["pipeline_spec"]["root"].get("inputDefinitions", {}).get("parameters", {}))
    given = set(body.get("runtime_config", {}).get("parameters") or {})
    if wanted != given:
        raise Refused(400, f"Invalid input error: parameters {sorted(wanted ^ given)} are missing or unknown")
    run = {**body, "run_id": f"{len(kubeflow.runs):08d}-run", "state": "PENDING", "created_at": kubeflow.stamp()}
    run["run_details"] = {"task_details": kubeflow.tasks(spec)}
    if reference := body.get("pipeline_version_reference"):
        run["pipeline_version_id"] = reference["pipeline_version_id"]
    kubeflow.runs[run["run_id"]] = run
    if kubeflow.runs_by is not None:
        run["state"] = "RUNNING"
        threading.Thread(target=kubeflow.runs_by, args=(run,), daemon=True).start()
    return run


def _run(kubeflow: Kubeflow, query: dict[str, str], body: Body, run_id: str) -> Body:
    if run_id not in kubeflow.runs:
        raise Refused(404, f"ResourceNotFoundError: Run {run_id} not found")
    run = kubeflow.runs[run_id]
    kubeflow.experiment(run)
    return run


def _look(kubeflow: Kubeflow, query: dict[str, str], body: Body, run_id: str) -> Body:
    run = _run(kubeflow, query, body, run_id)
    kubeflow.looks()
    shown = json.loads(json.dumps(run))
    if run["state"] in ("PENDING", "RUNNING") and kubeflow.runs_by is None:
        kubeflow.advance(run)
    return dict(shown)


def _retry(kubeflow: Kubeflow, query: dict[str, str], body: Body, run_id: str) -> Body:
    run = _run(kubeflow, query, body, run_id)
    if run["state"] != "FAILED":
        raise Refused(400, f"Workflow must be Failed/Error to retry, and it is {run['state']}")
    for task in run["run_details"]["task_details"]:
        if task["state"] == "FAILED":
            task.update(state="PENDING", start_time=None, end_time=None, error=None)
    run |= {"state": "RUNNING", "finished_at": None}
    return {}


def _runs(kubeflow: Kubeflow, query: dict[str, str], body: Body) -> Body:
    kubeflow.allow(query.get("namespace"))
    return {"runs": _filtered(kubeflow.runs, query)}


def _new_recurring(kubeflow: Kubeflow, query: dict[str, str], body: Body) -> Body:
    kubeflow.experiment(body)
    kubeflow.spec(body)
    if len(body["trigger"]["cron_schedule"]["cron"].split()) != 6 or body["mode"] != "ENABLE":
        raise Refused(400, "Invalid input error: the trigger is no cron expression of six fields")
    one = {**body, "recurring_run_id": f"recurring-{len(kubeflow.asked)}", "created_at": kubeflow.stamp()}
    kubeflow.recurring[one["recurring_run_id"]] = one
    return one


def _recurring(kubeflow: Kubeflow, query: dict[str, str], body: Body) -> Body:
    found = [one for one in kubeflow.recurring.values() if one["experiment_id"] == query["experiment_id"]]
    at = int(query.get("page_token") or 0)
    more = {"next_page_token": str(at + kubeflow.page)} if at + kubeflow.page < len(found) else {}
    return {"recurringRuns": found[at : at + kubeflow.page], **more}


def _delete_recurring(kubeflow: Kubeflow, query: dict[str, str], body: Body, one: str) -> Body:
    if kubeflow.recurring.pop(one, None) is None:
        raise Refused(404, "ResourceNotFoundError: Job not found")
    return {}


def _pipelines(kubeflow: Kubeflow, query: dict[str, str], body: Body) -> Body:
    kubeflow.allow(query.get("namespace"))
    return {"pipelines": _filtered(kubeflow.pipelines, query)}


def _parts(file: bytes) -> Body:
    documents = list(yaml.safe_load_all(file))
    if len(documents) != 2:
        raise Refused(400, "Failed to read a pipeline spec file")
    return {"pipeline_spec": documents[0], "platform_spec": documents[1]}


def _upload(kubeflow: Kubeflow, query: dict[str, str], body: Body) -> Body:
    kubeflow.allow(query.get("namespace"))
    if any(one["display_name"] == query["name"] for one in kubeflow.pipelines.values()):
        raise Refused(409, "Failed to create a pipeline and a pipeline version")
    one = {"pipeline_id": f"pipeline-{len(kubeflow.pipelines)}", "display_name": query["name"]}
    kubeflow.pipelines[one["pipeline_id"]] = one
    _new_version(kubeflow, {"name": query["name"], "pipelineid": one["pipeline_id"]}, body)
    return one


def _new_version(kubeflow: Kubeflow, query: dict[str, str], body: Body) -> Body:
    if query["pipelineid"] not in kubeflow.pipelines:
        raise Refused(400, "Failed to create a pipeline version")
    own = [one for one in kubeflow.versions.values() if one["pipeline_id"] == query["pipelineid"]]
    if any(one["display_name"] == query["name"] for one in own):
        raise Refused(409, "Failed to create a pipeline version")
    one = {
        "pipeline_version_id": f"version-{len(kubeflow.versions)}",
        "pipeline_id": query["pipelineid"],
        "display_name": query["name"],
        "created_at": kubeflow.stamp(),
        "pipeline_spec": _parts(body["uploadfile"]),
    }
    kubeflow.versions[one["pipeline_version_id"]] = one
    return one


def _versions(kubeflow: Kubeflow, query: dict[str, str], body: Body, pipeline: str) -> Body:
    own = {key: one for key, one in kubeflow.versions.items() if one["pipeline_id"] == pipeline}
    return {"pipeline_versions": _filtered(own, query)}


def _version(kubeflow: Kubeflow, query: dict[str, str], body: Body, pipeline: str, version: str) -> Body:
    return kubeflow.versions[version]


ONE = "([^/:]+)"
ROUTES: list[tuple[str, str, Callable[..., Body]]] = [
    ("GET", f"{API}/experiments", _experiments),
    ("POST", f"{API}/experiments", _new_experiment),
    ("POST", f"{API}/runs", _new_run),
    ("GET", f"{API}/runs", _runs),
    ("GET", f"{API}/runs/{ONE}", _look),
    ("POST", f"{API}/runs/{ONE}:retry", _retry),
    ("POST", f"{API}/recurringruns", _new_recurring),
    ("GET", f"{API}/recurringruns", _recurring),
    ("DELETE", f"{API}/recurringruns/{ONE}", _delete_recurring),
    ("GET", f"{API}/pipelines", _pipelines),
    ("POST", f"{API}/pipelines/upload", _upload),
    ("POST", f"{API}/pipelines/upload_version", _new_version),
    ("GET", f"{API}/pipelines/{ONE}/versions", _versions),
    ("GET", f"{API}/pipelines/{ONE}/versions/{ONE}", _version),
]


class _Handler(Answering):
    kubeflow: Kubeflow

    def _serve(self) -> None:
        kubeflow, parts = self.kubeflow, urlsplit(self.path)
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, query = unquote(parts.path), {name: values[0] for name, values in parse_qs(parts.query).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        if path.startswith("/login"):
            self._send(200, b"<html>Log in</html>", "text/html")
            return
        if not path.startswith("/pipeline/"):
            self._send(404, b"<html>nothing here</html>", "text/html")
            return
        path = path.removeprefix("/pipeline")
        with kubeflow.lock:
            kubeflow.asked.append((self.command, path, headers))
            if kubeflow.away:
                kubeflow.away -= 1
                self.close_connection = True
                return
            try:
                if kubeflow.busy:
                    kubeflow.busy -= 1
                    raise Refused(429 if kubeflow.busy_for else 503, "upstream connect error")
                if kubeflow.pages:
                    kubeflow.pages -= 1
                    self._send(200, b"<html>Log in</html>", "text/html")
                    return
                if path == f"{API}/healthz":  # needs no identity
                    self._send(200, json.dumps({"multi_user": kubeflow.multi_user}).encode())
                    return
                kubeflow.identify(headers)
                given = kubeflow.answer(self.command, path, query, self._body(raw))
                self._send(200, json.dumps(given, default=str).encode())
            except Refused as error:
                said = {"error": str(error), "code": error.status, "message": str(error), "details": []}
                self._send(error.status, json.dumps(said).encode())

    def end_headers(self) -> None:
        if self.kubeflow.busy_for:
            self.send_header("Retry-After", self.kubeflow.busy_for)
        super().end_headers()

    def _body(self, raw: bytes) -> Body:
        kind = self.headers.get("Content-Type") or ""
        if kind.startswith("multipart/form-data"):
            message = BytesParser().parsebytes(f"Content-Type: {kind}\r\n\r\n".encode() + raw)
            parts = message.get_payload()
            return {str(p.get_param("name", header="content-disposition")): p.get_payload(decode=True) for p in parts}  # type: ignore[union-attr]
        return dict(json.loads(raw)) if raw else {}

    do_GET = do_POST = do_DELETE = _serve


@contextmanager
def serving(kubeflow: Kubeflow, certificate: tuple[Path, Path] | None = None) -> Iterator[str]:
    """Serve it on a free port of loopback, over TLS with a certificate and its key; the address of its API."""
    server = Loopback(_Handler, kubeflow=kubeflow)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    with server:
        yield f"{'https' if certificate else 'http'}://127.0.0.1:{server.server_port}/pipeline"
