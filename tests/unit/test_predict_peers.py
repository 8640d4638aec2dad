"""Models of others: asked in words, read strictly, shown nothing they may not see, and asked each thing once."""

import hashlib
import io
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from PIL import Image

from facemllm import settings as settings_module
from facemllm import tasks
from facemllm.asking.requests import Filtered, JobStopped, Reply, RowRefused
from facemllm.asking.store import Replies
from facemllm.errors import UserError
from facemllm.evaluate.models import evaluate
from facemllm.evaluate.peers import DECLINED, Peer, at_endpoint, check_name, is_ours, on_this_machine, words
from facemllm.evaluate.predict import Put, Shown
from tests import fake_endpoint
from tests.fake_endpoint import FakeEndpoint


def put(task, item, way="native", **row):
    found = tasks.asking.ask(tasks.get(task), tasks.get(task).item(item), way, {"image_id": "a" * 64, **row})
    return Put({"task": task, "sample_id": f"{item} {way}"}, found.text, found.question)


GENDER = put("gender", "gender", gender="female")


@dataclass
class Says:
    """A sender that keeps what it says, and says what it is told."""

    home: Path
    said: str = "A woman."
    asked: list = field(default_factory=list)

    def send(self, asked):
        found = []
        for request in [make() for make in asked]:
            self.asked.append(request)
            reply = Reply(key=request.key, image_id=request.image_id, model="m", prompt_hash="", text=self.said)
            Replies(self.home).write(reply)
            found.append(reply)
        return found


@pytest.fixture
def peer(tmp_path):
    return Peer(name="m", identity={"name": "m"}, image_side=24, sender=Says(tmp_path), home=tmp_path)


def shown(*asked, change="", number=0):
    image_id = hashlib.sha256(str(number).encode()).hexdigest()
    return Shown({"image_id": image_id}, Image.new("RGB", (48, 32), (90, 9, number)), change, asked)


def test_how_to_answer_is_said_in_words():
    assert words(GENDER) == f"{GENDER.text} Answer with one of these and nothing else: a woman, a man."
    bangs = put("attributes", "Bangs", attributes={"Bangs": True})
    assert words(bangs) == f"{bangs.text} Answer with yes or no."
    age = put("age", "age", age=31.0)
    assert words(age).startswith(f"{age.text} Answer with a number of years, in words as in ")
    assert "Left and right" not in words(age)
    yaw = put("head_pose", "yaw", yaw=10.0)
    assert words(yaw).endswith('or "turned 60 degrees left". Left and right are those of the picture.')
    for said in ("turned 60 degrees right", "facing straight ahead", "turned 60 degrees left"):
        assert f'"{said}"' in words(yaw)
        assert tasks.read(yaw.question, said) is not None, "what is asked for can be read"
    claim = put("gender", "gender", "statement", gender="female")
    assert words(claim) == f"{claim.text} Answer with true or false."
    letters = put("gender", "gender", "lettered", gender="female")
    assert words(letters) == letters.text
    assert letters.text.endswith("Answer with the letter.")
    caption = Put({}, "Describe the face.", tasks.get("caption").question("caption"))
    assert words(caption) == "Describe the face."


def test_answers_are_read_strictly_and_odd_text_can_be_kept(peer):
    unreadable = ("A woman or a man.", "I cannot help with that.", "", "B", "Perhaps a woman.")
    for number, (said, parsed) in enumerate(
        {"A woman.": "female", "a man": "male", **dict.fromkeys(unreadable)}.items()
    ):
        peer.sender.said = said
        (row,) = peer.answer([shown(GENDER, number=number)])
        assert row == {"raw": said, "parsed": parsed, "question": words(GENDER)}
    peer.sender.said = "a woman \ud83d" + "x" * 20_000
    (row,) = peer.answer([shown(GENDER, number=9)])
    assert (row["parsed"], len(row["raw"].encode("utf-8"))) == (None, 8000)


def test_nothing_is_asked_twice_and_a_changed_picture_is_another_question(peer):
    faces = [shown(GENDER, number=n) for n in range(3)]
    first = list(peer.answer(faces))
    assert len(peer.sender.asked) == 3
    assert list(peer.answer(faces)) == first
    assert len(peer.sender.asked) == 3
    list(peer.answer([shown(GENDER, change="blur")]))
    list(peer.answer([shown(GENDER, change="dark")]))
    assert len(peer.sender.asked) == 5
    assert len({request.key for request in peer.sender.asked}) == 5
    assert {request.image_id for request in peer.sender.asked[3:]} == {faces[0].face["image_id"]}
    with Image.open(io.BytesIO(peer.sender.asked[0].picture)) as sent:
        assert (sent.format, sent.size) == ("JPEG", (24, 16))
    assert peer.sender.asked[0].messages == [{"role": "user", "text": words(GENDER)}]


class Fails:
    """A sender that answers some, declines or fails to answer others, and stops."""

    def __init__(self, *outcomes):
        self.outcomes = outcomes

    def send(self, asked):
        if isinstance(self.outcomes[0], JobStopped):
            raise self.outcomes[0]
        return [
            replace(one, key=request.key, image_id=request.image_id) if isinstance(one, Reply) else one
            for one, request in zip(self.outcomes, (make() for make in asked), strict=True)
        ]


def reply(text, error=""):
    return Reply(key="", image_id="", model="m", prompt_hash="", text=text, error=error)


def test_a_request_without_an_answer_ends_the_evaluation_in_one_line(peer):
    faces = [shown(GENDER, number=number) for number in range(3)]
    gone = RowRefused("the endpoint gave no answer, asked 6 times (500)")
    with pytest.raises(UserError, match=r"2 of 3 questions got no answer \(the .*\(500\)\)\. What .* kept; run again"):
        list(replace(peer, sender=Fails(gone, reply("a woman"), gone)).answer(faces))
    with pytest.raises(UserError, match=r"1 of 3 questions got no answer"):
        list(replace(peer, sender=Fails(reply(""), ValueError("no picture"), reply("a woman"))).answer(faces))
    large = reply(None, "the reply has more than 9 bytes")
    with pytest.raises(UserError, match=r"1 of 3 replies cannot be used \(the reply has more .*max_tokens to ask anew"):
        list(replace(peer, sender=Fails(large, reply("a woman"), reply(""))).answer(faces))
    stop = JobStopped("annotate.endpoint.max_requests is used up; raise it")
    with pytest.raises(UserError, match=r"evaluation stopped: .*used up; raise it\. What was answered is kept"):
        list(replace(peer, sender=Fails(stop)).answer(faces))


def test_what_is_declined_and_an_empty_answer_are_answers(peer):
    faces = [shown(GENDER, number=number) for number in range(3)]
    rows = list(replace(peer, sender=Fails(Filtered("400"), reply(""), reply("I cannot help."))).answer(faces))
    assert [row["raw"] for row in rows] == [DECLINED, "", "I cannot help."]
    assert [row["parsed"] for row in rows] == [None] * 3
    assert tasks.read(GENDER.question, DECLINED) is None


def endpoint(tmp_path, base_url="https://host.example/v1", *more):
    overrides = [
        f"storage.home={tmp_path}",
        "annotate.vision_language.model=m",
        f"annotate.endpoint.base_url={base_url}",
    ]
    return settings_module.load("laptop", [*overrides, *more])


def test_a_third_party_sees_only_what_the_ledger_allows(
    tmp_path, monkeypatch, conversations_table, conversation_rows, face_rows
):
    monkeypatch.setenv("FACEMLLM_API_KEY", "sk-secret")
    allowed = conversations_table()
    rows = conversation_rows(face_rows(4))
    kept = conversations_table([*rows[:3], rows[3] | {"source": "celeba"}], name="kept")
    at_endpoint(endpoint(tmp_path), allowed)
    with pytest.raises(UserError, match="'celeba' do not allow to send its pictures to a third party"):
        at_endpoint(endpoint(tmp_path), kept)
    at_endpoint(endpoint(tmp_path, "https://host.example/v1", "annotate.endpoint.third_party=false"), kept)
    with pytest.raises(UserError, match="unencrypted"):
        at_endpoint(endpoint(tmp_path, "http://host.example/v1"), allowed)
    with pytest.raises(UserError, match="no endpoint is named; give --base-url"):
        at_endpoint(settings_module.load("laptop", ["annotate.vision_language.model=m"]), allowed)
    monkeypatch.delenv("FACEMLLM_API_KEY")
    with pytest.raises(UserError, match="FACEMLLM_API_KEY holds no key"):
        at_endpoint(endpoint(tmp_path), allowed)


def test_a_peer_is_named_by_what_its_answers_hang_on(tmp_path, monkeypatch, conversations_table):
    monkeypatch.setenv("FACEMLLM_API_KEY", "sk-secret")
    table = conversations_table()
    one = at_endpoint(endpoint(tmp_path), table)
    assert one.digest == at_endpoint(endpoint(tmp_path, "https://HOST.example/v1/"), table).digest
    assert one.identity["address"] == "https://host.example/v1"
    others = [endpoint(tmp_path, f"https://{place}") for place in ("host.example/v2", "other.example/v1")]
    for changed in ("model=n", "max_tokens=7"):
        others.append(endpoint(tmp_path, "https://host.example/v1", f"annotate.vision_language.{changed}"))
    assert len({one.digest, *(at_endpoint(other, table).digest for other in others)}) == 5
    assert "secret" not in str(one)


def test_which_model_is_meant(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    chosen = endpoint(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    assert not is_ours(str(folder))
    with pytest.raises(UserError, match=r"MODEL: .* holds no \*\.safetensors"):
        on_this_machine(chosen, str(folder))
    (folder / "model.safetensors").write_bytes(b"none")
    here = on_this_machine(chosen, str(folder))
    folder.rename(tmp_path / "renamed")
    assert on_this_machine(chosen, str(tmp_path / "renamed")).digest == here.digest
    assert here.name == "model"
    (tmp_path / "renamed" / "lineage.json").write_text("{}")
    assert is_ours(str(tmp_path / "renamed"))
    with pytest.raises(UserError, match="MODEL: none/such is no folder, nor a model of the hub"):
        on_this_machine(chosen, "none/such")
    for name in ("/nowhere", "./nowhere", "../no-such", "https://host/model", "a/b/c"):
        with pytest.raises(UserError, match="is not a model directory"):
            on_this_machine(chosen, name)


def test_an_endpoint_is_asked_without_a_schema_in_the_form_it_knows(tmp_path, conversations_table):
    with FakeEndpoint(answer=lambda body: "a woman", knows_max_tokens=False, keep=True) as fake:
        one = at_endpoint(endpoint(tmp_path, fake.base_url), conversations_table(), backoff_s=0.01)
        rows = list(one.answer([shown(GENDER, number=number) for number in range(5)]))
        assert [row["parsed"] for row in rows] == ["female"] * 5
        assert max(fake.received.values()) == 2, "there are two forms to try, with the older and the newer names"
        assert len(fake.bodies) == 5
        for body in fake.bodies.values():
            assert body["max_completion_tokens"] == 400
            assert not body.keys() & {"response_format", "max_tokens", "temperature"}
            (message,) = body["messages"]
            assert [part["type"] for part in message["content"]] == ["image_url", "text"]
            assert message["content"][1]["text"] == words(GENDER)
        again = at_endpoint(endpoint(tmp_path, fake.base_url), conversations_table(name="other"), backoff_s=0.01)
        list(again.answer([shown(GENDER, number=9)]))
        assert fake.received.total() - fake.completed.total() <= 5, "the form that was answered is remembered"
        assert min(fake.received.values()) == 1


def test_two_endpoints_with_the_same_model_share_no_reply(tmp_path, conversations_table):
    table, said = conversations_table(), {}
    for text in ("a woman", "a man"):
        with FakeEndpoint(answer=lambda body, text=text: text) as fake:
            (row,) = at_endpoint(endpoint(tmp_path, fake.base_url), table, backoff_s=0.01).answer([shown(GENDER)])
        said[text] = row["raw"]
    assert said == {"a woman": "a woman", "a man": "a man"}


def test_what_failed_is_asked_again_and_what_was_answered_is_not(tmp_path, conversations_table):
    faces = [shown(GENDER, number=number) for number in range(6)]
    retries = "annotate.endpoint.retries=0"
    with FakeEndpoint(answer=lambda body: "a woman", script=["good", "500"]) as fake:
        one = at_endpoint(endpoint(tmp_path, fake.base_url, retries), conversations_table(), backoff_s=0.01)
        with pytest.raises(UserError, match=r"1 of 6 questions got no answer .*500.* run again to go on"):
            list(one.answer(faces))
        assert [row["parsed"] for row in one.answer(faces)] == ["female"] * 6
        assert fake.received.total() == 7
        fake.default = "huge"
        with pytest.raises(UserError, match="1 of 1 replies cannot be used"):
            list(one.answer([shown(GENDER, number=7)]))


def test_a_filter_at_the_endpoint_declines_and_the_rest_is_answered(tmp_path, conversations_table):
    class Filters(FakeEndpoint):
        async def _behave(self, body, key, writer):
            if sum(self.received.values()) % 2:
                return await super()._behave(body, key, writer)
            error = {"code": "content_filter", "message": "The prompt was filtered."}
            await fake_endpoint._send(writer, 400, {"error": error})
            return True

    with Filters(answer=lambda body: "a woman") as fake:
        chosen = endpoint(tmp_path, fake.base_url, "annotate.endpoint.parallel=1")
        one = at_endpoint(chosen, conversations_table(), backoff_s=0.01)
        rows = list(one.answer([shown(GENDER, number=number) for number in range(16)]))
    assert sorted((row["raw"], row["parsed"]) for row in rows) == [(DECLINED, None)] * 8 + [("a woman", "female")] * 8


def test_nobody_at_the_address_shows_at_once(tmp_path, conversations_table):
    with FakeEndpoint() as fake:
        gone = fake.base_url
    one = at_endpoint(endpoint(tmp_path, gone, "annotate.endpoint.retries=5"), conversations_table())
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"nobody answers at {gone} .*start the endpoint"):
        list(one.answer([shown(GENDER)]))
    assert time.monotonic() - started < 3


def test_a_model_has_a_name(tmp_path, conversations_table):
    with pytest.raises(UserError, match="MODEL is empty"):
        check_name("  ")
    nameless = endpoint(tmp_path, "http://127.0.0.1:9/v1", 'annotate.vision_language.model=""')
    with pytest.raises(UserError, match="MODEL is empty"):
        at_endpoint(nameless, conversations_table())


def test_a_folder_that_exists_is_noticed_before_anything_is_looked_up(tmp_path):
    chosen = settings_module.load("laptop", [f"storage.home={tmp_path / 'home'}"])
    with pytest.raises(UserError, match="exists already; choose another output folder"):
        evaluate(chosen, "m", tmp_path / "no-table", tmp_path, endpoint=True)
    assert not (tmp_path / "home").exists()
