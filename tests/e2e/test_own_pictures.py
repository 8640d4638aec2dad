"""A folder of one's own pictures (drawn heads with a labels.csv) goes through the workflow; then one is forgotten."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.e2e
LABELS = ("gender", "age", "expression", "yaw", "pitch", "roll")


@pytest.fixture(scope="module")
def folder(project: Any) -> Path:
    """120 people in 240 pictures, one damaged file, one without a row."""
    table, out = project.home / "heads", project.home / "pictures"
    done = project.facemllm("render", str(table))
    assert done.returncode == 0, done.stderr
    rows = [row for part in sorted(table.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]
    names = sorted({pair["name"] for row in rows for pair in row["attributes"]})
    out.mkdir()
    with (out / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "subject", *LABELS, *names])
        for number, row in enumerate(rows):
            (out / f"{number:03d}.jpg").write_bytes(row["image"]["bytes"])
            known = {pair["name"]: int(pair["value"]) for pair in row["attributes"]}
            facts = [row[label] for label in LABELS] + [known.get(name, "") for name in names]
            writer.writerow([f"{number:03d}.jpg", f"person {number // 2}", *facts])
        writer.writerow(["damaged.jpg", "person 0", *[""] * (len(LABELS) + len(names))])
    (out / "damaged.jpg").write_bytes((out / "000.jpg").read_bytes()[:500])
    (out / "unnamed.jpg").write_bytes((out / "001.jpg").read_bytes())
    return out


@pytest.fixture(scope="module")
def source(folder: Path) -> tuple[str, ...]:
    few = [f"train.stages.{stage}.steps=6" for stage in ("align", "instruct", "specialize")]
    own = [{"name": "imagefolder", "root": str(folder)}]
    return (f"ingest.sources={json.dumps(own)}", *few, "evaluate.bootstrap=100")


@pytest.fixture(scope="module")
def ran(project: Any, source: tuple[str, ...]) -> dict[str, Any]:
    return project.run(more=source)


def stored(project: Any, summary: dict[str, Any], step: str) -> Path:
    digest = next(entry["digest"] for entry in summary["steps"] if entry["name"] == step)
    return project.home / "home" / "store" / digest


def test_the_whole_workflow_runs_on_a_folder(project: Any, ran: dict[str, Any]) -> None:
    states = {step["name"]: step["state"] for step in ran["steps"]}
    assert states.pop("release") == "skipped"
    assert set(states.values()) == {"done"}
    asked = {"caption", "attributes", "expression", "age", "gender", "head_pose", "unanswerable", "zero_shot"}
    assert set(ran["tasks"]) == asked
    manifest = json.loads((stored(project, ran, "ingest") / "manifest.json").read_text())
    assert (manifest["rows"], manifest["quarantined"]) == (240, 2)
    assert manifest["about"]["sources"] == ["imagefolder"]
    report = (stored(project, ran, "validate") / "report.html").read_text()
    assert "Pictures of your own" in report
    assert "no row in labels.csv" in report


def test_a_forgotten_person_is_nowhere_and_the_models_are_named(
    project: Any, folder: Path, source: tuple[str, ...], ran: dict[str, Any]
) -> None:
    person = pq.read_table(next(stored(project, ran, "ingest").glob("part-*.parquet")), columns=["source_id", "image"])
    faces = [row["image"]["bytes"] for row in person.to_pylist() if row["source_id"] in ("000", "001")]
    assert len(faces) == 2
    words = ["forget", "--subject", "imagefolder:person 0", "--reason", "asked for it", "--by", "Ada Lovelace"]
    done = project.call("-m", "facemllm", *words, "--json")
    assert done.returncode == 0, done.stderr
    assert '"version": 1' in done.stdout or '"version": "1"' in done.stdout
    for file in (path for path in (project.home / "home").rglob("*") if path.is_file()):
        data = file.read_bytes()
        assert not any(face in data for face in faces), file
    columns = len((folder / "labels.csv").read_text().splitlines()[0].split(",")) - 2
    (folder / "renamed.jpg").write_bytes((folder / "000.jpg").read_bytes())
    with (folder / "labels.csv").open("a", newline="") as file:
        csv.writer(file).writerow(["renamed.jpg", "somebody else", *[""] * columns])
    done = project.call("-m", "facemllm", "ingest", str(project.home / "third"), more=source)
    assert done.returncode == 0, done.stderr
    refused = pq.read_table(project.home / "third" / "quarantine.parquet").to_pylist()
    assert sum(row["reason"] == "forgotten" for row in refused) == 3
