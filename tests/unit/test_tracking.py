"""What is sent to MLflow: points, curves, and who sends them."""

import pickle
from typing import Any

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
