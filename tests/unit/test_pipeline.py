"""The DAG: names, order and parameters are pinned, and every door leads to the same steps."""

import inspect
import json
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp import compiler, components
from kfp.pipeline_spec import pipeline_spec_pb2

import commands
import pipeline
from cluster.specification import write_specification
from components import component_of
from facemllm.core.step import Step
from facemllm.errors import UserError
from facemllm.settings import Settings, load
from facemllm.settings.train import STEP_NAMES
from facemllm.workflow.steps import DATA, dvc_yaml, steps

ORDER = [
    *("ingest", "annotate", "reformat", "validate", "version", "align", "instruct", "specialize"),
    *("evaluate", "gate", "register", "deploy", "await_approval", "release"),
]
"""The names that commands, runs and reports have promised."""
COMMON = {"profile", "overrides", "code"}
pytestmark = pytest.mark.usefixtures("quick_kfp")


def compiled(settings: Settings, folder: Path) -> list[dict]:
    """The pipeline as KFP's local runner gets it."""
    compiler.Compiler().compile(pipeline.build(settings), str(folder / "spec.yaml"))
    return list(yaml.safe_load_all((folder / "spec.yaml").read_text()))


@pytest.fixture(scope="module")
def documents(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return compiled(settings, tmp_path_factory.mktemp("spec"))


@pytest.fixture(scope="module")
def on_cluster(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    write_specification("laptop", [], file := tmp_path_factory.mktemp("spec") / "spec.yaml")
    return list(yaml.safe_load_all(file.read_text()))


def tasks(spec: dict) -> dict[str, dict]:
    """Every task of the compiled pipeline by step name, conditions unfolded."""
    found: dict[str, dict] = {}
    todo = [spec["root"]["dag"]]
    while todo:
        for name, task in todo.pop()["tasks"].items():
            component = spec["components"][task["componentRef"]["name"]]
            if "dag" in component:
                todo.append(component["dag"])
            else:
                found[name.replace("-", "_")] = task
    return found


def outer_source(value: dict) -> str | None:
    """The step a task's input comes from; pipeline parameters and constants have none."""
    producer = value.get("taskOutputParameter", {}).get("producerTask")
    if producer:
        return producer.replace("-", "_")
    name = value.get("componentInputParameter", "")
    if name.startswith("pipelinechannel--") and name.endswith("-Output"):
        return name.removeprefix("pipelinechannel--").removesuffix("-Output").replace("-", "_")
    return None


def check_graph(spec: dict, listed: dict[str, Step], cached: bool = True):
    found = tasks(spec)
    assert set(found) == set(listed)
    for name, task in found.items():
        inputs = task["inputs"]["parameters"]
        sources = {key: source for key, value in inputs.items() if (source := outer_source(value))}
        assert sources.items() >= dict(listed[name].inputs).items(), name
        assert set(inputs) - COMMON - {"stage"} <= set(listed[name].inputs) | set(sources), name
        assert set(listed[name].after) <= {after.replace("-", "_") for after in task.get("dependentTasks", ())}, name
        assert bool(task.get("cachingOptions", {}).get("enableCache")) == (cached and listed[name].engine_cache), name


def test_steps_are_named_and_ordered_as_promised(settings: Settings):
    assert list(steps(settings)) == ORDER
    assert set(ORDER) - set(settings.stages()) == STEP_NAMES, "settings lie below the steps, so they name them again"
    # what reads the world is never answered from Kubeflow's cache
    uncached = {name for name, step in steps(settings).items() if not step.engine_cache}
    assert uncached == {"ingest", "version", "gate", "register", "deploy", "await_approval", "release"}


def test_compiled_graph_is_that_of_the_list_with_a_handful_of_parameters(documents, settings):
    check_graph(documents[0], steps(settings))
    assert set(documents[0]["root"]["inputDefinitions"]["parameters"]) == COMMON


def test_on_a_cluster_the_graph_ends_with_the_request_and_takes_no_parameters(on_cluster, settings):
    listed = steps(settings)
    del listed["release"]
    steps_alone = deepcopy(on_cluster[0])
    end = steps_alone["root"]["dag"]["tasks"].pop("finish")
    check_graph(steps_alone, listed, cached=False)
    assert end["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}, "it ends a run that failed, too"
    assert end["inputs"]["parameters"]["status"]["taskFinalStatus"] == {"producerTask": "exit-handler-1"}
    assert "inputDefinitions" not in on_cluster[0]["root"], "what pods ask for was made of the settings: both stay"
    given = {json.dumps(task["inputs"]["parameters"]["overrides"]) for task in tasks(steps_alone).values()}
    (overrides,) = given
    assert "promote.wait_minutes=0" in overrides
    codes = {task["inputs"]["parameters"]["code"]["runtimeValue"]["constant"] for task in tasks(steps_alone).values()}
    assert codes == {""}, "the code is the image's"


def replaced(old: str, new: str) -> Any:
    return lambda spec: yaml.safe_load(yaml.safe_dump(spec).replace(old, new))


@pytest.mark.parametrize(
    "damage",
    [
        replaced("reformat", "rewrite"),
        replaced("producerTask: annotate", "producerTask: ingest"),
        replaced("- version", "- validate"),
        replaced("enableCache: true", "enableCache: false"),
        lambda spec: spec["root"]["dag"]["tasks"].pop("validate") and spec,
    ],
    ids=["renamed", "fed by another", "out of order", "without the cache", "lost"],
)
def test_a_changed_graph_is_noticed(documents: list[dict], settings: Settings, damage: Any):
    with pytest.raises((AssertionError, KeyError)):
        check_graph(damage(deepcopy(documents[0])), steps(settings))


def test_a_fourth_stage_is_one_entry(settings: Settings, tmp_path: Path):
    stage = settings.stages()["specialize"].model_dump()
    overrides = [f"train.stages.polish={json.dumps(stage)}", "train.stages.polish.after=align"]
    overrides += ["train.stages.instruct.after=polish"]
    four = load("laptop", overrides)
    listed = steps(four)
    assert list(listed)[5:9] == ["align", "polish", "instruct", "specialize"]
    assert (listed["polish"].inputs["model"], listed["instruct"].inputs["model"]) == ("align", "polish")
    check_graph(compiled(four, tmp_path)[0], listed)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("train.stages.instruct.after=nowhere", "instruct.after: 'nowhere' is none of the stages"),
        ("train.stages.specialize.after=align", "specialize goes on from align, as instruct does"),
        ("train.stages.align.after=specialize", "go on from one another in a circle"),
        *((f'train.stages={{"{name}": STAGE}}', "needs a name of its own") for name in ("evaluate", "Polish", "a b")),
    ],
)
def test_stages_that_are_no_chain_or_have_no_name_of_their_own_are_refused(settings, override, complaint):
    stage = json.dumps(settings.stages()["specialize"].model_dump())
    with pytest.raises(UserError, match=complaint):
        load("laptop", [override.replace("STAGE", stage)])


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        (
            "reformat.tasks=[caption, attributes, expression, age, gender, head_pose, unanswerable, agee]",
            "no task 'agee'",
        ),
        ("reformat.held_out=[Wearing_Earings]", "reformat.held_out: no attribute .* did you mean Wearing_Earrings"),
        ("reformat.reasons.gender=null", "reformat.reasons"),
        ('promote.thresholds."head_pose.yawn".max=3', "head_pose has no item 'yawn'"),
        ("promote.thresholds.agee.max=3", "no task 'agee'"),
        ("promote.thresholds.age={min: 3, max: null}", "less is better here, so give max"),
        ("promote.fairness_gap.agee=0.1", "no task 'agee'"),
    ],
)
def test_names_of_nothing_are_refused_before_anything_runs(tmp_path: Path, override: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        compiled(load("laptop", [override]), tmp_path)


def test_conditions_stand_before_registration_and_release(documents: list[dict]):
    spec = documents[0]

    def conditional(tasks: dict[str, dict], name: str) -> dict:
        return next(task for task in tasks.values() if task["taskInfo"]["name"] == name)

    gated = conditional(spec["root"]["dag"]["tasks"], "gate-passed")
    assert "== 'passed'" in gated["triggerPolicy"]["condition"]
    inner = spec["components"][gated["componentRef"]["name"]]["dag"]["tasks"]
    assert {name for name in inner if not name.startswith("condition")} == {"register", "deploy", "await-approval"}
    approved = conditional(inner, "approved")
    assert "== 'approved'" in approved["triggerPolicy"]["condition"]
    assert set(spec["components"][approved["componentRef"]["name"]]["dag"]["tasks"]) == {"release"}


@pytest.mark.parametrize("name", ["spec.json", "spec"])
def test_a_specification_that_is_no_yaml_is_refused_and_leaves_no_file(tmp_path: Path, name: str):
    with pytest.raises(UserError, match=r"is a \.yaml file; choose such a name, as in spec\.yaml"):
        write_specification("laptop", [], tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_plan_refuses_a_name_as_its_run_would():
    with pytest.raises(UserError, match=r"--name '\.\./t': give a plain name"):
        commands.run(name="../t", plan=True)


def test_specification_is_accepted_by_kfp(documents: list[dict], on_cluster: list[dict], tmp_path: Path):
    for whole in (documents, on_cluster):
        (path := tmp_path / "whole.yaml").write_text(yaml.safe_dump_all(whole), "utf-8")
        assert components.load_component_from_file(str(path)).name == "face-mllm"
        parsed = json_format.ParseDict(whole[0], pipeline_spec_pb2.PipelineSpec())
        assert parsed.pipeline_info.name == "face-mllm"


@pytest.mark.parametrize("name", ORDER)
def test_a_component_is_one_docstring_and_one_call(settings: Settings, name: str):
    component, named = component_of(name)
    function = component.python_func
    assert (component.name.replace("-", "_"), function.__name__) == (name, "train" if named else name)
    assert function.__doc__
    body = inspect.getsource(function).split('"""')[-1].strip().splitlines()
    lines = [line.strip() for line in body if line.strip() and not line.strip().startswith("before =")]
    given = "".join(lines[1:])
    assert lines[0] == "from facemllm.workflow.artifacts import run_component"
    assert given.startswith(
        f"return run_component({'stage' if named else json.dumps(name)}, profile, overrides, [metrics"
    )
    assert given.count("(") == given.count(")") == 1
    shown = {"evaluate": {"report"}, "gate": {"report"}, "validate": {"report"}, "register": {"registered"}}
    artifacts = {"metrics"} | ({"trained"} if named else shown.get(name, set()))
    assert {key for key, value in function.__annotations__.items() if "Output" in str(value)} == artifacts
    taken = set(inspect.signature(function).parameters) - COMMON - artifacts
    inputs = set(steps(settings)[name].inputs)
    assert taken == ({"stage", "conversations", "model"} if named else inputs)


def test_dvc_yaml_is_made_of_the_list():
    assert Path("dvc.yaml").read_text("utf-8") == dvc_yaml()
    stages = yaml.safe_load(dvc_yaml())["stages"]
    assert list(stages) == [step.name for step in DATA]
    producer = {out: name for name, stage in stages.items() for out in stage["outs"]}
    for step in DATA:
        sources = {producer[dep] for dep in stages[step.name]["deps"] if dep in producer}
        assert sources == {*step.inputs.values(), *step.after}, step.name
        assert step.name in stages[step.name]["params"], step.name
    needed = [dep for stage in stages.values() for dep in stage["deps"] if not dep.startswith("data/")]
    assert needed
    assert [dep for dep in needed if not Path(dep).exists()] == []


def test_facemllm_never_imports_kfp():
    for path in Path("facemllm").rglob("*.py"):
        assert not re.search("(import|from) kfp", path.read_text()), path


BARE = """
import sys

sys.modules.update(dict.fromkeys(("ray", "mlflow", "kfp", "kserve", "great_expectations", "dvc")))  # not installed
try:
    import ray
except ImportError:
    import facemllm.model, facemllm.train.loop, facemllm.train.worker, facemllm.train.torchrun

    print("bare")
"""


def test_model_and_loop_run_on_a_bare_machine():
    """They need torch, transformers and peft, not what the workflow around them is made of."""
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, check=False)
    assert done.stdout == "bare\n", done.stderr
