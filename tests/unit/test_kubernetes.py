"""The client of the Kubernetes API against a stand-in that demands a token, a role and a sound body."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from facemllm.core.kubernetes import CONFIG_MAP, INFERENCE_SERVICE, POD, RAY_JOB, Api, ApiError, connect
from facemllm.errors import UserError
from tests.kubernetes_server import ADMIN, NAMESPACE, Cluster, serving

ROLE = {
    "kind": "Role",
    "metadata": {"name": "trainer"},
    "rules": [
        {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["create", "get", "patch", "delete", "list"]},
        {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["watch"], "resourceNames": ["one"]},
        {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
    ],
}
SUBJECT = {"kind": "ServiceAccount", "name": "trainer", "namespace": NAMESPACE}
BINDING = {
    "kind": "RoleBinding",
    "metadata": {"name": "trainer"},
    "roleRef": {"kind": "Role", "name": "trainer"},
    "subjects": [SUBJECT],
}


def config_map(name: str = "one", **data: str) -> dict[str, Any]:
    metadata = {"name": name, "labels": {"run": "7"}}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


@pytest.fixture
def cluster() -> Cluster:
    return Cluster(roles=[ROLE, BINDING])


@pytest.fixture
def address(cluster: Cluster) -> Iterator[str]:
    with serving(cluster) as address:
        yield address


@pytest.fixture
def as_(cluster: Cluster, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`as_("trainer")`: the API as that account asks it; its waiting takes no time."""

    def connected(token: str = "trainer", at: str = address) -> Api:
        cluster.kubeconfig(tmp_path / "kubeconfig", at, token)
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        api = connect()
        now = [0.0]
        api.clock, api.sleep = lambda: now[0], lambda seconds: now.__setitem__(0, now[0] + seconds)
        return api

    return connected


def test_objects_are_made_found_changed_and_deleted(as_, cluster: Cluster) -> None:
    api = as_()
    assert api.namespace == NAMESPACE
    assert api.get(CONFIG_MAP, "one") is None
    made = api.create(CONFIG_MAP, config_map(a="1"))
    assert made["metadata"]["resourceVersion"]
    with pytest.raises(ApiError, match='configmaps "one" already exists') as error:
        api.create(CONFIG_MAP, config_map(a="2"))
    assert (error.value.status, error.value.reason) == (409, "AlreadyExists")
    assert api.patch(CONFIG_MAP, "one", {"data": {"b": "2"}})["data"] == {"a": "1", "b": "2"}
    assert [one["metadata"]["name"] for one in api.select(CONFIG_MAP, {"run": "7"})[0]] == ["one"]
    assert api.select(CONFIG_MAP, {"run": "8"})[0] == []
    api.delete(CONFIG_MAP, "one")
    api.delete(CONFIG_MAP, "one")
    assert api.get(CONFIG_MAP, "one") is None
    cluster.logs["a-pod"] = "one\ntwo\nthree\n"
    assert api.logs("a-pod", lines=2) == ["two", "three"]


def test_of_a_server_side_apply_each_manager_keeps_its_fields(as_, cluster: Cluster) -> None:
    api = as_()
    assert api.apply(CONFIG_MAP, config_map(a="1", b="2"))["data"] == {"a": "1", "b": "2"}
    assert api.apply(CONFIG_MAP, config_map(a="1"))["data"] == {"a": "1"}, "what we no longer name is removed"
    cluster.owners["configmaps", NAMESPACE, "one"]["data", "a"] = "argocd"
    with pytest.raises(ApiError, match=r'\(409\).*conflict with "argocd": \.data\.a') as error:
        api.apply(CONFIG_MAP, config_map(a="3"))
    assert error.value.reason == "Conflict"
    assert api.apply(CONFIG_MAP, config_map(a="3"), force=True)["data"] == {"a": "3"}


@pytest.mark.parametrize("trouble", ["none", "gone", "away", "busy"])
def test_a_watch_tells_every_change_and_mends_itself(as_, cluster: Cluster, trouble: str) -> None:
    api, observed = as_(), []
    cluster.put(config_map(a="1"))
    for found in api.watch(CONFIG_MAP, "one", tick_s=5):
        data = (found or {}).get("data", {}).get("a")
        if data not in observed:
            observed.append(data)
            if data == "1":
                if trouble == "gone":
                    cluster.gone = 1
                elif trouble != "none":
                    setattr(cluster, trouble, 2)
                threading.Thread(target=cluster.put, args=[config_map(a="2")]).start()
            if data == "2":
                cluster.put(config_map("another", a="9"))
                threading.Thread(target=cluster.remove, args=["ConfigMap", "one"]).start()
        if data is None:
            break
    assert observed == ["1", "2", None]
    watches = [one for one in cluster.asked if one.verb == "watch"]
    assert {one.name for one in watches} == {"one"}, "RBAC can allow it by name"


def test_a_watch_that_is_refused_as_too_old_is_begun_anew(as_, cluster: Cluster) -> None:
    api = as_()
    cluster.put(config_map(a="1"))
    found = api.watch(CONFIG_MAP, "one", tick_s=0)
    assert next(found)
    cluster.refused_watches = 1
    assert [(next(found) or {})["data"] for _ in range(2)] == [{"a": "1"}] * 2
    assert cluster.refused_watches == 0


def test_an_answer_cut_off_is_asked_for_again_and_a_page_is_one_line(as_, cluster: Cluster, capsys: Any) -> None:
    api = as_()
    cluster.put(config_map(a="1"))
    cluster.cut = 2
    assert len(api.select(CONFIG_MAP)[0]) == 1
    assert "waiting for it" in capsys.readouterr().err
    cluster.pages = 1
    with pytest.raises(ApiError, match="answers with no object of Kubernetes, as a login page"):
        api.select(CONFIG_MAP)


def test_a_watch_shows_the_object_again_when_nothing_changes(as_, cluster: Cluster) -> None:
    cluster.put(config_map(a="1"))
    found = as_().watch(CONFIG_MAP, "one", tick_s=0)
    assert [(next(found) or {})["data"] for _ in range(3)] == [{"a": "1"}] * 3


def test_an_api_that_is_away_for_a_while_is_waited_for(as_, cluster: Cluster, capsys: Any) -> None:
    api = as_()
    cluster.busy, cluster.away = 2, 2
    assert api.get(CONFIG_MAP, "one") is None
    assert capsys.readouterr().err.count("is away; waiting for it, up to 60 s") == 1
    cluster.busy = 1000
    with pytest.raises(ApiError, match=r"is in trouble \(503\): the server is currently unable"):
        api.get(CONFIG_MAP, "one")
    assert 60 < api.clock() < 90


REFUSALS = {
    "nobody": ("", "a", r"does not know who asks \(401\): the token is missing, expired"),
    "a stranger": ("x", "a", r"does not know who asks \(401\)"),
    "no such role": (
        "trainer",
        RAY_JOB,
        r'rayjobs.ray.io "one" is forbidden: User "system:serviceaccount:face-mllm:trainer" cannot get resource '
        r'"rayjobs" in API group "ray.io" in the namespace "face-mllm" \(403\); bind a role',
    ),
    "no such kind": (
        ADMIN,
        INFERENCE_SERVICE,
        r"has no serving.kserve.io/v1beta1 InferenceService \(404\); install KS",
    ),
}


@pytest.mark.parametrize(("token", "kind", "says"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_is_one_line(as_, cluster: Cluster, token: str, kind: Any, says: str) -> None:
    del cluster.kinds["serving.kserve.io", "inferenceservices"]
    with pytest.raises(ApiError, match=says) as error:
        as_(token).get(CONFIG_MAP if kind == "a" else kind, "one")
    assert "\n" not in str(error.value)


def test_what_the_cluster_has_no_room_or_no_place_for_is_one_line(as_, cluster: Cluster) -> None:
    cluster.quota = "gpus, requested: requests.nvidia.com/gpu=8, used: 8, limited: 8"
    with pytest.raises(ApiError, match=r"no room in namespace face-mllm \(403\): .*exceeded quota: gpus.*raise the"):
        as_().create(CONFIG_MAP, config_map())
    api = as_(ADMIN)
    api.namespace = "elsewhere"
    with pytest.raises(ApiError, match=r'\(404\): namespaces "elsewhere" not found'):
        api.create(CONFIG_MAP, config_map())


def test_a_body_that_its_schema_refuses_is_one_line(as_, cluster: Cluster) -> None:
    cluster.faults = lambda body: ["$.data: no"]
    with pytest.raises(ApiError, match=r"refuses this \(422\): ConfigMap\. \"one\" is invalid: \$.data: no"):
        as_().create(CONFIG_MAP, config_map())


def test_nobody_listens(as_, capsys: Any) -> None:
    with pytest.raises(
        ApiError, match=r"no Kubernetes API answers at http://127.0.0.1:1: .*refused.*check the network"
    ):
        as_(at="http://127.0.0.1:1").get(POD, "one")
    assert "waiting for it" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "{", "{}", "apiVersion: v1\nkind: Config\ncontexts: []\n"])
def test_without_a_cluster_it_says_how_to_name_one(tmp_path: Path, monkeypatch: Any, content: str | None) -> None:
    file = tmp_path / "kubeconfig"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("KUBECONFIG", str(file))
    with pytest.raises(UserError, match=r"no Kubernetes cluster is named: .*kubeconfig in KUBECONFIG"):
        connect()
