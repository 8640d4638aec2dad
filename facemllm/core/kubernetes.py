"""The API of the Kubernetes cluster that we run in, or that a kubeconfig names: objects as plain dictionaries.

Built on the `kubernetes` package for credentials, TLS and requests. What the API or the network says against a request
is one line of UserError; an API that is away is waited for, a minute long.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from facemllm.core import progress
from facemllm.errors import UserError, one_line

Object = dict[str, Any]
MANAGER = "facemllm"
"""The field manager under which our fields of an object are ours."""
PATIENCE_S = 60.0
_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0
_TIMEOUT_S = (10, 60)  # to connect, and between two bytes of an answer
_PASSING = {429, 500, 502, 503, 504}
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


@dataclass(frozen=True)
class Kind:
    """A kind of object: `api_version` (`ray.io/v1`), name, plural; what to install where the cluster has none."""

    api_version: str
    name: str
    plural: str
    of: str = "Kubernetes"

    def path(self, namespace: str, name: str = "", sub: str = "") -> str:
        """The address of an object, of all of a namespace without `name`, or of a part such as `status`."""
        root = "apis" if "/" in self.api_version else "api"
        parts = [root, self.api_version, "namespaces", quote(namespace), self.plural, quote(name), sub]
        return "/" + "/".join(part for part in parts if part)


POD = Kind("v1", "Pod", "pods")
EVENT = Kind("v1", "Event", "events")
CONFIG_MAP = Kind("v1", "ConfigMap", "configmaps")
RAY_JOB = Kind("ray.io/v1", "RayJob", "rayjobs", "KubeRay")
LOCAL_QUEUE = Kind("kueue.x-k8s.io/v1beta1", "LocalQueue", "localqueues", "Kueue")
INFERENCE_SERVICE = Kind("serving.kserve.io/v1beta1", "InferenceService", "inferenceservices", "KServe")


class ApiError(UserError):
    """A refusal by the API: its HTTP `status` and Kubernetes' `reason`, as `AlreadyExists`."""

    def __init__(self, line: str, status: int = 0, reason: str = "") -> None:
        super().__init__(line)
        self.status, self.reason = status, reason


class Api:
    """The API as the objects of one namespace; `client` is an ApiClient of the `kubernetes` package."""

    def __init__(
        self,
        client: Any,
        namespace: str,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.client, self.namespace, self.clock, self.sleep = client, namespace, clock, sleep
        self.host = client.configuration.host

    def create(self, kind: Kind, body: Object) -> Object:
        """Create an object. Raises ApiError, of the reason `AlreadyExists` where there is one of that name."""
        return self._json("POST", kind, kind.path(self.namespace), body, fieldManager=MANAGER)

    def get(self, kind: Kind, name: str) -> Object | None:
        """An object, or None where there is none."""
        try:
            return self._json("GET", kind, kind.path(self.namespace, name))
        except ApiError as error:
            if error.reason == "NotFound":
                return None
            raise

    def select(self, kind: Kind, labels: Mapping[str, str] | None = None, name: str = "") -> tuple[list[Object], str]:
        """All objects that carry the labels and the name, and the resource version of the list."""
        found = self._json("GET", kind, kind.path(self.namespace), None, **_selected(labels, name))
        return list(found["items"]), str(found["metadata"]["resourceVersion"])

    def apply(self, kind: Kind, body: Object, force: bool = False) -> Object:
        """Server-side apply: the fields in `body` are ours from now on, those we no longer name are removed.

        Raises ApiError, of the reason `Conflict` where another manager has set one of them, unless `force`.
        """
        path = kind.path(self.namespace, body["metadata"]["name"])
        given = {"fieldManager": MANAGER, "force": "true" if force else "false"}
        return self._json("PATCH", kind, path, body, "application/apply-patch+yaml", **given)

    def patch(self, kind: Kind, name: str, body: Object, sub: str = "") -> Object:
        """JSON merge patch of an object, or of its part `sub`."""
        path = kind.path(self.namespace, name, sub)
        return self._json("PATCH", kind, path, body, "application/merge-patch+json", fieldManager=MANAGER)

    def delete(self, kind: Kind, name: str) -> None:
        """Delete an object and, behind it, what it owns; one that is not there is no error."""
        try:
            self._json("DELETE", kind, kind.path(self.namespace, name), propagationPolicy="Background")
        except ApiError as error:
            if error.reason != "NotFound":
                raise

    def logs(self, pod: str, container: str = "", lines: int = 20) -> list[str]:
        """The last lines that a container has written."""
        chosen: dict[str, Any] = {"container": container} if container else {}
        path = POD.path(self.namespace, pod, "log")
        data = self._ask(lambda answer: answer.data, "GET", POD, path, tailLines=lines, **chosen)
        return str(data.decode("utf-8", "replace")).splitlines()

    def watch(self, kind: Kind, name: str, tick_s: int = 30) -> Iterator[Object | None]:
        """An object now and after each change, without end; at least every `tick_s`. None while there is none.

        What a broken or expired watch (410 Gone) has missed, the list before the next one tells.
        """
        while True:
            items, version = self.select(kind, name=name)
            yield items[0] if items else None
            query = {**_selected(None, name), "watch": "true", "resourceVersion": version, "timeoutSeconds": tick_s}
            for event in self._events(kind, query):
                yield None if event["type"] == "DELETED" else event["object"]

    def _events(self, kind: Kind, query: Mapping[str, Any]) -> Iterator[Object]:
        from kubernetes.watch.watch import iter_resp_lines
        from urllib3.exceptions import HTTPError

        try:
            answer = self._ask(lambda answer: answer, "GET", kind, kind.path(self.namespace), **query)
        except ApiError as error:
            if error.status != 410:
                raise
            self.sleep(_PAUSE_S)
            return
        try:
            for line in iter_resp_lines(answer):
                event = json.loads(line)
                if event["type"] == "ERROR":
                    break
                if event["type"] != "BOOKMARK":
                    yield event
            else:
                return
        except (HTTPError, OSError, ValueError):
            pass
        finally:
            answer.close()
        self.sleep(_PAUSE_S)

    def _ask(
        self,
        take: Callable[[Any], Any],
        verb: str,
        kind: Kind,
        path: str,
        body: Object | None = None,
        form: str = "",
        **query: Any,
    ) -> Any:
        """What `take` makes of the answer to a request, which is not yet read; asked again for a minute while the API
        is away, or cuts its answer off."""
        headers = {"Accept": "application/json"} | ({"Content-Type": form or "application/json"} if body else {})
        until, pause = self.clock() + PATIENCE_S, _PAUSE_S
        while True:
            try:
                answer = self.client.call_api(
                    path,
                    verb,
                    query_params=list(query.items()),
                    header_params=dict(headers),
                    body=body,
                    auth_settings=["BearerToken"],
                    _return_http_data_only=True,
                    _preload_content=False,
                    _request_timeout=_TIMEOUT_S,
                )
                return take(answer)
            except ApiError:
                raise
            except Exception as error:
                said = _api_error(error, kind, self.host, self.namespace)
                if said.status not in _PASSING or self.clock() > until:
                    raise said from None
            if pause == _PAUSE_S:
                progress.event(note=f"{self.host} is away; waiting for it, up to {PATIENCE_S:.0f} s")
            self.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _json(self, *asked: Any, **query: Any) -> Any:
        return self._ask(self._object, *asked, **query)

    def _object(self, answer: Any) -> Object:
        """An answer's JSON object. Raises ApiError for one of another form."""
        if not (found := _read(answer.data)):
            raise ApiError(f"{self.host} answers with no object of Kubernetes, as a login page; name the API's address")
        return found


def connect(namespace: str | None = None) -> Api:
    """The API that `KUBECONFIG` names, else that of the cluster this pod runs in, else that of `~/.kube/config`.

    The namespace is that of the pod or of the kubeconfig's context, unless one is given. Raises UserError where none of
    these is there or can be read.
    """
    from kubernetes import client, config
    from kubernetes.config.config_exception import ConfigException
    from yaml import YAMLError

    configuration = client.Configuration()
    configuration.retries = False  # `Api` waits itself, and says so
    try:
        if not os.environ.get("KUBECONFIG") and "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config(client_configuration=configuration)
            found = (_ACCOUNT / "namespace").read_text("utf-8").strip()
        else:
            file = os.environ.get("KUBECONFIG")
            config.load_kube_config(file, client_configuration=configuration)
            found = config.list_kube_config_contexts(file)[1]["context"].get("namespace", "default")
    except (ConfigException, YAMLError, OSError, TypeError, KeyError) as error:
        how = "run this in a pod whose account's token is mounted, or name a kubeconfig in KUBECONFIG"
        raise UserError(f"no Kubernetes cluster is named: {one_line(error, 200)}; {how}") from None
    return Api(client.ApiClient(configuration), namespace or found)


def _selected(labels: Mapping[str, str] | None, name: str) -> dict[str, str]:
    chosen = {"labelSelector": ",".join(f"{key}={value}" for key, value in labels.items())} if labels else {}
    return {**chosen, "fieldSelector": f"metadata.name={name}"} if name else chosen


def _api_error(error: Exception, kind: Kind, host: str, namespace: str) -> ApiError:
    """What the API or the network says, in one line; anything else is raised as it is."""
    import urllib3
    from kubernetes.client import ApiException

    if isinstance(error, urllib3.exceptions.HTTPError | OSError):
        why = one_line(error, 200).rpartition(">: ")[2]
        line = f"no Kubernetes API answers at {host}: {why}; check the network and the cluster's state"
        return ApiError(line, 503, "Unreachable")
    if not isinstance(error, ApiException):
        raise error
    if not error.status:
        return ApiError(f"{host}: its certificate is not trusted ({one_line(str(error.reason), 160)})")
    status = _read(error.body)
    reason, said = str(status.get("reason", "")), one_line(str(status.get("message") or error.reason), 400)
    match error.status:
        case 401:
            line = f"{host} does not know who asks (401): the token is missing, expired or another cluster's"
        case 403 if "exceeded quota" in said:
            line = f"no room in namespace {namespace} (403): {said}; wait for other work to end, or raise the quota"
        case 403:
            line = f"{said} (403); bind a role that allows it to that account, as k8s/base/accounts.yaml does"
        case 404 if not status.get("details", {}).get("name"):
            reason = "NoSuchKind"
            line = f"{host} has no {kind.api_version} {kind.name} (404); install {kind.of}, or a newer one"
        case passing if passing in _PASSING:
            line = f"{host} is in trouble ({passing}): {said}"
        case other:
            line = f"{host} refuses this ({other}): {said}"
    return ApiError(line, error.status, reason)


def _read(body: Any) -> Object:
    """An object; empty for an answer of other form, as that for a path that nobody serves."""
    try:
        found = json.loads(body)
        return found if isinstance(found, dict) else {}
    except (ValueError, TypeError):
        return {}
