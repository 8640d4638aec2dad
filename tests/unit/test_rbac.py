"""What Kubeflow Pipelines 2.17, Argo and we ask the API server for in our namespace, held against the rendered roles.

The calls are read in the sources of kubeflow/pipelines at the tag 2.17.0, below backend/src/v2; each says where. They
run as the workflow's account, which `submit --service-account pipeline-runner` names.
"""

import copy
from typing import Any, NamedTuple

import pytest

from tests.unit.test_k8s import Document, documents, everywhere

RUNNER = "pipeline-runner"


class Call(NamedTuple):
    """A request to the API server: what is asked of which kind (and object), and the line that asks."""

    group: str
    resource: str
    verb: str
    name: str
    where: str


NEEDED = [
    Call("", "configmaps", "get", "kfp-launcher", "root_dag.go:103, config/env.go:73; NotFound alone is forgiven"),
    Call("", "secrets", "get", "mlpipeline-minio-artifact", "launcher_v2.go:269, objectstore/object_store.go:391"),
    Call("argoproj.io", "workflowtaskresults", "create", "", "Argo's executor; KFP's own pipeline-runner-role.yaml:84"),
    Call("argoproj.io", "workflowtaskresults", "patch", "a-step", "the same"),
]
"""Without one of these a run ends at its first pod, or at the first one that has an output."""
NOT_NEEDED = [
    Call("", "pods", "get", "a-step", "component/launcher_v2.go:607: with an older API server; it may fail"),
    Call("", "pods", "get", "a-driver", "driver/k8s.go:1198: CreatePVC and DeletePVC, which no step of ours is"),
    Call("", "persistentvolumeclaims", "create", "", "driver/k8s.go:967: CreatePVC"),
    Call("", "persistentvolumeclaims", "delete", "face-mllm-workspace", "driver/k8s.go:1093: DeletePVC"),
    Call("argoproj.io", "workflows", "get", "a-run", "cmd/driver/main.go:178: times as placeholders; none of ours"),
]
FORBIDDEN = [
    Call("", "secrets", "get", "mlflow-store", "another's password"),
    Call("", "secrets", "list", "", "all passwords: resourceNames bind no list"),
    Call("", "secrets", "watch", "mlpipeline-minio-artifact", ""),
    Call("", "configmaps", "get", "face-mllm-policy", "mounted where it is read"),
    Call("", "configmaps", "patch", "face-mllm-policy", "who may change it decides who decides"),
    Call("", "configmaps", "update", "kfp-launcher", "whoever points it elsewhere reads every artifact"),
    Call("", "pods", "create", "", "a pod may mount any Secret"),
    Call("", "pods/exec", "create", "a-step", ""),
    Call("", "serviceaccounts/token", "create", RUNNER, ""),
    Call("rbac.authorization.k8s.io", "rolebindings", "create", "", ""),
    Call("serving.kserve.io", "inferenceservices", "patch", "face-mllm", "what serves is decided elsewhere"),
    Call("ray.io", "rayjobs", "patch", "train-align-000000000000", "a job is made anew, never changed"),
]
LAUNCHING = [
    Call("ray.io", "rayjobs", "create", "", "launcher.py: _begin"),
    Call("ray.io", "rayjobs", "get", "train-align-000000000000", "launcher.py: _begin, after AlreadyExists"),
    Call("ray.io", "rayjobs", "list", "", "launcher.py: remove; kubernetes.py: watch, at its start and after 410"),
    Call("ray.io", "rayjobs", "watch", "", "kubernetes.py: watch"),
    Call("ray.io", "rayjobs", "delete", "train-align-000000000000", "launcher.py: _begin, _follow, remove"),
    Call("kueue.x-k8s.io", "localqueues", "get", "gpus", "launcher.py: launch, where cluster.queue names one"),
    Call("", "pods", "list", "", "launcher.py: _pods"),
    Call("", "pods/log", "get", "train-align-000000000000-head", "launcher.py: _why"),
]
"""What `trainer` may besides. It is an account apart, for who may make a RayJob may make a pod."""

STAGING = [
    Call("serving.kserve.io", "inferenceservices", "get", "", "kserve/target.py: stage"),
    Call("serving.kserve.io", "inferenceservices", "create", "", "kserve/service.py: apply, where there is none"),
    Call("serving.kserve.io", "inferenceservices", "patch", "", "kserve/service.py: apply"),
    Call("serving.kserve.io", "inferenceservices", "list", "", "kubernetes.py: watch, at its start and after 410"),
    Call("serving.kserve.io", "inferenceservices", "watch", "", "kserve/service.py: ready"),
    Call("serving.kserve.io", "inferenceservices", "delete", "", "kserve/target.py: unstage"),
    Call("", "events", "list", "", "kserve/service.py: why a pod does not start"),
]
"""What the step `deploy` calls besides, where components/releaser is there. Production is in another namespace."""


def rules_of(source: list[Document], account: str) -> list[Document]:
    """The rules of every role that is bound to an account of our namespace."""
    roles = {d["metadata"]["name"]: d["rules"] for d in source if d["kind"] == "Role"}
    subject = {"kind": "ServiceAccount", "name": account, "namespace": "face-mllm"}
    bindings = [d for d in source if d["kind"] == "RoleBinding" and subject in d["subjects"]]
    return [rule for binding in bindings for rule in roles[binding["roleRef"]["name"]]]


def allowed(rules: list[Document], call: Call) -> bool:
    """As RBAC decides: one rule has to allow all of it; `resourceNames` exclude other names, and requests without."""

    def holds(asked: str, granted: list[str]) -> bool:
        return asked in granted or "*" in granted

    return any(
        holds(call.group, rule["apiGroups"])
        and holds(call.resource, rule["resources"])
        and holds(call.verb, rule["verbs"])
        and ("resourceNames" not in rule or call.name in rule["resourceNames"])
        for rule in rules
    )


ACCOUNTS = {RUNNER: (NEEDED, [*FORBIDDEN, *LAUNCHING]), "trainer": ([*NEEDED, *LAUNCHING], FORBIDDEN)}


@everywhere
@pytest.mark.parametrize("account", ACCOUNTS)
def test_steps_may_do_what_kubeflow_and_kuberay_need_and_nothing_more(source: str, account: str) -> None:
    rules = rules_of(documents(source), account)
    needed, forbidden = ACCOUNTS[account]
    if source == "gpu":
        needed, forbidden = [*needed, *STAGING], [one for one in forbidden if one.resource != "inferenceservices"]
    assert [call for call in needed if not allowed(rules, call)] == []
    assert [call for call in (*NOT_NEEDED, *forbidden) if allowed(rules, call)] == []
    granted = {
        (group, resource, verb, name)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
        for name in rule.get("resourceNames", [""])
    }
    used = {(call.group, call.resource, call.verb, _named(call)) for call in needed}
    assert granted == used, "every word of the role has a call behind it"


def _named(call: Call) -> str:
    return call.name if call.resource in ("configmaps", "secrets") else ""


@everywhere
def test_the_model_server_may_do_nothing(source: str) -> None:
    assert rules_of(documents(source), "model-server") == []


EVERY = [*NEEDED, *LAUNCHING]


@pytest.mark.parametrize("call", EVERY, ids=[f"{call.verb} {call.resource}" for call in EVERY])
def test_a_role_that_lacks_a_call_is_noticed(call: Call) -> None:
    rules = copy.deepcopy(rules_of(documents("base"), "trainer"))
    for rule in rules:
        if call.resource in rule["resources"]:
            rule["verbs"].remove(call.verb)
    assert not allowed(rules, call)


WIDER: dict[str, dict[str, Any]] = {
    "all Secrets": {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]},
    "a list of one": {"apiGroups": [""], "resources": ["secrets"], "verbs": ["*"], "resourceNames": ["mlflow-store"]},
    "everything": {"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]},
}


@pytest.mark.parametrize("rule", WIDER.values(), ids=WIDER)
def test_a_role_that_allows_more_is_noticed(rule: dict[str, Any]) -> None:
    rules = [*rules_of(documents("base"), RUNNER), rule]
    assert [call for call in FORBIDDEN if allowed(rules, call)] != []
