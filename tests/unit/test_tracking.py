"""What is sent to MLflow: points, curves, and who sends them."""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos import databricks_pb2

from facemllm.promote import artifacts
from facemllm.tracking import client as curves
from facemllm.tracking import runs as tracking

DIGEST = "a" * 64


def test_a_process_is_known_by_host_number_and_start() -> None:
    host, pid, started = tracking._process().split("/")
    assert tracking._alive(f"{host}/{pid}/{started}")
    assert not [p for p in (f"{host}/{pid}/1.00", f"else/{pid}/{started}", "", f"{host}/x/1.00") if tracking._alive(p)]


def test_points_leave_out_what_is_no_number() -> None:
    points = curves.points_of({"train/loss": 1, "bad(name)": 2.0, "text": "x", "none": None}, 7)
    assert [(name, value, step) for name, value, _, step in points] == [("train/loss", 1.0, 7), ("bad_name_", 2.0, 7)]


def test_a_curve_logger_outlives_its_server(caplog, monkeypatch) -> None:
    sent: list[curves.Point] = []
    fails = [True, True]

    def send(client: Any, run_id: str, points: list[curves.Point]) -> None:
        if fails:
            fails.pop()
            raise ConnectionError("refused")
        sent.extend(points)

    monkeypatch.setattr(curves, "open_client", lambda uri: object())
    monkeypatch.setattr(curves, "send", send)
    curve = pickle.loads(pickle.dumps(curves.CurveLogger("http://127.0.0.1:9", "run", interval_s=0.01)))
    for step in range(2000):
        curve(step, {"train/loss": 1 / (step + 1)})
    assert curve.flush(10)
    assert [step for *_, step in sent] == list(range(2000))
    assert caplog.text.count("takes no metrics now") == 1
    curve(2000, {"train/loss": 0.0})
    assert curve.flush(10)
    assert len(sent) == 2001


def test_a_curve_logger_gives_up_in_time(caplog, monkeypatch) -> None:
    monkeypatch.setattr(curves, "open_client", lambda uri: 1 / 0)
    curve = curves.CurveLogger("http://127.0.0.1:9", "run", interval_s=0.01)
    curve(1, {"train/loss": 1.0})
    assert not curve.flush(0.3)
    assert "could not be sent" in caplog.text


@pytest.mark.parametrize(("code", "sent"), [("INTERNAL_ERROR", 3), ("PERMISSION_DENIED", 1)])
def test_a_file_that_was_lost_on_its_way_is_sent_again_and_a_refused_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, sent: int
) -> None:
    tried: list[tuple[str, str | None]] = []

    def log(model_id: str, path: str, into: str | None = None) -> None:
        tried.append((Path(path).name, into))
        if len(tried) <= lost:
            raise MlflowException("a part is missing", error_code=databricks_pb2.ErrorCode.Value(code))

    monkeypatch.setattr(artifacts, "wait_for", lambda address: None)
    (tmp_path / "model" / "adapter").mkdir(parents=True)
    (tmp_path / "model" / "adapter" / "weights").write_bytes(b"w")
    client: Any = SimpleNamespace(log_model_artifact=log, tracking_uri="http://127.0.0.1:1")
    for lost in (sent - 1, 9):
        tried.clear()
        if lost == 9:
            with pytest.raises(MlflowException, match="a part is missing"):
                artifacts.upload(client, "m-1", tmp_path / "model")
            assert tried == [("weights", "adapter")] * sent
        else:
            artifacts.upload(client, "m-1", tmp_path / "model")
            assert tried == [*[("weights", "adapter")] * sent, ("MLmodel", None)]
