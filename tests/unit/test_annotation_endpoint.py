"""The endpoint annotator against an endpoint that misbehaves: what becomes of each row, and what was asked for it."""

import asyncio
import json
import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest

from facemllm import settings
from facemllm.annotate import prompt
from facemllm.annotate.annotator import Annotation
from facemllm.annotate.describer import endpoint
from facemllm.asking.completions import is_loopback
from facemllm.asking.requests import Filtered, JobStopped, RowRefused, TooLong, reduced
from facemllm.asking.store import Account, Replies, purge
from facemllm.core import digests
from facemllm.tables import FACES
from tests import fake_endpoint
from tests.fake_endpoint import COMPLETION_TOKENS, PROMPT_TOKENS, FakeEndpoint, completion, reply
from tests.refusing import refuses
from tests.waiting import wait_until

KEY = "sk-secret-0123456789"


@pytest.fixture
def rows(face_rows):
    """Rows without trusted labels, each with a picture of its own."""
    blank = dict.fromkeys(FACES.names)
    keep = ("image_id", "image", "source", "split")
    return lambda count=1: [blank | {name: row[name] for name in keep} for row in face_rows(count)]


@pytest.fixture
def describer(tmp_path, monkeypatch):
    """`describer(fake, parallel=4, ...)`: an endpoint annotator of its own store, quick to give up."""
    monkeypatch.setenv("FACEMLLM_API_KEY", KEY)

    def make(fake, home="home", model="m", **options):
        given = {"base_url": fake.base_url, "retries": 2, "timeout_s": 0.3, "parallel": 4, **options}
        overrides = [f"annotate.endpoint.{name}={value}" for name, value in given.items()]
        overrides += ["annotate.annotator=endpoint", f"annotate.vision_language.model={model}"]
        chosen = settings.load("laptop", [f"storage.home={tmp_path / home}", *overrides])
        return endpoint(chosen, ["render"], backoff_s=0.01)

    return make


def figures(describer):
    with closing(Replies(describer.home)) as replies:
        return Account(replies, describer.sender.account).read()


def under_way(describer):
    """Requests that are noted as under way."""
    with closing(Replies(describer.home)) as replies, replies.transaction() as database:
        return database.execute("SELECT count(*) FROM under_way").fetchone()[0]


@pytest.mark.parametrize(
    ("script", "refused", "requests"),
    [
        *((["good"], None, 1), (["nousage"], None, 1), (["gzip"], None, 1), (["500", "503"], None, 3)),
        *(([fault], None, 2) for fault in ("429", "429:0.05", "408", "hang", "drip", "reset", "cut", "broken")),
        *(
            ([fault], None, 2)
            for fault in ("compressed", "error:200", "error:429", "text:not json", "wrong", "length", "text:")
        ),
        (["500"] * 3, "gave no answer, asked 3 times (500: told to say 500)", 3),
        (["hang"] * 3, "no whole answer within 0.3 s", 3),
        (["drip"] * 3, "no whole answer within 0.3 s", 3),
        (["reset"] * 3, "the connection broke", 3),
        (["broken"] * 3, "no chat completion", 3),
        (["error:the cat is ill"] * 3, "its answer is no chat completion (the cat is ill)", 3),
        (["page"] * 3, "its answer is no chat completion (Sign in)", 3),
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
        assert under_way(one) == 0
        if "gave no answer" in (refused or ""):
            assert isinstance(describer(fake).annotate(rows())[0], Annotation), "the next time it is asked again"


def test_nothing_that_was_answered_is_asked_again(describer, rows):
    asked = rows(4)
    with FakeEndpoint() as fake:
        one = describer(fake, timeout_s=60)  # a reply that came too late is asked for again
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


def test_two_rows_with_the_same_key_are_paid_once(describer, rows):
    (row,) = rows()
    with FakeEndpoint(latency_s=0.05) as fake:
        first, *others = describer(fake).annotate([row, dict(row), dict(row)])
        assert (others, fake.received.total()) == ([first] * 2, 1)


def test_the_key_of_a_reply_is_picture_words_model_and_parameters(describer, rows):
    (row,) = rows()
    with FakeEndpoint() as fake:
        one = describer(fake)
        same = describer(fake, parallel=9, timeout_s=9, retries=9, max_requests=9, input_price=2, output_price=2)
        other = describer(fake, model="other")
        asked = prompt.messages(row)
        key = one.key(row["image_id"], asked)
        assert key == same.key(row["image_id"], asked)
        assert (one.digest, one.sender.account) == (same.digest, same.sender.account)
        hotter = replace(one, parameters={**one.parameters, "temperature": 0.5})
        keys = {key, one.key("0" * 64, asked), one.key(row["image_id"], prompt.messages({**row, "age": 30.0}))}
        keys |= {changed.key(row["image_id"], asked) for changed in (other, hotter)}
        assert len(keys) == 5
        assert len({one.digest, other.digest, hotter.digest}) == 3
        assert one.model_digest == digests.of_json(["endpoint", "m", dict(one.parameters)])
        decides = [one.model_digest, one.parameters, prompt.template_digest(), prompt.READING]
        assert one.digest == digests.of_json(decides), "moving a line of code changes no table"
        assert other.sender.account != one.sender.account


def test_the_reduced_picture_the_words_and_the_schema_are_sent_and_labels_come_back(describer, rows):
    (row,) = rows()
    text = reply("A woman, about 30 years old.", "happiness", 30, "female", Bald=False, Bangs=None)
    with FakeEndpoint(script=[f"text:{text}"], keep=True) as fake:
        one = describer(fake)
        (said,) = one.annotate([row])
        known = {"expression": "happiness", "age": 30.0, "gender": "female"}
        assert said.labels == {"attributes": {"Bald": False}, **known}
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
    refuses("cannot be used: the file is empty", reduced, b"", 32, error=RowRefused)


def test_a_picture_that_cannot_be_read_refuses_its_row_alone(describer, rows):
    asked = rows(3)
    asked[1]["image"] = {"bytes": b"no picture", "path": None}
    asked[2]["image_id"] = "../../secret"
    with FakeEndpoint() as fake:
        said = describer(fake).annotate(asked)
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
        said = describer(fake, parallel=1, timeout_s=10).annotate(asked)
        assert all(isinstance(one, Annotation) for one in said)
        assert fake.received.total() == len(asked) - 1 + requests
        count = fake.received.total()
        describer(fake).annotate(rows(13)[12:])
        assert fake.received.total() == count + 1, "the next run knows it"
    with FakeEndpoint(keep=True) as other:
        describer(other).annotate(rows(14)[13:])
        (body,) = other.bodies.values()
        assert {"response_format", "max_tokens"} <= body.keys(), "of this address alone"


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


@pytest.mark.parametrize("status", ["401", "404", "405"])
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


@pytest.mark.parametrize(
    ("how", "match"),
    [
        *((how, "answered none of 5 rows one after the other") for how in ("500", "hang", "400", "redirect")),
        ("429", "does not answer, asked 2 times .429"),
    ],
)
def test_an_endpoint_that_fails_for_everyone_stops_the_job(describer, rows, how, match):
    with FakeEndpoint(default=how) as fake:
        one = describer(fake, retries=1, timeout_s=0.1)
        refuses(match, one.annotate, rows(12), error=JobStopped)
        assert figures(one).answered == 0
    with pytest.raises(JobStopped, match=r"does not answer, asked 2 times \(no connection"):
        one.annotate(rows(13)[12:])  # now it is not even there


@pytest.mark.parametrize(
    ("how", "asked", "match"),
    [
        ("quota", 1, r"refuses every request \(429: You exceeded.*its quota or credit is used up; renew it"),
        ("error:insufficient_quota", 1, "refuses every request .*its quota or credit is used up"),
        ("403", 1, r"refuses every request \(403: told to say 403\); mend its key"),
        ("flagged", 50, r"answered none of 50 rows one after the other \(403: .*flagged"),
        ("silent", 24, r"24 replies .* cut off before they said anything: .*max_tokens \(400\) is too little"),
        ("length", 24, "24 replies .* cut off"),
        ("empty", 24, r"24 replies .* were empty \(finish_reason stop\); see whether m answers questions"),
        ("thinks", 24, "24 replies .* cut off"),
    ],
)
def test_an_endpoint_that_fails_alike_for_all_stops_the_job_early_in_its_own_words(describer, rows, how, asked, match):
    with FakeEndpoint(default=how) as fake:
        with pytest.raises(JobStopped, match=match) as stop:
            describer(fake, parallel=1).annotate(rows(60))
        assert fake.received.total() == asked
        if "cut off" not in match:
            assert f"(asked at {fake.base_url}/chat/completions)" in str(stop.value)


@pytest.mark.parametrize("how", ["403", "flagged", "error:content_filter"])
def test_a_picture_that_is_flagged_is_a_row_of_its_own(describer, rows, how):
    with FakeEndpoint(script=["good", how] * 6) as fake:
        said = describer(fake, parallel=1).annotate(rows(12))
        assert [type(one) for one in said] == [Annotation, Filtered] * 6
    with FakeEndpoint(script=["good"], default="403") as fake:
        with pytest.raises(JobStopped, match="answered none of 5 rows"):
            describer(fake, home="other", parallel=1).annotate(rows(12))
        assert fake.received.total() == 6


def test_a_request_that_is_too_long_for_the_model_there_is_a_row_of_its_own(describer, rows):
    with FakeEndpoint(script=["good", "long"] * 6) as fake:
        said = describer(fake, parallel=1).annotate(rows(12))
        assert [type(one) for one in said] == [Annotation, TooLong] * 6
        assert fake.received.total() == 12, "no other form of the request is tried"


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
        refuses(r"annotate\.endpoint\.max_requests is used up", one.annotate, asked, error=JobStopped)
        assert fake.received.total() == figures(one).requests == 6
        refuses("max_requests is used up", describer(fake, max_requests=6).annotate, asked, error=JobStopped)
        assert fake.received.total() == 6, "the budget is of the whole job, ever"
        assert all(isinstance(said, Annotation) for said in describer(fake, max_requests=10).annotate(asked))
        assert fake.received.total() == 10


def test_a_budget_of_tokens_is_never_exceeded(describer, rows):
    with FakeEndpoint(latency_s=0.01) as fake:
        one = describer(fake, max_tokens=6000)
        refuses("max_tokens is used up", one.annotate, rows(20), error=JobStopped)
        now = figures(one)
        assert now.prompt_tokens + now.completion_tokens == fake.completed.total() * (PROMPT_TOKENS + COMPLETION_TOKENS)
        assert 2000 < now.tokens <= 6000
        assert now.held == 0


def test_every_request_that_went_out_counts_and_tokens_only_of_those_not_refused(describer, rows):
    with FakeEndpoint(script=["500", "429", "hang"]) as fake:
        one = describer(fake, retries=3)
        one.annotate(rows())
        now = figures(one)
        assert (now.requests, now.answered, now.refused, now.in_doubt, now.retries) == (4, 1, 2, 1, 3)
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
        assert json.loads(by)["prompt_hash"] == digests.of_json(prompt.messages(rows()[0]))


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
        assert not [word for word in (KEY, "/9j/", "\n") if word in str(said)]
        assert len(str(said)) < 300
        text = "".join(path.read_text(errors="replace") for path in one.home.rglob("*") if path.is_file())
        assert KEY not in text + repr(one) + repr(one.sender)


@pytest.mark.parametrize(
    ("content", "text"),
    [([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"), (None, ""), ("x", "x")],
)
def test_content_may_come_in_parts_or_not_at_all(content, text):
    from facemllm.asking.completions import _read_reply

    assert _read_reply(json.dumps(completion(content)).encode()).text == text


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("https://host.example/v1", "FACEMLLM_API_KEY holds no key for https://host.example/v1"),
        ("http://host.example/v1", "would go to host.example unencrypted"),
        ("ftp://host.example/v1", "no address of an API"),
        ("host.example", "no address of an API"),
        ("https://host.example/v1/chat/completions", "ends in /completions, which is added to it"),
        ("https://user:word@host.example/v1", "holds a user or password"),
        ("https://host.example:port/v1", "base_url"),
    ],
)
def test_an_address_or_key_that_cannot_be_used_is_refused_before_anything_is_sent(monkeypatch, address, message):
    monkeypatch.delenv("FACEMLLM_API_KEY", raising=False)
    given = ["annotator=endpoint", "vision_language.model=m", f"endpoint.base_url={address}"]
    chosen = settings.load("laptop", [f"annotate.{override}" for override in given])
    assert "word" not in refuses(message, endpoint, chosen, ["render"]).replace("password", "")


def test_a_worker_without_the_key_stops_the_job(monkeypatch, describer):
    here = ("http://127.0.0.1:8000/v1", "http://[::1]/v1", "http://localhost/v1")
    away = ("http://127.0.0.1.example.com/v1", "https://10.0.0.1/v1")
    assert [is_loopback(url) for url in here + away] == [True] * 3 + [False] * 2
    with FakeEndpoint() as fake:
        sender = describer(fake).sender
    sender = replace(sender, endpoint=sender.endpoint.model_copy(update={"base_url": "https://host.example/v1"}))
    monkeypatch.delenv("FACEMLLM_API_KEY")
    refuses("not set where Ray's workers run", sender.send, [], error=JobStopped)


@contextmanager
def worker(describer, rows):
    """A process that asks about rows, as a Ray worker does; it is gone when the block ends."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["facemllm.annotate.describer", "facemllm.asking.endpoint"])
    process = forks.Process(target=describer.annotate, args=(rows,))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join(10)


def test_a_killed_worker_leaves_in_doubt_what_was_under_way_and_nothing_else(describer, rows):
    """Of twelve eight are answered when it dies; the four that it waits for are asked again, and it is said."""
    asked = rows(12)
    with FakeEndpoint(script=["good"] * 8 + ["hang"] * 4) as fake:
        one = describer(fake, timeout_s=600)
        with worker(one, asked):
            wait_until(lambda: fake.completed.total() == 8 and fake.in_flight == 4)
            wait_until(lambda: figures(one).answered == 8 and under_way(one) == 4)
        before = figures(one)
        assert (before.requests, before.answered, before.in_doubt) == (12, 8, 0)
        again = describer(fake, timeout_s=600)
        assert all(isinstance(said, Annotation) for said in again.annotate(asked))
        now = figures(again)
        twice = [key for key, count in fake.received.items() if count > 1]
        assert now.in_doubt == len(twice) == 4, "under the same Idempotency-Key"
        assert now.requests == fake.received.total() == 16
        assert now.held > 0, "what the lost answers used is not known"
        assert under_way(again) == 0


def test_what_a_living_process_has_under_way_is_waited_for(describer, rows):
    asked = rows(4)
    with FakeEndpoint(default="hold") as fake, ThreadPoolExecutor(1) as thread:
        one = describer(fake, timeout_s=600)
        with worker(one, asked) as other:
            wait_until(lambda: fake.in_flight == 4)
            said = thread.submit(describer(fake, timeout_s=600).annotate, asked)
            fake.release()
            assert all(isinstance(answer, Annotation) for answer in said.result(60))
            other.join(60)
            assert other.exitcode == 0
        assert fake.received.total() == figures(one).requests == 4


def test_ctrl_c_starts_nothing_new_and_keeps_what_is_under_way(describer, rows):
    with FakeEndpoint(default="hold") as fake:
        one = describer(fake, timeout_s=600)
        with worker(one, rows(40)) as other:
            wait_until(lambda: fake.in_flight == 4)
            os.kill(other.pid, signal.SIGINT)
            fake.release()
            other.join(60)
            assert other.exitcode
        now = figures(one)
        assert 4 <= now.answered == now.requests == fake.received.total() < 40
        assert (now.in_doubt, under_way(one)) == (0, 0)


def test_a_second_ctrl_c_does_not_wait_and_leaves_no_request_under_way(describer, rows):
    with FakeEndpoint(default="hang") as fake:
        one = describer(fake, timeout_s=600)
        with worker(one, rows(12)) as other:
            wait_until(lambda: fake.in_flight == 4)
            while other.is_alive():
                os.kill(other.pid, signal.SIGINT)
                time.sleep(0.05)
        assert (figures(one).in_doubt, under_way(one)) == (4, 0)


def test_a_reply_about_a_picture_that_was_forgotten_meanwhile_is_not_kept(describer, rows):
    (row,) = rows()
    with FakeEndpoint() as fake:
        one = describer(fake)

        def forget(body):
            purge(one.home, [row["image_id"]])
            return fake_endpoint.usual_answer(body)

        fake.answer = forget
        (said,) = one.annotate([row])
    assert "was forgotten while it was asked about" in str(said)
    with closing(Replies(one.home)) as replies:
        assert replies.read(row["image_id"], one.key(row["image_id"], prompt.messages(row))) is None
    assert (figures(one).answered, under_way(one)) == (1, 0)


def test_a_store_that_cannot_be_written_stops_the_job(describer, rows):
    with FakeEndpoint() as fake:
        one = describer(fake)
        path = one.home / "annotations" / "replies.sqlite"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"no database at all" * 99)
        refuses(r"replies\.sqlite cannot be used \(file is not a database\)", one.annotate, rows(), error=JobStopped)
        assert fake.received.total() == 0


def test_it_can_be_used_where_a_loop_runs_already_as_in_a_notebook(describer, rows):
    async def cell():
        return describer(fake).annotate(rows(2))

    with FakeEndpoint() as fake:
        assert all(isinstance(said, Annotation) for said in asyncio.run(cell()))
