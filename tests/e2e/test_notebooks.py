"""The notebooks, top to bottom, on a finished run of the `ci` profile: that of the main job's tests if there is one."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.e2e
BOOKS = sorted(Path("notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def finished(shared: Any) -> Any:
    """The project, with a run named `ci` that has come to its end, and one beside it that differs in its evaluation."""
    if not (shared.home / "runs" / "ci" / "summary.json").is_file():
        shared.run()
    shared.run("second", ("evaluate.generated_faces=0", "evaluate.disturbed_faces=0"))
    yield shared
    shared.facemllm("services", "down")


@pytest.fixture
def shown(finished: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Executes a notebook on the finished run; what it has shown as text (tables as HTML), and its figures' number."""
    monkeypatch.setenv("FACEMLLM_PROFILE", "ci")
    monkeypatch.setenv("FACEMLLM_SET", shlex.join(finished.sets))

    def execute(number: str) -> tuple[str, int]:
        (path,) = (book for book in BOOKS if book.name.startswith(number))
        book = nbformat.read(path, as_version=4)
        NotebookClient(book, timeout=180, resources={"metadata": {"path": "notebooks"}}).execute()
        outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
        data = [output.get("data", {}) for output in outputs]
        texts = [output.get("text", "") for output in outputs]
        texts += [part.get(kind, "") for part in data for kind in ("text/plain", "text/html")]
        return "\n".join(texts), sum("image/png" in part for part in data)

    return execute


def test_01_shows_faces_groups_questions_and_terms(shown: Any, finished: Any) -> None:
    text, figures = shown("01")
    steps = {step["name"]: step for step in finished.summary("ci")["steps"]}
    said = ("240 faces of 120 people, source: render", "train", "validation", "test", "no person is depicted")
    for part in (*said, "held out of training: Wearing_Earrings", steps["ingest"]["digest"][:12]):
        assert part in text, part
    assert "&lt;image&gt;" in text or "<image>" in text
    assert figures == 4


def test_02_compares_the_runs_that_mlflow_knows(shown: Any, finished: Any) -> None:
    text, figures = shown("02")
    summaries = [json.loads(path.read_text()) for path in (finished.home / "runs").glob("*/summary.json")]
    runs = {summary["run"] for summary in summaries if summary["model"]["version"]}
    assert all(run in text for run in runs)
    assert ("is shown alone" in text) == (len(runs) == 1)
    assert ("nearer the truth" in text) == (len(runs) > 1)
    assert all(task in text for task in finished.summary("ci")["tasks"])
    stages = re.search(r"loss at the end of.*?</table>", text, re.DOTALL)
    assert stages is not None
    assert all(stage in stages[0] for stage in ("align", "instruct", "specialize"))
    assert not re.search(r"nan|None", stages[0], re.IGNORECASE)
    assert figures >= 3


def test_03_shows_wrong_answers_and_every_part_of_the_metrics(shown: Any, finished: Any) -> None:
    text, figures = shown("03")
    wrong = re.search(r"([\d,]+) of ([\d,]+) answers of attributes are not exactly the true one", text)
    assert wrong is not None
    assert 0 < int(wrong[1].replace(",", "")) < int(wrong[2].replace(",", ""))
    assert all(task in text for task in finished.summary("ci")["tasks"])
    assert "this evaluation holds no" not in text
    assert figures >= 10


def test_04_takes_pictures_from_a_folder_to_an_export(shown: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACEMLLM_PROFILE", "laptop")  # the one a user has; it needs no run
    text, figures = shown("04")
    said = ("41 rows read, 40 kept, 1 quarantined", "refused: the terms of source 'imagefolder' do not allow")
    for part in (*said, "native", "statement", "lettered", "True or false"):
        assert part in text, part
    assert re.search(r"\d+ of \d+ checks passed", text)
    assert re.search(r"^llava/\S+\.json", text, re.MULTILINE)
    assert figures == 1


def test_05_asks_a_server_and_stops_what_it_started(shown: Any, finished: Any) -> None:
    finished.facemllm("services", "down", "staging")
    text, figures = shown("05")
    asked = ("Is the person wearing a hat?", "Is the person wearing earrings?", "400: ", "413: ", "422: ")
    for part in ("started here", finished.summary("ci")["model"]["digest"], *asked, "stopped, exit code"):
        assert part in text, part
    assert figures == 1
    assert not [p for p in finished.processes() if "serve" in p.info["cmdline"]]


def test_stored_notebooks_hold_no_output_and_no_path_of_a_machine() -> None:
    assert [book.name[:2] for book in BOOKS] == ["01", "02", "03", "04", "05"]
    for book in BOOKS:
        text = book.read_text("utf-8")
        nbformat.validate(nbformat.reads(text, as_version=4))
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        assert not any(cell["outputs"] or cell["execution_count"] for cell in cells), book.name
        assert not re.search(r"/(home|root|tmp|Users|work)/", text), book.name
