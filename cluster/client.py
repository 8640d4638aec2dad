"""The API of Kubeflow Pipelines, asked by somebody: who asks, how it is reached, and one line for what goes wrong."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from facemllm.errors import UserError, one_line

T = TypeVar("T")
TOKEN, COOKIE = "KFP_TOKEN", "KFP_COOKIE"
IN_CLUSTER = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
PATIENCE_S, PAUSE_S = 60.0, 0.5
_ATTEMPTS = 3  # of a connection; what an answer says of waiting (Retry-After) is no reason to be silent for hours
_TIMEOUT_S = (10, 60)  # to connect, and between two bytes of an answer
_PASSING = {429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Identity:
    """Who asks: a bearer token, a session's cookie, or the file in which the kubelet keeps a ServiceAccount's token for
    the audience `pipelines.kubeflow.org`. `source` says in words where it comes from."""

    source: str
    token: str | None = field(default=None, repr=False)
    cookie: str | None = field(default=None, repr=False)
    file: str | None = None


def identity() -> Identity:
    """The identity of the environment: `KFP_TOKEN`, else `KFP_COOKIE`, else the token file of a pod.

    Raises UserError for a value that no header can carry.
    """
    from kfp.client import KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH

    if token := os.environ.get(TOKEN, "").strip():
        return Identity(f"the token in {TOKEN}", token=_plain(TOKEN, token, r"[!-~]+"))
    if cookie := os.environ.get(COOKIE, "").strip():
        return Identity(f"the session in {COOKIE}", cookie=_plain(COOKIE, cookie, r"[^=;\s]+=[ -~]+"))
    file = os.environ.get(KF_PIPELINES_SA_TOKEN_ENV) or KF_PIPELINES_SA_TOKEN_PATH
    if Path(file).is_file():
        return Identity(f"the ServiceAccount's token in {file}", file=file)
    return Identity("nobody")


def _plain(variable: str, value: str, form: str) -> str:
    if not re.fullmatch(form, value):
        raise UserError(f"{variable} is no {'token' if variable == TOKEN else 'cookie, as NAME=VALUE'}; set it anew")
    return value


@dataclass
class Api:
    """A Kubeflow Pipelines API at `endpoint`, asked for `namespace` (empty where it has one user) as `who`."""

    endpoint: str
    namespace: str
    who: Identity
    client: Any

    def call(self, work: Callable[..., T], *args: Any, **given: Any) -> T:
        """What `work` gives. Raises UserError with one line for what KFP or the network says against it."""
        try:
            return _quietly(work, *args, **given)
        except Exception as error:
            raise user_error(error, self.endpoint, self.namespace, self.who) from None

    def patiently(self, work: Callable[..., T], *args: Any, say: Callable[[str], object] = print, **given: Any) -> T:
        """As `call`, of what may be asked twice: an API that is away is waited for, a minute long."""
        until, pause, said = time.monotonic() + PATIENCE_S, PAUSE_S, False
        while True:
            try:
                return _quietly(work, *args, **given)
            except Exception as error:
                if not passes(error) or time.monotonic() > until:
                    raise user_error(error, self.endpoint, self.namespace, self.who) from None
                if not said:
                    say(f"{self.endpoint} is away; waiting for it, up to {PATIENCE_S:.0f} s")
                said = True
                time.sleep(pause)
                pause = min(2 * pause, 10.0)


def _quietly(work: Callable[..., T], *args: Any, **given: Any) -> T:
    """KFP's client prints addresses of its pages; standard output is for what a command gives."""
    with contextlib.redirect_stdout(sys.stderr):
        return work(*args, **given)


class Exists(UserError):
    """Something of this name is there already."""


def conflicts(work: Callable[..., T], *args: Any, **given: Any) -> T:
    """What `work` gives. Raises Exists for what is there already."""
    from kfp_server_api import ApiException

    try:
        return work(*args, **given)
    except ApiException as error:
        if error.status == 409:
            raise Exists(str(error.reason)) from None
        raise


def experiment_of(api: Api, name: str) -> str:
    """Id of the experiment of this name, made if absent."""
    given = {"namespace": api.namespace or None}
    try:
        made = api.call(conflicts, api.client.create_experiment, name, **given)
    except Exists:  # somebody made it since it was looked for
        made = api.call(api.client.create_experiment, name, **given)
    return str(made.experiment_id)


def connect(endpoint: str | None, namespace: str | None, ca: str | None) -> Api:
    """The API at `endpoint`; with None that of the cluster this pod runs in. Raises UserError unless it answers."""
    import kfp
    import kfp_server_api
    from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials

    warnings.filterwarnings("ignore", category=FutureWarning, module="kfp")
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it tells of every attempt; `patiently` tells once
    who = identity()
    if endpoint is None:
        if who.file is None:
            raise UserError("no endpoint: give --endpoint, as https://HOST/pipeline, or set KF_PIPELINES_ENDPOINT")
        endpoint = IN_CLUSTER
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", endpoint):
        shown = re.sub(r"//[^/]*@", "//...@", endpoint)  # a password is nobody's who reads a log
        raise UserError(f"--endpoint {shown}: give an address such as https://HOST/pipeline, and nothing beside it")
    if ca is not None and not Path(ca).is_file():
        raise UserError(f"--ca {ca}: no such file; give the PEM bundle that the API's certificate is signed by")
    multi_user = _health(kfp_server_api, endpoint, who, ca)
    if namespace is None and multi_user:
        namespace = _NAMESPACE.read_text("utf-8").strip() if _NAMESPACE.is_file() else None
        if namespace is None:
            raise UserError(f"{endpoint} serves many users: give --namespace, that of your Profile")
    credentials = ServiceAccountTokenVolumeCredentials(who.file) if who.file else None
    try:
        client = kfp.Client(
            host=endpoint,
            namespace=namespace or "kubeflow",
            existing_token=who.token,
            cookies=who.cookie,
            ssl_ca_cert=ca,
            credentials=credentials,
        )
    except Exception as error:
        raise user_error(error, endpoint, namespace or "", who) from None
    _bounded(client._run_api.api_client, _page(endpoint, who))
    return Api(endpoint, namespace or "", who, client)


def _health(kfp_server_api: Any, endpoint: str, who: Identity, ca: str | None) -> bool:
    """Whether the API serves many users. Asked by hand: KFP's client would ask for half a minute, and log each time."""
    configuration = kfp_server_api.Configuration(host=endpoint.rstrip("/"))
    configuration.ssl_ca_cert = ca
    asked = kfp_server_api.ApiClient(configuration, cookie=who.cookie)
    if who.token or who.file:
        token = who.token or Path(str(who.file)).read_text("utf-8").strip()
        asked.set_default_header("authorization", f"Bearer {token}")
    _bounded(asked, _page(endpoint, who))
    try:
        answer = kfp_server_api.HealthzServiceApi(asked).healthz_service_get_healthz(_preload_content=False)
        return bool(json.loads(answer.data).get("multi_user"))
    except Exception as error:
        raise user_error(error, endpoint, "", who) from None


def _page(endpoint: str, who: Identity) -> UserError:
    return UserError(
        f"{endpoint} answers with a page and not as the API of Kubeflow Pipelines, as a login does that "
        f"{who.source} did not pass; give the API's address, as https://HOST/pipeline, and a token in {TOKEN} or "
        f"a session in {COOKIE}"
    )


def _bounded(api_client: Any, page: UserError) -> None:
    """Let no request of a generated client wait for ever, which each does by default, nor sleep as its answer says;
    `page` is raised for an answer that is no JSON object, of which the client would make an empty one."""
    import urllib3

    plain = api_client.rest_client.request
    again = urllib3.Retry(_ATTEMPTS, respect_retry_after_header=False)
    api_client.rest_client.pool_manager.connection_pool_kw["retries"] = again

    def request(method: str, url: str, **given: Any) -> Any:
        answer = plain(method, url, **{**given, "_request_timeout": given.get("_request_timeout") or _TIMEOUT_S})
        try:
            if isinstance(json.loads(answer.data), dict):
                return answer
        except ValueError:
            pass
        raise page

    api_client.rest_client.request = request


def passes(error: BaseException) -> bool:
    """Whether an error may pass by itself: the API restarts, or the network is interrupted."""
    import urllib3
    from kfp_server_api import ApiException

    if isinstance(error, ApiException):
        return error.status in _PASSING
    return isinstance(error, urllib3.exceptions.HTTPError | ConnectionError) and not _tls(error)


def _tls(error: BaseException) -> BaseException | None:
    import urllib3

    reason = getattr(error, "reason", None)
    return next((one for one in (error, reason) if isinstance(one, urllib3.exceptions.SSLError)), None)


def user_error(error: BaseException, endpoint: str, namespace: str, who: Identity) -> UserError:
    """What KFP or the network says, as one line that says how to mend it; anything else is raised as it is."""
    import urllib3
    from kfp_server_api import ApiException

    if isinstance(error, UserError):
        return error
    if isinstance(error, ApiException) and error.status:
        return UserError(_refused(error, endpoint, namespace, who))
    if isinstance(error, ApiException) or _tls(error):
        why = one_line(_tls(error) or error, 160)
        return UserError(f"{endpoint}: its certificate is not trusted ({why}); give --ca FILE, or set KFP_CA_BUNDLE")
    if isinstance(error, urllib3.exceptions.HTTPError | OSError):
        reason = getattr(error, "reason", None) or error
        why = one_line(reason, 200).rpartition(">: ")[2].rpartition("): ")[2]
        return UserError(f"no Kubeflow Pipelines API answers at {endpoint}: {why}; check --endpoint and the network")
    raise error


def _refused(error: Any, endpoint: str, namespace: str, who: Identity) -> str:
    said, where = _message(error), f" in namespace {namespace}" if namespace else ""
    match error.status:
        case 401 if who.source == "nobody":
            how = f"set {TOKEN} or {COOKIE}, or mount a ServiceAccount's token for the audience pipelines.kubeflow.org"
            return f"{endpoint} asks who you are (401): {said}; {how}"
        case 401:
            return f"{endpoint} does not take {who.source} (401): {said}; it may have expired: get a new one"
        case 403:
            return f"{endpoint} does not let {who.source} do this{where} (403): {said}; ask its administrator"
        case 404 if said:
            return f"{endpoint} knows no such thing (404): {said}"
        case 404:
            return f"{endpoint} is not the API of Kubeflow Pipelines (404); give its address, as https://HOST/pipeline"
        case status if status in _PASSING:
            return f"{endpoint} is in trouble ({status}): {said}; try again, then look at the log of ml-pipeline"
        case status:
            return f"{endpoint} refuses this ({status}): {said}"


def _message(error: Any) -> str:
    """What KFP says of a refusal, in one line; empty for a page that is not KFP's."""
    try:
        said = json.loads(error.body)
        text = said.get("message") or said.get("error_message") or said.get("error") or ""
        return one_line(str(text)) if text else ""
    except (ValueError, TypeError, AttributeError):
        return "" if error.status == 404 else str(error.reason)
