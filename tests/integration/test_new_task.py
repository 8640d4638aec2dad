"""A task of one's own: one module and its name in params.yaml; then it is asked, learnt, evaluated and reported."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

PROJECT = Path(__file__).parents[2]

MODULE = '''"""Whether the face is seen from the front: within ten degrees."""

from facemllm.tasks.base import Option, Row, Task
from facemllm.tasks.items import Choice


def _view(row: Row) -> str | None:
    yaw = row.get("yaw")
    return None if yaw is None else "frontal" if abs(yaw) <= 10 else "turned"


TASK = Task(
    name="view",
    metric="balanced_accuracy",
    unit="",
    use="choosing pictures",
    items=(
        Choice(
            name="view",
            templates=("From where is the face seen?", "From which angle is this face seen?"),
            unseen=("From which side is the face seen?",),
            options=(Option(value="frontal", text="from the front"), Option(value="turned", text="from the side")),
            source=_view,
            claim="the face is seen {}",
            patterns={"frontal": ("from the front", "frontal"), "turned": ("from the side",)},
        ),
    ),
)
'''

DRIVER = """
import sys
from pathlib import Path

def main():
    from facemllm import settings
    from facemllm.core import digests
    from facemllm.evaluate.run import evaluate
    from facemllm.report.run import write_report
    from facemllm.reformat.run import reformat
    from facemllm.ingest.run import ingest
    from facemllm.train.torchrun import train

    s = settings.load("ci", sys.argv[1:])
    work = Path("work")
    ingest(s, work / "faces")
    reformat(s, work / "faces", work / "conversations")
    model = work / "model"
    train("align", s, work / "conversations", None, model, work / "checkpoints")
    metrics = evaluate(s, model, digests.of_tree(model), work / "conversations", work / "evaluation")
    summary = {"run": "new task", "profile": "ci", "tasks": metrics["tasks"], "closed_mean": metrics["closed_mean"]}
    write_report(work / "report.html", summary, work / "evaluation")

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with one file more and one name more in params.yaml."""
    copy = tmp_path_factory.mktemp("project")
    shutil.copytree(PROJECT / "facemllm", copy / "facemllm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PROJECT / "profiles", copy / "profiles")
    params = (PROJECT / "params.yaml").read_text("utf-8")
    before, tasks, after = params.partition("  tasks: [caption, ")
    assert tasks
    (copy / "params.yaml").write_text(f"{before}{tasks}view, {after}", "utf-8")
    (copy / "facemllm" / "tasks" / "view.py").write_text(MODULE, "utf-8")
    return copy


def test_a_task_of_ones_own_goes_all_the_way(project):
    stage = ("steps=4", "objective=answers", "tasks={view: 1.0, expression: 1.0}", "trains.language=full")
    overrides = [
        *("ingest.identities=60", "ingest.image_size=64", "model.image_size=32"),
        *("train.threads=1", *(f"train.stages.align.{override}" for override in stage)),
        *("evaluate.generated_faces=2", "evaluate.disturbed_faces=0"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(project)}
    command = [sys.executable, "-c", DRIVER, *overrides]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    figure = json.loads((project / "work/evaluation/metrics.json").read_text())["tasks"]["view"]
    assert figure["n"] > 0
    assert figure["baselines"]["constant"] == pytest.approx(0.5)
    assert figure["low"] <= figure["value"] <= figure["high"]
    assert ">view<" in (project / "work/report.html").read_text()


def test_its_code_counts_where_it_is_asked_and_only_there(project):
    def key(folder, asked):
        digest = f"from facemllm.core import digests; print(digests.of_code('facemllm.reformat.run', {asked}))"
        command, environment = [sys.executable, "-c", digest], {**os.environ, "PYTHONPATH": str(folder)}
        return subprocess.check_output(command, cwd=folder, env=environment, text=True)

    assert key(project, ("age", "view")) != key(PROJECT, ("age", "view"))
    assert key(project, ("age",)) == key(PROJECT, ("age",))
