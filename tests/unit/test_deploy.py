import pytest

from facemllm.serve import deploy
from facemllm.serve.deploy import Probe, same_answer


@pytest.mark.parametrize(
    ("evaluated", "value", "served", "same"),
    [
        ("short hair", "Short_Hair", {"answer": "short hair", "value": "Short_Hair"}, True),
        ("short hair", "Short_Hair", {"answer": "long hair", "value": "Long_Hair"}, False),
        ("short hair", "Short_Hair", {"answer": "short hair", "value": None}, False),
        ("12.30", "12.30", {"answer": "12.31", "value": "12.31"}, True),
        ("12.30", "12.30", {"answer": "12.90", "value": "12.90"}, False),
        ("(none of the options; likeliest perhaps short hair)", None, {"answer": "short hair", "value": None}, True),
        ("(none of the options; likeliest perhaps short hair)", None, {"answer": "long hair", "value": None}, False),
        ("(none of the options; likeliest perhaps 12.30)", None, {"answer": "12.31", "value": None}, True),
        ("upright and so on", None, {"answer": "short hair", "value": None}, True),
        ("upright and so on", None, {"answer": "short hair", "value": "Short_Hair"}, False),
    ],
)
def test_a_server_answers_as_evaluation_did(evaluated, value, served, same):
    assert same_answer(Probe(b"", "Which hair style?", evaluated, value), served) is same


@pytest.mark.parametrize("segmentation", [None, b"a map"])
def test_a_probe_shows_what_evaluation_showed(monkeypatch, segmentation):
    asked = []
    monkeypatch.setattr(
        deploy, "ask", lambda url, model, instance: asked.append(instance) or {"answer": "a", "value": "a"}
    )
    endpoint = deploy.Endpoint("staging", "http://127.0.0.1:1", "m", "d", "1", 1, False)
    deploy._prove(None, endpoint, Probe(b"face", "What?", "a", "a", segmentation))
    expected = {} if segmentation is None else {"segmentation": {"b64": "YSBtYXA="}}
    assert asked == [{"image": {"b64": "ZmFjZQ=="}, "question": "What?", **expected}]
