"""The DAG: names, order, parameters and resources are pinned, and every door leads to the same steps."""

from __future__ import annotations

import inspect
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from google.protobuf import json_format
from kfp import compiler, components
from kfp.pipeline_spec import pipeline_spec_pb2

import commands
import pipeline
from facemllm.settings import Settings, load
from facemllm.workflow.steps import STEPS

ORDER = [
    "ingest",
    "annotate",
    "reformat",
    "validate",
    "version",
    "align",
    "instruct",
    "specialize",
    "evaluate",
    "gate",
    "register",
    "deploy",
    "await_approval",
    "release",
]
EDGES = {
    "ingest": {},
    "annotate": {"faces": "ingest"},
    "reformat": {"annotated": "annotate"},
    "validate": {"faces": "ingest", "annotated": "annotate", "conversations": "reformat"},
    "version": {"annotated": "annotate", "conversations": "reformat"},
    "align": {"conversations": "reformat"},
    "instruct": {"conversations": "reformat", "model": "align"},
    "specialize": {"conversations": "reformat", "model": "instruct"},
    "evaluate": {"model": "specialize", "conversations": "reformat"},
    "gate": {"evaluation": "evaluate"},
    "register": {"model": "specialize", "evaluation": "evaluate", "gate": "gate"},
    "deploy": {"version": "register"},
    "await_approval": {"version": "register"},
    "release": {"version": "register"},
}
COMMON = {"profile", "overrides", "code"}
UNCACHED = {"ingest", "version", "gate", "register", "deploy", "await_approval", "release"}


@pytest.fixture(scope="module")
def settings() -> Settings:
    return load("laptop")


@pytest.fixture(scope="module")
def documents(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    out = tmp_path_factory.mktemp("spec") / "spec.yaml"
    commands.write_specification(pipeline.build, settings, [], out)
    return list(yaml.safe_load_all(out.read_text()))


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


def outer_source(spec: dict, value: dict) -> str | None:
    """The step a task's input comes from; pipeline parameters and constants have none."""
    producer = value.get("taskOutputParameter", {}).get("producerTask")
    if producer:
        return producer.replace("-", "_")
    name = value.get("componentInputParameter", "")
    if name.startswith("pipelinechannel--") and name.endswith("-Output"):
        return name.removeprefix("pipelinechannel--").removesuffix("-Output").replace("-", "_")
    return None


def conditional(tasks: dict[str, dict], name: str) -> dict:
    return next(task for task in tasks.values() if task["taskInfo"]["name"] == name)


def check_graph(spec: dict) -> None:
    found = tasks(spec)
    assert set(found) == set(ORDER)
    for name, task in found.items():
        inputs = task["inputs"]["parameters"]
        assert set(inputs) == COMMON | set(EDGES[name]), name
        sources = {key: outer_source(spec, value) for key, value in inputs.items() if key not in COMMON}
        assert sources == EDGES[name], name
        assert bool(task.get("cachingOptions", {}).get("enableCache")) == (name not in UNCACHED), name


def test_steps_are_named_and_ordered_as_documented() -> None:
    assert list(STEPS) == ORDER
    assert {name: dict(step.inputs) for name, step in STEPS.items()} == EDGES


def test_compiled_graph_has_these_tasks_inputs_and_caching(documents: list[dict]) -> None:
    check_graph(documents[0])


def test_a_renamed_step_is_noticed(documents: list[dict]) -> None:
    changed = yaml.safe_load(yaml.safe_dump(documents[0]).replace("reformat", "rewrite"))
    with pytest.raises(AssertionError):
        check_graph(changed)


def test_order_of_steps_without_shared_data(documents: list[dict]) -> None:
    found = tasks(documents[0])
    assert "validate" in found["version"]["dependentTasks"]
    assert "version" in found["align"]["dependentTasks"]
    assert "deploy" in found["await_approval"]["dependentTasks"]


def test_conditions_stand_before_registration_and_release(documents: list[dict]) -> None:
    spec = documents[0]
    gated = conditional(spec["root"]["dag"]["tasks"], "gate-passed")
    assert "== 'passed'" in gated["triggerPolicy"]["condition"]
    inner = spec["components"][gated["componentRef"]["name"]]["dag"]["tasks"]
    assert {name for name in inner if not name.startswith("condition")} == {"register", "deploy", "await-approval"}
    approved = conditional(inner, "approved")
    assert "== 'approved'" in approved["triggerPolicy"]["condition"]
    assert set(spec["components"][approved["componentRef"]["name"]]["dag"]["tasks"]) == {"release"}


def test_a_handful_of_pipeline_parameters(documents: list[dict]) -> None:
    assert set(documents[0]["root"]["inputDefinitions"]["parameters"]) == COMMON


def test_resources_are_pinned(documents: list[dict], settings: Settings) -> None:
    spec = documents[0]
    for name in ORDER:
        container = spec["deploymentSpec"]["executors"][f"exec-{name.replace('_', '-')}"]["container"]
        size = settings.cluster.training if name in settings.stages() else settings.cluster.steps
        assert container["image"] == settings.cluster.image
        assert container["resources"]["resourceCpuLimit"] == size.cpu
        assert container["resources"]["resourceMemoryLimit"] == size.memory
        mounts = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        assert mounts[f"exec-{name.replace('_', '-')}"]["pvcMount"][0]["mountPath"] == "/workspace"


def test_gpu_profile_asks_for_accelerators(tmp_path: Path) -> None:
    commands.write_specification(pipeline.build, load("laptop", ["cluster.training.gpus=8"]), [], tmp_path / "gpu.yaml")
    executors = next(yaml.safe_load_all((tmp_path / "gpu.yaml").read_text()))["deploymentSpec"]["executors"]
    asking = {name for name, e in executors.items() if "accelerator" in e["container"]["resources"]}
    assert asking == {"exec-align", "exec-instruct", "exec-specialize"}


def test_specification_is_accepted_by_kfp(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "local.yaml"
    compiler.Compiler().compile(pipeline.build(settings), str(path))
    assert components.load_component_from_file(str(path)).name == "face-mllm"
    spec = next(yaml.safe_load_all(path.read_text()))
    parsed = json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    assert parsed.pipeline_info.name == "face-mllm"


@pytest.mark.parametrize("name", ORDER)
def test_a_component_is_one_docstring_and_one_call(name: str) -> None:
    component = getattr(pipeline, name)
    function = component.python_func
    assert function.__name__ == name
    assert function.__doc__
    source = Path(inspect.getfile(function)).read_text()
    body = source.split('"""')[-1].strip().splitlines()
    assert [line.strip().split("(")[0] for line in body if line.strip()] == [
        "from facemllm.workflow.runner import run_step",
        "return run_step",
    ]
    assert f'run_step("{name}", profile, overrides' in source
    assert set(inspect.signature(function).parameters) == COMMON | set(EDGES[name])


def test_dvc_graph_equals_the_pipeline_graph(settings: Settings) -> None:
    stages = yaml.safe_load(Path("dvc.yaml").read_text())["stages"]
    data_steps = ORDER[: ORDER.index("align")]
    assert list(stages) == data_steps
    producer = {out: name for name, stage in stages.items() for out in stage["outs"]}
    for name in data_steps:
        sources = {producer[dep] for dep in stages[name]["deps"] if dep in producer}
        after = {"validate"} if name == "version" else set()
        assert sources == set(EDGES[name].values()) | after, name
        assert set(stages[name]["params"]) == {"seed", *STEPS[name].sections(settings)} & set(Settings.model_fields), (
            name
        )


def test_facemllm_never_imports_kfp() -> None:
    for path in Path("facemllm").rglob("*.py"):
        source = path.read_text()
        assert "import kfp" not in source, path
        assert "from kfp" not in source, path


@pytest.mark.parametrize("room", ["model", "training"])
def test_model_and_loop_run_on_a_bare_machine(room: str) -> None:
    for path in Path("facemllm", room).glob("*.py"):
        if path.name == "launch.py":
            continue
        for foreign in ("import ray", "from ray", "import mlflow", "from mlflow"):
            assert foreign not in path.read_text(), f"{path}: {foreign}"


def test_make_run_takes_a_folder_of_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "my pictures"
    folder.mkdir()
    # make test hands its own flags down, and a make below another talks of the folders it enters
    outside = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    command = ["make", "-n", "run", f"FACES={folder}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=outside).stdout
    (line,) = (line for line in said.splitlines() if "pipeline.py run" in line)
    words = shlex.split(line)
    assert words[words.index("--profile") + 1] == "own"
    (source,) = load("own", [words[words.index("--set") + 1]]).ingest.sources
    assert (source.name, source.root) == ("imagefolder", str(folder))


def test_what_the_dvc_graph_depends_on_is_there() -> None:
    stages = yaml.safe_load(Path("dvc.yaml").read_text())["stages"]
    needed = [dep for stage in stages.values() for dep in stage["deps"] if not dep.startswith("data/")]
    assert needed
    assert [dep for dep in needed if not Path(dep).exists()] == []
