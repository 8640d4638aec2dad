"""A stand-in for the API server of Kubernetes, on loopback: its paths, bodies, watches and refusals, for a few kinds.

It takes nobody at their word: bearer tokens, RBAC by Roles and RoleBindings as they are rendered, bodies by their
schemas. `Cluster.on` has a function react to objects, as a controller would.

    cluster = Cluster(roles=documents("base"))
    with serving(cluster) as address:
        cluster.kubeconfig(file, address, "trainer")
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.answering import Answering, Loopback
from tests.kubernetes_objects import Body, Refused, applied, at_path, claimed, fits, leaves, merged, operated

Key = tuple[str, str, str]
NAMESPACE, ADMIN = "face-mllm", "admin"
PATH = re.compile(
    r"/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+)/(?P<version>[^/]+))(?:/namespaces/(?P<namespace>[^/]+))?"
    r"/(?P<plural>[^/]+)(?:/(?P<name>[^/]+)(?:/(?P<sub>status|log))?)?"
)
KINDS = {
    **{("", plural): ("v1", kind) for plural, kind in (("pods", "Pod"), ("configmaps", "ConfigMap"))},
    **{("", plural): ("v1", kind) for plural, kind in (("secrets", "Secret"), ("services", "Service"))},
    **{("", plural): ("v1", kind) for plural, kind in (("events", "Event"), ("namespaces", "Namespace"))},
    ("ray.io", "rayjobs"): ("v1", "RayJob"),
    ("kueue.x-k8s.io", "localqueues"): ("v1beta1", "LocalQueue"),
    ("serving.kserve.io", "inferenceservices"): ("v1beta1", "InferenceService"),
    ("serving.kserve.io", "servingruntimes"): ("v1alpha1", "ServingRuntime"),
}
MANIFESTS = {
    "k8s/base/accounts.yaml": NAMESPACE,
    "k8s/components/releaser/releaser.yaml": NAMESPACE,
    "k8s/production/accounts.yaml": "face-mllm-production",
}
"""Where our roles are, and the namespace that an overlay puts them in."""
VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
SERVERS_OWN = ("uid", "resourceVersion", "generation", "creationTimestamp")


def roles() -> list[Body]:
    """The roles of our manifests, and who is bound to them."""
    root = Path(__file__).resolve().parents[1]
    found = [
        {**one, "metadata": {"namespace": namespace, **one["metadata"]}}
        for file, namespace in MANIFESTS.items()
        for one in yaml.safe_load_all((root / file).read_text("utf-8"))
    ]
    return [one for one in found if one["kind"] in ("Role", "RoleBinding")]


class Request(NamedTuple):
    """A request as RBAC sees it; `resource` is as in `pods/log`."""

    user: str
    verb: str
    group: str
    resource: str
    namespace: str
    name: str


class Cluster:
    """What the API server holds, and how it behaves.

    Accounts of `NAMESPACE` have a token of their own name, if a role is bound to them; `ADMIN` may do everything.
    `faults` is what a schema holds against a body. `away` requests are cut off, `busy` ones answered with 503, `gone`
    watches with 410 in their stream, `refused_watches` with 410 as their status; `cut` answers end amid their body,
    `pages` are those of a login; `quota` is what the quota says of every creation. `logs` are those of pods, by name.
    """

    def __init__(self, roles: Iterable[Body] = (), faults: Callable[[Body], list[str]] = lambda body: []) -> None:
        self.kinds, self.roles, self.faults = dict(KINDS), list(roles), faults
        self.tokens = {ADMIN: ADMIN}
        for binding in (one for one in self.roles if one["kind"] == "RoleBinding"):
            for who in binding["subjects"]:
                self.tokens[who["name"]] = f"system:serviceaccount:{who.get('namespace', NAMESPACE)}:{who['name']}"
        self.objects: dict[Key, Body] = {}
        self.owners: dict[Key, dict[tuple[str, ...], str]] = {}
        self.events: list[tuple[int, str, str, Body]] = []
        self.logs: dict[str, str] = {}
        self.asked: list[Request] = []
        self.away, self.busy, self.gone, self.quota, self.version = 0, 0, 0, "", 0
        self.refused_watches, self.cut, self.pages = 0, 0, 0
        self.controllers: list[tuple[str, Callable[[str, Body], object]]] = []
        self.changed = threading.Condition(threading.RLock())
        self.closed = False
        self.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})

    def on(self, kind: str, react: Callable[[str, Body], object]) -> None:
        """Call `react("ADDED" | "MODIFIED" | "DELETED", object)` when one is made, its spec changed, or it is gone."""
        self.controllers.append((kind, react))

    def kubeconfig(self, file: Path, address: str, token: str, namespace: str = NAMESPACE) -> None:
        """Write a kubeconfig for this server."""
        context = {"cluster": "it", "user": "it", "namespace": namespace}
        parts = {"clusters": {"cluster": {"server": address}}, "users": {"user": {"token": token}}}
        listed = {name: [{"name": "it", **one}] for name, one in {**parts, "contexts": {"context": context}}.items()}
        file.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", "current-context": "it", **listed}))

    def plural(self, kind: str) -> tuple[str, str]:
        return next(key for key, (_, name) in self.kinds.items() if name == kind)

    def get(self, kind: str, name: str, namespace: str = NAMESPACE) -> Body | None:
        """An object as it is now, or None."""
        with self.changed:
            return copy.deepcopy(self.objects.get((self.plural(kind)[1], namespace, name)))

    def put(self, body: Body) -> Body:
        """Make or replace an object, as a controller does that may."""
        _, plural = self.plural(body["kind"])
        namespace = "" if plural == "namespaces" else body["metadata"].get("namespace", NAMESPACE)
        key = (plural, namespace, body["metadata"]["name"])
        return self.store(key, copy.deepcopy(body))

    def set_status(self, kind: str, name: str, namespace: str = NAMESPACE, **status: Any) -> None:
        """Merge fields into an object's status; nothing if it is gone."""
        with self.changed:
            body = self.get(kind, name, namespace)
            if body is not None:
                self.store((self.plural(kind)[1], namespace, name), body | {"status": body.get("status", {}) | status})

    def remove(self, kind: str, name: str, namespace: str = NAMESPACE) -> None:
        """Delete an object, if it is there."""
        self.drop((self.plural(kind)[1], namespace, name))

    def store(self, key: Key, body: Body) -> Body:
        """Keep an object under its key, and tell watches and controllers."""
        plural, namespace, name = key
        with self.changed:
            before = self.objects.get(key)
            known = (before or {}).get("metadata", {})
            metadata = {k: v for k, v in body.get("metadata", {}).items() if k not in SERVERS_OWN}
            self.version += 1
            again = before is not None and before.get("spec") == body.get("spec")
            own = {
                "uid": known.get("uid") or f"00000000-0000-4000-8000-{self.version:012d}",
                "creationTimestamp": known.get("creationTimestamp") or f"{datetime.now(UTC):%FT%TZ}",
                "generation": known.get("generation", 0) + (not again),
                "resourceVersion": str(self.version),
            }
            whole = {"name": name, **({"namespace": namespace} if namespace else {}), **metadata, **own}
            kept = {**body, "metadata": whole}
            self.objects[key] = kept
            what = "MODIFIED" if before else "ADDED"
            self._tell(what, plural, kept)
        if not again:
            self._react(what, kept)
        return copy.deepcopy(kept)

    def drop(self, key: Key) -> None:
        with self.changed:
            body = self.objects.pop(key, None)
            self.owners.pop(key, None)
            if body is None:
                return
            self.version += 1
            self._tell(
                "DELETED", key[0], body | {"metadata": body["metadata"] | {"resourceVersion": str(self.version)}}
            )
        self._react("DELETED", body)

    def _tell(self, what: str, plural: str, body: Body) -> None:
        self.events.append((self.version, what, plural, copy.deepcopy(body)))
        self.changed.notify_all()

    def _react(self, what: str, body: Body) -> None:
        for kind, react in list(self.controllers):
            if kind == body["kind"]:
                react(what, copy.deepcopy(body))

    def fails(self, how: str) -> bool:
        """Whether this is one of the requests that shall fail in this way (`away`, `busy`, `gone`)."""
        with self.changed:
            left: int = getattr(self, how)
            setattr(self, how, max(0, left - 1))
            return left > 0

    def expire(self) -> None:
        """End one watch, of those that are open or the next, with 410."""
        with self.changed:
            self.gone += 1
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def allow(self, asked: Request) -> None:
        """Raises Refused unless a role that is bound to the user allows the request."""
        if asked.user == ADMIN or any(_grants(rule, asked) for rule in self._rules(asked)):
            return
        named = f' "{asked.name}"' if asked.name else ""
        raise Refused(
            403,
            "Forbidden",
            f'{_resource(asked.group, asked.resource)}{named} is forbidden: User "{asked.user}" cannot {asked.verb} '
            f'resource "{asked.resource}" in API group "{asked.group}" in the namespace "{asked.namespace}"',
            {"name": asked.name, "group": asked.group, "kind": asked.resource},
        )

    def _rules(self, asked: Request) -> Iterator[Body]:
        for binding in (one for one in self.roles if one["kind"] == "RoleBinding"):
            here = binding["metadata"].get("namespace", NAMESPACE)
            users = [f"system:serviceaccount:{s.get('namespace', here)}:{s['name']}" for s in binding["subjects"]]
            if here == asked.namespace and asked.user in users:
                reference = binding["roleRef"]
                for role in self.roles:
                    same = (role["kind"], role["metadata"]["name"]) == (reference["kind"], reference["name"])
                    if same and (role["kind"] == "ClusterRole" or role["metadata"].get("namespace", here) == here):
                        yield from role["rules"]


def _grants(rule: Body, asked: Request) -> bool:
    wanted = {"apiGroups": asked.group, "resources": asked.resource, "verbs": asked.verb}
    return all(value in rule[key] or "*" in rule[key] for key, value in wanted.items()) and (
        "resourceNames" not in rule or asked.name in rule["resourceNames"]
    )


def _resource(group: str, plural: str) -> str:
    return f"{plural}.{group}" if group else plural


class _Handler(Answering):
    cluster: Cluster

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # whoever asked has gone
            super().handle()

    def _serve(self) -> None:
        cluster = self.cluster
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if cluster.fails("away"):
            self.close_connection = True
            return
        try:
            if cluster.fails("busy"):
                raise Refused(503, "ServiceUnavailable", "the server is currently unable to handle the request")
            if cluster.fails("pages"):
                self._send(200, b"<html>Log in</html>", "text/html")
            else:
                self._answer(raw)
        except Refused as error:
            self._send(error.status, json.dumps(_failure(error)).encode())

    def _answer(self, raw: bytes) -> None:
        cluster, parts = self.cluster, urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if scheme != "Bearer" or token not in cluster.tokens:
            raise Refused(401, "Unauthorized", "Unauthorized")
        found = PATH.fullmatch(unquote(parts.path))
        if parts.path.startswith("/apis") and (found is None or found["plural"] is None):
            return self._discover(parts.path)
        group, plural = (found["group"] or "", found["plural"]) if found else ("", "")
        version, kind = cluster.kinds.get((group, plural), ("", ""))
        if found is None or not kind or (found["core"] or found["version"]) != version:
            return self._send(404, b"404 page not found\n", "text/plain")
        namespace, name, sub = found["namespace"] or "", found["name"] or "", found["sub"] or ""
        resource = f"{plural}/{sub}" if sub else plural
        watched = query.get("watch") in ("true", "1")
        verb = VERBS.get(self.command) or ("get" if name else "watch" if watched else "list")
        selected = re.fullmatch(r"metadata\.name=(.+)", query.get("fieldSelector", ""))
        asked = Request(cluster.tokens[token], verb, group, resource, namespace, name or (selected or "  ")[1].strip())
        cluster.asked.append(asked)
        cluster.allow(asked)
        key = (plural, namespace, name)
        if verb == "watch" and cluster.fails("refused_watches"):
            raise Refused(410, "Expired", "too old resource version")
        if verb == "watch":
            return self._watch(plural, namespace, query)
        if sub == "log":
            if name not in cluster.logs:
                raise _absent(group, plural, name)
            lines = cluster.logs[name].splitlines()[-int(query.get("tailLines", 10**6)) :]
            return self._send(200, "".join(f"{line}\n" for line in lines).encode(), "text/plain")
        if verb == "list":
            items = [
                one
                for (p, n, _), one in cluster.objects.items()
                if p == plural and namespace in ("", n) and fits(one, query)
            ]
            top = {"apiVersion": f"{group}/{version}".strip("/"), "kind": f"{kind}List"}
            metadata = {"resourceVersion": str(cluster.version)}
            return self._send(200, json.dumps({**top, "metadata": metadata, "items": items}).encode())
        with cluster.changed:
            status, body = self._change(verb, key, group, kind, sub, raw, query)
        return self._send(status, json.dumps(body).encode())

    def _send(self, status: int, content: bytes, kind: str = "application/json") -> None:
        if self.cluster.fails("cut"):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content) + 9))
            self.end_headers()
            self.wfile.write(content)
            self.close_connection = True
            return
        super()._send(status, content, kind)

    def _discover(self, path: str) -> None:
        """The groups, or the kinds of one."""
        kinds = self.cluster.kinds
        group, _, version = path.removeprefix("/apis").strip("/").partition("/")
        own = [(plural, kind) for (g, plural), (v, kind) in kinds.items() if g == group and v == version]
        if not group:
            versions = sorted({(g, v) for (g, _), (v, _) in kinds.items() if g})
            groups = {
                g: [{"groupVersion": f"{g}/{v}", "version": v} for h, v in versions if h == g] for g, _ in versions
            }
            listed = [{"name": g, "versions": found} for g, found in groups.items()]
            self._send(200, json.dumps({"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}).encode())
        elif own:
            listed = [{"name": plural, "kind": kind, "namespaced": True} for plural, kind in own]
            found = {"kind": "APIResourceList", "groupVersion": f"{group}/{version}", "resources": listed}
            self._send(200, json.dumps(found).encode())
        else:
            self._send(404, b"404 page not found\n", "text/plain")

    def _change(
        self, verb: str, key: Key, group: str, kind: str, sub: str, raw: bytes, query: dict[str, str]
    ) -> tuple[int, Body]:
        cluster, (plural, namespace, name) = self.cluster, key
        form = self.headers.get("Content-Type", "")
        body: Any = (yaml.safe_load if "yaml" in form else json.loads)(raw) if raw else {}
        if verb == "create":
            if namespace and ("namespaces", "", namespace) not in cluster.objects:
                raise _absent("", "namespaces", namespace)
            name = body["metadata"].get("name") or f"{body['metadata']['generateName']}{cluster.version:05d}"
            key = (plural, namespace, name)
            if key in cluster.objects:
                said = f'{_resource(group, plural)} "{name}" already exists'
                raise Refused(409, "AlreadyExists", said, {"name": name, "group": group, "kind": plural})
            if cluster.quota:
                said = f'{_resource(group, plural)} "{name}" is forbidden: exceeded quota: {cluster.quota}'
                raise Refused(403, "Forbidden", said, {"name": name, "kind": plural})
            self._sound(body, group, kind, key)
            cluster.owners[key] = dict.fromkeys(claimed(body), query.get("fieldManager", "unknown"))
            return 201, cluster.store(key, {k: v for k, v in body.items() if k != "status"})
        before, owners = cluster.objects.get(key), cluster.owners.setdefault(key, {})
        apply = form == "application/apply-patch+yaml"
        if before is None and not apply:
            raise _absent(group, plural, name)
        if verb == "get":
            return 200, copy.deepcopy(before or {})
        if verb == "delete":
            cluster.drop(key)
            return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success"}
        if apply:
            if "fieldManager" not in query:
                raise Refused(400, "BadRequest", "fieldManager is required for apply patch")
            after = applied(before, body, owners, query["fieldManager"], query.get("force") == "true")
        else:
            after = (
                body
                if verb == "update"
                else operated(before or {}, body)
                if "json-patch" in form
                else merged(before, body)
            )
            changed = [path for path, value in leaves(after) if at_path(before, path) != value]
            owners.update(dict.fromkeys(changed, query.get("fieldManager", "unknown")))
        newest = (before or {}).get("metadata", {}).get("resourceVersion")
        if after.get("metadata", {}).get("resourceVersion", newest) != newest:
            said = f'Operation cannot be fulfilled on {_resource(group, plural)} "{name}": the object has been modified'
            raise Refused(409, "Conflict", said, {"name": name, "kind": plural})
        whole = {**(before or {}), "status": after.get("status", {})} if sub else {**after}
        if not sub:
            whole.pop("status", None)
            whole |= {"status": before["status"]} if before and "status" in before else {}
            self._sound(whole, group, kind, key)
        return (200 if before else 201), cluster.store(key, whole)

    def _sound(self, body: Body, group: str, kind: str, key: Key) -> None:
        plural, namespace, name = key
        version = self.cluster.kinds[group, plural][0]
        form = (body.get("apiVersion"), body.get("kind"), body["metadata"].get("namespace", namespace))
        if form != (f"{group}/{version}".strip("/"), kind, namespace):
            raise Refused(400, "BadRequest", f"the object provided is unrecognized: {form} is no {kind} of {namespace}")
        own = {k: v for k, v in body["metadata"].items() if k not in SERVERS_OWN}
        if found := self.cluster.faults({**body, "metadata": own}):
            raise Refused(422, "Invalid", f'{kind}.{group} "{name}" is invalid: {"; ".join(found)}', {"name": name})

    def _watch(self, plural: str, namespace: str, query: dict[str, str]) -> None:
        cluster, since = self.cluster, int(query.get("resourceVersion") or 0)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        until = time.monotonic() + float(query.get("timeoutSeconds") or 60)
        while True:
            with cluster.changed:
                gone = cluster.fails("gone")
                new = [one for one in cluster.events if one[0] > since]
                if not new and not gone:
                    cluster.changed.wait(max(0.0, until - time.monotonic()))
                    if not cluster.gone and (cluster.closed or time.monotonic() >= until):
                        self.wfile.write(b"0\r\n\r\n")
                        return
                    continue
            if gone:
                expired = Refused(410, "Expired", f"too old resource version: {since} ({cluster.version})")
                self._chunk({"type": "ERROR", "object": _failure(expired)})
                self.wfile.write(b"0\r\n\r\n")
                return
            for version, what, kind, body in new:
                since = version
                if kind == plural and namespace in ("", body["metadata"].get("namespace")) and fits(body, query):
                    self._chunk({"type": what, "object": body})

    def _chunk(self, value: Body) -> None:
        line = json.dumps(value).encode() + b"\n"
        self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
        self.wfile.flush()

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve


def _absent(group: str, plural: str, name: str) -> Refused:
    details = {"name": name, "group": group, "kind": plural}
    return Refused(404, "NotFound", f'{_resource(group, plural)} "{name}" not found', details)


def _failure(error: Refused) -> Body:
    said = {"message": str(error), "reason": error.reason, "details": error.details, "code": error.status}
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", **said}


@contextlib.contextmanager
def serving(cluster: Cluster) -> Iterator[str]:
    """Serve it on a free port of loopback; its address."""
    with Loopback(_Handler, cluster=cluster) as server:
        try:
            yield server.url
        finally:
            cluster.close()
