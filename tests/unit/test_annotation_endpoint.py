"""The endpoint annotator against an endpoint that misbehaves: what becomes of each row, and what was asked for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace
from functools import partial

import psutil
import pytest

from facemllm import settings
from facemllm.annotate import prompt
from facemllm.annotate.annotator import Annotation
from facemllm.annotate.endpoint import endpoint
from facemllm.asking import courier, link
from facemllm.asking.account import Account
from facemllm.asking.carried import Carried
from facemllm.asking.refusals import JobStopped, RowRefused
from facemllm.asking.store import Replies
from facemllm.asking.wire import Spec, Wire, is_loopback
from facemllm.core import digests
from facemllm.errors import UserError
from facemllm.tables import FACES
from tests.fake_endpoint import COMPLETION_TOKENS, PROMPT_TOKENS, FakeEndpoint, completion, reply

KEY = "sk-secret-0123456789"


@dataclass(frozen=True)
class InProcess:
    """A sender with the courier in this process: as fast as a test should be."""

    spec: Spec

    def send(self, asked):
        async def go():
            one = courier.Courier(self.spec)
            made = [make() for make in asked]
            try:
                return await asyncio.gather(*(one.ask(request) for request in made), return_exceptions=True)
            finally:
                await one.close()

        answers = [RowRefused(str(a)) if isinstance(a, courier.Refuse) else a for a in asyncio.run(go())]
        for answer in answers:
            if isinstance(answer, courier.Stop):
                raise JobStopped(str(answer))
        return answers


@pytest.fixture
def rows(face_rows):
    """Rows without trusted labels, each with a picture of its own."""
    blank = dict.fromkeys(FACES.names)
    keep = ("image_id", "image", "source", "split")
    return lambda count=1: [blank | {name: row[name] for name in keep} for row in face_rows(count)]


@pytest.fixture
def describer(tmp_path, monkeypatch):
    """`describer(fake, parallel=4, courier=False, ...)`: an endpoint annotator of its own store, quick to give up."""
    monkeypatch.setenv("FACEMLLM_API_KEY", KEY)

    def make(fake, process=False, home="home", model="m", **options):
        told = {"retries": 2, "timeout_s": 0.3, "parallel": 4, **options}
        overrides = [f"annotate.endpoint.{name}={value}" for name, value in told.items()]
        chosen = settings.load(
            "laptop",
            [
                f"storage.home={tmp_path / home}",
                "annotate.annotator=endpoint",
                f"annotate.vision_language.model={model}",
                f"annotate.endpoint.base_url={fake.base_url}",
                *overrides,
            ],
        )
        made = endpoint(chosen, ["render"], backoff_s=0.01)
        return made if process else replace(made, sender=InProcess(made.sender.spec))

    return make


def figures(describer):
    return Account(describer.home, describer.sender.spec.account).read()


@pytest.mark.parametrize(
    ("script", "refused", "requests"),
    [
        (["good"], None, 1),
        (["429"], None, 2),
        (["429:0.05"], None, 2),
        (["500", "503"], None, 3),
        (["408"], None, 2),
        (["hang"], None, 2),
        (["drip"], None, 2),
        (["reset"], None, 2),
        (["cut"], None, 2),
        (["broken"], None, 2),
        (["compressed"], None, 2),
        (["nousage"], None, 1),
        (["text:not json"], None, 2),
        (["wrong"], None, 2),
        (["length"], None, 2),
        (["text:"], None, 2),
        (["500"] * 3, "gave no answer, asked 3 times (500: told to say 500)", 3),
        (["hang"] * 3, "no whole answer within 0.3 s", 3),
        (["drip"] * 3, "no whole answer within 0.3 s", 3),
        (["reset"] * 3, "the connection broke", 3),
        (["broken"] * 3, "no chat completion", 3),
        (["400"] * 4, "declines this request (400: told to say 400)", 4),  # once for each dialect
        (["413"], "declines this request (413", 1),
        (["redirect"], "302: it redirects, and no redirect is followed", 1),
        (["huge"], "the reply has more than 1,048,576 bytes", 1),
        (["text:not json", "wrong"], "the key caption, attributes, expression, age, gender is missing", 2),
        (["wrong", "text:[]"], "not a JSON object but a list", 2),
    ],
)
def test_what_becomes_of_a_row(describer, rows, script, refused, requests):
    with FakeEndpoint(script=script) as fake:
        one = describer(fake)
        (said,) = one.annotate(rows())
        assert fake.received.total() == requests
        if refused is None:
            assert isinstance(said, Annotation), said
            assert said.caption.startswith("A face before a plain background")
        else:
            assert isinstance(said, RowRefused), said
            assert refused in str(said)
        assert figures(one).held >= 0
        assert not [path for path in Replies(one.home).folder.rglob("*") if path.suffix == ".sending"]


def test_nothing_that_was_answered_is_asked_again(describer, rows):
    asked = rows(4)
    with FakeEndpoint() as fake:
        one = describer(fake)
        words = [prompt.messages(row) for row in asked]
        keys = [one.key(row["image_id"], said) for row, said in zip(asked, words, strict=True)]
        mending = prompt.repair(words[3], "[]", "not a JSON object but a list")
        fake.plan = {keys[1]: ["text:not json"], keys[2]: ["huge"], keys[3]: ["text:[]"]}
        fake.plan[one.key(asked[3]["image_id"], mending)] = ["wrong"]
        first = one.annotate(asked)
        assert [type(said) for said in first] == [Annotation, Annotation, RowRefused, RowRefused]
        assert fake.received.total() == 6
        again = describer(fake).annotate(asked)
        assert [str(said) for said in again] == [str(said) for said in first]
        assert fake.received.total() == 6, "a reply or a final refusal was paid for twice"


def test_a_row_without_an_answer_is_asked_again_the_next_time(describer, rows):
    with FakeEndpoint(script=["500"] * 3) as fake:
        (refused,) = describer(fake).annotate(rows())
        assert isinstance(refused, RowRefused)
        (said,) = describer(fake).annotate(rows())
        assert isinstance(said, Annotation)


def test_two_rows_with_the_same_key_are_paid_once(describer, rows):
    (row,) = rows()
    with FakeEndpoint(latency_s=0.05) as fake:
        said = describer(fake).annotate([row, dict(row), dict(row)])
        assert said[0] == said[1] == said[2]
        assert fake.received.total() == 1


def test_the_key_of_a_reply_is_picture_words_model_and_parameters(describer, rows):
    (row,) = rows()
    with FakeEndpoint() as fake:
        one = describer(fake)
        same = describer(fake, parallel=9, timeout_s=9, retries=9, max_requests=9, input_price=2, output_price=2)
        other = describer(fake, model="other")
        asked = prompt.messages(row)
        key = one.key(row["image_id"], asked)
        assert key == same.key(row["image_id"], asked)
        assert (one.digest, one.sender.spec.account) == (same.digest, same.sender.spec.account)
        hotter = replace(one, parameters={**one.parameters, "temperature": 0.5})
        keys = {
            key,
            other.key(row["image_id"], asked),
            hotter.key(row["image_id"], asked),
            one.key("0" * 64, asked),
            one.key(row["image_id"], prompt.messages({**row, "age": 30.0})),
        }
        assert len(keys) == 5
        assert len({one.digest, other.digest, hotter.digest}) == 3
        assert other.sender.spec.account != one.sender.spec.account


def test_what_is_sent_is_the_reduced_picture_the_words_and_the_schema(describer, rows):
    from facemllm.asking.asking import reduced

    (row,) = rows()
    with FakeEndpoint(keep=True) as fake:
        one = describer(fake)
        one.annotate([row])
        ((key, body),) = fake.bodies.items()
        assert key == one.key(row["image_id"], prompt.messages(row)), "the Idempotency-Key is the content key"
        assert fake.authorizations == {f"Bearer {KEY}"}
        assert body["response_format"]["json_schema"]["strict"] is True
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 400, 0.0)
        picture, words = body["messages"][1]["content"]
        assert picture["image_url"]["url"].startswith("data:image/jpeg;base64,")
        assert words["text"] == prompt.messages(row)[1]["text"]
    small = reduced(row["image"]["bytes"], 32)
    assert small.startswith(b"\xff\xd8")
    assert reduced(row["image"]["bytes"], 32) == small
    with pytest.raises(RowRefused, match="cannot be used: the file is empty"):
        reduced(b"", 32)


def test_a_picture_that_cannot_be_read_refuses_its_row_alone(describer, rows):
    asked = rows(3)
    asked[1]["image"] = {"bytes": b"no picture", "path": None}
    asked[2]["image_id"] = "../../secret"
    with FakeEndpoint() as fake:
        said = describer(fake, process=True).annotate(asked)
        assert isinstance(said[0], Annotation)
        assert "the picture cannot be used" in str(said[1])
        assert "is no SHA-256" in str(said[2])
        assert fake.received.total() == 1


@pytest.mark.parametrize(
    ("knows", "requests"),
    [
        ({"knows_schema": False}, 2),
        ({"knows_max_tokens": False}, 3),
        ({"knows_schema": False, "knows_max_tokens": False}, 4),
    ],
)
def test_what_an_endpoint_understands_is_found_out_once_a_job(describer, rows, knows, requests):
    with FakeEndpoint(keep=True, **knows) as fake:
        asked = rows(12)
        said = describer(fake, parallel=1).annotate(asked)
        assert all(isinstance(one, Annotation) for one in said)
        assert fake.received.total() == len(asked) - 1 + requests
        count = fake.received.total()
        describer(fake, home="home").annotate(rows(13)[12:])
        assert fake.received.total() == count + 1, "the next run knows it"


def test_a_400_for_one_row_does_not_change_what_others_are_sent(describer, rows):
    asked = rows(6)
    with FakeEndpoint(keep=True) as fake:
        one = describer(fake, parallel=1)
        key = one.key(asked[3]["image_id"], prompt.messages(asked[3]))
        fake.plan[key] = ["400"] * 9
        said = one.annotate(asked)
        assert [isinstance(answer, Annotation) for answer in said] == [True] * 3 + [False] + [True] * 2
        assert fake.received[key] == 1, "the schema is understood: the row is at fault"
        assert all("response_format" in body for body in fake.bodies.values())


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_a_refused_key_or_a_wrong_address_stops_the_job_and_keeps_what_is_done(describer, rows, status):
    asked = rows(10)
    with FakeEndpoint(script=["good"] * 4, default=status) as fake:
        with pytest.raises(JobStopped, match=f"refuses every request \\({status}: told to say {status}\\)"):
            describer(fake, parallel=1).annotate(asked)
        assert fake.received.total() == 5
        fake.default = "good"
        assert all(isinstance(said, Annotation) for said in describer(fake).annotate(asked))
        assert fake.completed.total() == 10
        assert max(fake.completed.values()) == 1


def test_an_endpoint_that_is_not_there_stops_the_job(describer, rows):
    with FakeEndpoint() as fake:
        address = fake.base_url
    with pytest.raises(JobStopped, match=r"does not answer, asked 3 times \(no connection"):
        describer(type("Gone", (), {"base_url": address})).annotate(rows(3))


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("500", "answered none of 5 rows one after the other"),
        ("hang", "answered none of 5 rows one after the other"),
        ("400", "answered none of 5 rows one after the other"),
        ("redirect", "answered none of 5 rows one after the other"),
        ("429", "does not answer, asked 2 times .429"),
    ],
)
def test_an_endpoint_that_fails_for_everyone_stops_the_job(describer, rows, how, match):
    with FakeEndpoint(default=how) as fake:
        one = describer(fake, retries=1, timeout_s=0.1)
        with pytest.raises(JobStopped, match=match):
            one.annotate(rows(12))
        assert figures(one).answered == 0


def test_rows_that_fail_between_others_never_stop_the_job(describer, rows):
    asked = rows(20)
    with FakeEndpoint(script=["good", "500"] * 10) as fake:
        said = describer(fake, parallel=1, retries=0, timeout_s=5).annotate(asked)
        assert sum(isinstance(one, RowRefused) for one in said) == 10


def test_rate_limits_cost_no_row_while_somebody_is_answered(describer, rows):
    """Of four that ask one is answered: by the end others were turned away more often than they may try."""
    with FakeEndpoint(script=["429", "429", "429", "good"] * 8) as fake:
        said = describer(fake, retries=3).annotate(rows(8))
        assert all(isinstance(one, Annotation) for one in said)


def test_retry_after_is_honoured_by_all(describer, rows):
    with FakeEndpoint(script=["429:0.4"]) as fake:
        started = time.monotonic()
        said = describer(fake, parallel=1).annotate(rows(3))
        assert all(isinstance(one, Annotation) for one in said)
        assert time.monotonic() - started >= 0.4


def test_a_budget_of_requests_stops_the_job_and_a_larger_one_goes_on(describer, rows):
    asked = rows(10)
    with FakeEndpoint(latency_s=0.01) as fake:
        one = describer(fake, max_requests=6)
        with pytest.raises(JobStopped, match=r"annotate\.endpoint\.max_requests is used up"):
            one.annotate(asked)
        assert fake.received.total() == figures(one).requests == 6
        with pytest.raises(JobStopped, match="max_requests is used up"):
            describer(fake, max_requests=6).annotate(asked)
        assert fake.received.total() == 6, "the budget is of the whole job, ever"
        assert all(isinstance(said, Annotation) for said in describer(fake, max_requests=10).annotate(asked))
        assert fake.received.total() == 10


def test_a_budget_of_tokens_is_never_exceeded(describer, rows):
    with FakeEndpoint(latency_s=0.01) as fake:
        one = describer(fake, max_tokens=6000)
        with pytest.raises(JobStopped, match="max_tokens is used up"):
            one.annotate(rows(20))
        now = figures(one)
        assert now.prompt_tokens + now.completion_tokens == fake.completed.total() * (PROMPT_TOKENS + COMPLETION_TOKENS)
        assert 2000 < now.tokens <= 6000
        assert now.held == 0


def test_requests_that_were_refused_are_not_charged_and_those_in_doubt_are(describer, rows):
    with FakeEndpoint(script=["500", "429", "hang"]) as fake:
        one = describer(fake, retries=3)
        one.annotate(rows())
        now = figures(one)
        assert (now.requests, now.answered, now.refused, now.in_doubt, now.retries) == (2, 1, 2, 1, 3)
        assert now.held > 0, "what a lost answer used is not known"


def test_repairs_are_counted_and_the_row_bears_the_price_of_both(describer, rows):
    with FakeEndpoint(script=["wrong"], keep=True) as fake:
        one = describer(fake, input_price=1.0, output_price=10.0)
        (said,) = one.annotate(rows())
        assert figures(one).repairs == 1
        assert said.cost == pytest.approx(2 * (PROMPT_TOKENS * 1.0 + COMPLETION_TOKENS * 10.0) / 1e6)
        assert len(fake.bodies) == 2, "a repair has a key of its own"
        mending = list(fake.bodies.values())[-1]["messages"]
        assert [message["role"] for message in mending] == ["system", "user", "assistant", "user"]
        assert "attributes, expression, age, gender is missing" in mending[-1]["content"]
        assert set(said.by) == {"caption", "attributes"}
        (by,) = {json.dumps(by, sort_keys=True) for by in said.by.values()}
        assert json.loads(by)["prompt_hash"] == prompt.digest(prompt.messages(rows()[0]))


def test_labels_of_a_reply_are_taken_as_they_are(describer, rows):
    text = reply("A woman, about 30 years old.", "happiness", 30, "female", Bald=False, Bangs=None)
    with FakeEndpoint(script=[f"text:{text}"]) as fake:
        (said,) = describer(fake).annotate(rows())
        labels = {"attributes": {"Bald": False}, "expression": "happiness", "age": 30.0, "gender": "female"}
        assert said.labels == labels


def test_no_message_holds_the_key_or_a_picture(describer, rows):
    class Echo(FakeEndpoint):
        async def _behave(self, body, key, writer):
            from tests.fake_endpoint import _send

            picture = body["messages"][1]["content"][0]["image_url"]["url"]
            await _send(writer, 413, {"error": {"message": f"key {KEY}\n{picture}"}})
            return True

    with Echo() as fake:
        one = describer(fake)
        (said,) = one.annotate(rows())
        assert KEY not in str(said)
        assert "/9j/" not in str(said)
        assert len(str(said)) < 300
        assert "\n" not in str(said)
        text = "".join(path.read_text(errors="replace") for path in one.home.rglob("*") if path.is_file())
        assert KEY not in text + repr(one) + repr(one.sender.spec)


@pytest.mark.parametrize(
    ("content", "text"),
    [([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"), (None, ""), ("x", "x")],
)
def test_content_may_come_in_parts_or_not_at_all(content, text):
    from facemllm.asking.wire import _read_reply

    assert _read_reply(json.dumps(completion(content)).encode()).text == text


def test_the_dialect_of_another_address_is_not_taken_over(describer):
    with FakeEndpoint() as fake:
        spec = describer(fake).sender.spec

        async def decided(spec):
            wire = Wire(spec)
            before = wire._dialect, wire._sure
            wire._decide(1)
            await wire.close()
            return before

        assert asyncio.run(decided(spec)) == (0, False)
        assert asyncio.run(decided(spec)) == (1, True)
        assert asyncio.run(decided(replace(spec, base_url="http://127.0.0.1:1/v1"))) == (0, False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["endpoint.base_url=https://host.example/v1"], "FACEMLLM_API_KEY holds no key for https://host.example/v1"),
        (["endpoint.base_url=http://host.example/v1"], "would go to host.example unencrypted"),
        (["endpoint.base_url=ftp://host.example/v1"], "no address of an API"),
        (["endpoint.base_url=host.example"], "no address of an API"),
        (["endpoint.base_url=https://user:word@host.example/v1"], "holds a user or password"),
        (["endpoint.base_url=https://host.example:port/v1"], "base_url"),
    ],
)
def test_an_address_or_key_that_cannot_be_used_is_refused_before_anything_is_sent(monkeypatch, overrides, message):
    monkeypatch.delenv("FACEMLLM_API_KEY", raising=False)
    given = [f"annotate.{override}" for override in overrides]
    chosen = settings.load("laptop", ["annotate.annotator=endpoint", "annotate.vision_language.model=m", *given])
    with pytest.raises(UserError, match=message) as error:
        endpoint(chosen, ["render"])
    assert "word" not in str(error.value).replace("password", "")


def test_loopback_is_told_apart():
    assert is_loopback("http://127.0.0.1:8000/v1")
    assert is_loopback("http://[::1]/v1")
    assert is_loopback("http://localhost/v1")
    assert not is_loopback("http://127.0.0.1.example.com/v1")
    assert not is_loopback("https://10.0.0.1/v1")


def test_a_worker_without_the_key_stops_the_job(monkeypatch, describer):
    with FakeEndpoint() as fake:
        spec = replace(describer(fake).sender.spec, base_url="https://host.example/v1")
    monkeypatch.delenv("FACEMLLM_API_KEY")
    with pytest.raises(JobStopped, match="not set where Ray's workers run"):
        Carried(spec).send([])


def couriers(home):
    """Processes that are couriers of a store: they hold its file of claims open."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "facemllm.asking.courier" in process.cmdline():
                found += [process for file in process.open_files() if file.path == str(home / "annotations" / "claims")]
    return found


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_the_courier_answers_when_its_worker_is_killed(describer, rows):
    """What is on its way is waited for and stored; what only waits in the pipe is not sent."""
    asked = rows(12)
    with FakeEndpoint(latency_s=0.4) as fake:
        one = describer(fake, process=True, parallel=4, timeout_s=5)
        if not (worker := os.fork()):
            link.Link(one.sender.spec).ask([partial(one.request, row, prompt.messages(row)) for row in asked])
            os._exit(0)
        wait_until(lambda: fake.in_flight == 4)
        (process,) = couriers(one.home)
        assert process.ppid() != worker, "what ends a worker's children would end it"
        assert os.getsid(process.pid) == process.pid
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        process.wait(10)
        assert fake.received.total() == 4
        assert sum(bool(list(Replies(one.home).of_image(row["image_id"]))) for row in asked) == 4
        assert figures(one).in_doubt == 0
        again = describer(fake, process=True, parallel=4, timeout_s=5).annotate(asked)
        assert all(isinstance(said, Annotation) for said in again)
        assert max(fake.received.values()) == 1


def test_a_new_job_waits_for_what_an_older_courier_has_on_its_way(describer, rows):
    asked = rows(4)
    with FakeEndpoint(latency_s=0.6) as fake:
        old = describer(fake, process=True, timeout_s=5)
        line = link.Link(old.sender.spec)
        made = [partial(old.request, row, prompt.messages(row)) for row in asked]
        threading.Thread(target=line.ask, args=(made,), daemon=True).start()
        wait_until(lambda: fake.in_flight == 4)
        said = describer(fake, timeout_s=5).annotate(asked)
        assert all(isinstance(one, Annotation) for one in said)
        assert fake.received.total() == 4
        line.close()


def test_a_killed_courier_is_replaced_and_its_requests_are_in_doubt(describer, rows):
    asked = rows(10)
    with FakeEndpoint(latency_s=0.3) as fake:
        one = describer(fake, process=True, parallel=4, timeout_s=5)
        said = []
        thread = threading.Thread(target=lambda: said.extend(one.annotate(asked)))
        thread.start()
        wait_until(lambda: fake.in_flight == 4)
        (process,) = couriers(one.home)
        os.kill(process.pid, signal.SIGKILL)
        thread.join(20)
        assert all(isinstance(answer, Annotation) for answer in said)
        assert len(said) == 10
        now = figures(one)
        twice = [key for key, count in fake.received.items() if count > 1]
        assert now.in_doubt == len(twice) == 4, "what was on its way is sent again, under the same Idempotency-Key"
        assert now.requests == fake.received.total() == 14


def test_a_courier_that_cannot_start_stops_the_job(describer, rows, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with FakeEndpoint() as fake, pytest.raises(JobStopped, match="ends again and again"):
        describer(fake, process=True).annotate(rows())


def test_the_courier_weighs_little():
    """It has to start fast beside every worker: nothing of the project's heavy half may come with it."""
    import subprocess

    code = "import facemllm.asking.courier, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"pyarrow", "numpy", "pydantic", "ray", "torch", "PIL"} & set(loaded)


def test_the_digest_of_the_annotator_is_that_of_what_decides(describer):
    with FakeEndpoint() as fake:
        one = describer(fake)
    assert one.model_digest == digests.of_json(["endpoint", "m", dict(one.parameters)])
