"""What the served model is shown and answers (maps of face parts, scores), and how a deployment is proved."""

import asyncio
import gc
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from facemllm import tasks
from facemllm.errors import UserError
from facemllm.model.inference import Predictor
from facemllm.serve import assembly, deploy, observability, server
from facemllm.serve.doors.instances import read_request
from facemllm.serve.language import Refused
from facemllm.serve.probe import Probe, same_answer
from facemllm.settings import plain
from facemllm.tasks.unanswerable import REFUSAL
from tests.serving import LIMITS, FakePredictor, b64, loaded, png

NAMES = ("Wearing_Hat", "Bald", "expression=fear", "ethnicity=a", "gender=male")


class Fake(FakePredictor):
    """With a knowledge branch."""

    def __init__(self, takes_maps: bool = True, names: tuple[str, ...] = NAMES):
        super().__init__(takes_maps, names)


def face(red: int, parts: int | None = None, **fields: Any) -> dict[str, Any]:
    shown = {} if parts is None else {"segmentation": b64(png(parts))}
    return {"image": b64(png(red, 0, 0)), "question": "Who?", **shown, **fields}


def ask(fake: Any, *instances: dict[str, Any], names: tuple[str, ...] = ("attributes",)) -> list[dict[str, Any]]:
    model = loaded(fake, names).model
    return asyncio.run(model.predict({"instances": list(instances)}))["predictions"]


def test_each_question_is_put_about_its_own_image_and_map():
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    talk = {name: value for name, value in face(9, 4).items() if name != "question"} | {"messages": chat}
    found = ask(Fake(), face(10), face(10, 3), face(10, 5), face(20, 3), talk)
    assert [one["answer"] for one in found] == ["10 None", "10 3", "10 5", "20 3", "chat of 9 [4]"]
    assert all("characteristics" not in one for one in found)


class Refusing(Fake):
    """Says of everything that it cannot be told."""

    def generate_batch(self, images: Any, questions: Any, max_new_tokens: int, maps: Any) -> list[str]:
        self.asked = list(questions)
        return [REFUSAL] * len(self.asked)


def test_all_wordings_of_an_item_are_known_whatever_their_marks_and_spelling():
    service = loaded(Fake(), ("attributes", "unanswerable")).service

    def known(text: str) -> Any:
        (asked,) = read_request({"instances": [face(1, question=text)]}, LIMITS)
        return service._plans(asked)[0].known

    item = tasks.get("attributes").item("hair_color")
    for text in (*item.wordings, "WHAT COLOUR IS the hair", "what colour is  the hair!"):
        assert known(text) == tasks.get("attributes").question("hair_color"), text
    assert known("What colour is the hairbrush?") is None


def test_a_question_that_cannot_be_answered_is_answered_so_with_a_value():
    fake = Refusing()
    (found,) = ask(fake, face(1, question="what's this person's name"), names=("attributes", "unanswerable"))
    about = {"task": "unanswerable", "item": "unanswerable", "scores": None}
    about |= {"kind": "taught", "probability": None, "reason": None}
    assert found == {"answer": REFUSAL, "value": "cannot_tell", **about}
    assert fake.asked == ["What is this person's name?"]


def test_scores_are_told_where_asked_and_only_of_tasks_that_are_answered():
    fake = Fake()
    found = ask(fake, face(51, 3, characteristics=True), face(51, 3), face(51, 3, characteristics=True))
    scores = {"Wearing_Hat": 0.2, "Bald": 0.2}
    assert [one.get("characteristics") for one in found] == [scores, None, scores]
    assert fake.scored == [([51], [3])]  # one face, looked at once
    opted_in = ask(Fake(), face(51, characteristics=True), names=("attributes", "expression"))
    assert set(opted_in[0]["characteristics"]) == {"Wearing_Hat", "Bald", "expression=fear"}


def test_a_broken_picture_spoils_its_own_answer_alone():
    wrong = {**face(10, characteristics=True), "segmentation": b64(png(19))}
    with pytest.raises(Refused, match="holds the class 19") as refusal:
        ask(Fake(), face(20, characteristics=True), wrong)
    assert refusal.value.status == 422


def test_what_the_model_cannot_use_is_refused_not_ignored():
    with pytest.raises(Refused, match=r"instances\[0\].segmentation: this model looks at no map"):
        ask(Fake(takes_maps=False), face(10, 3))
    with pytest.raises(Refused, match=r"instances\[1\].characteristics: this deployment gives no scores"):
        ask(Fake(names=()), face(10), face(10, characteristics=True))
    with pytest.raises(Refused, match="gives no scores"):
        ask(Fake(names=("expression=fear",)), face(10, characteristics=True))
    assert ask(Fake(names=()), face(10, characteristics=False))[0]["answer"] == "10 None"


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
def test_a_server_answers_as_evaluation_did(evaluated: str, value: Any, served: dict[str, Any], same: bool):
    assert same_answer(Probe(b"", "Which hair style?", evaluated, value), served) is same


@pytest.mark.parametrize("segmentation", [None, b"a map"])
def test_a_probe_shows_what_evaluation_showed(monkeypatch: pytest.MonkeyPatch, segmentation: bytes | None):
    asked: list[dict[str, Any]] = []
    said = {"answer": "a", "value": "a"}
    monkeypatch.setattr(deploy, "ask", lambda url, model, instance: asked.append(instance) or said)
    endpoint = deploy.Endpoint("staging", "http://127.0.0.1:1", "m", "d", 1, False)
    deploy._prove(endpoint, Probe(b"face", "What?", "a", "a", segmentation))
    expected = {} if segmentation is None else {"segmentation": {"b64": "YSBtYXA="}}
    assert asked == [{"image": {"b64": "ZmFjZQ=="}, "question": "What?", **expected}]


@pytest.mark.parametrize(
    ("given", "lineage", "names"),
    [
        ("", {"settings": {"tasks": {"age": 1.0, "gender": 0.5}}}, "age,gender"),
        ("caption", {"settings": {"tasks": {"age": 1.0}}}, "caption"),
        ("", {"settings": 3}, ""),
        ("", None, ""),
    ],
)
def test_a_folder_is_asked_what_it_was_taught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, lineage: Any, names: str
) -> None:
    if lineage is not None:
        (tmp_path / "lineage.json").write_text(json.dumps(lineage))
    found: list[str] = []

    def service_of(served: Any, predictor: Any, settings: Any, names: str, *rest: Any) -> None:
        found.append(names)
        raise UserError("far enough")

    monkeypatch.setattr(sys, "argv", ["server"])
    monkeypatch.setattr(gc, "disable", lambda: None)
    monkeypatch.setattr(Predictor, "load", lambda *_, **__: None)
    monkeypatch.setattr(observability, "observer", lambda *_: None)
    monkeypatch.setattr(assembly, "service_of", service_of)
    options = SimpleNamespace(
        name="m", version="", digest="0" * 64, evaluated=None, tasks=given, answers=tmp_path, max_new_tokens=1
    )
    with pytest.raises(UserError, match="far enough"):
        server._load(options, plain().serve, tmp_path)
    assert found == [names]
