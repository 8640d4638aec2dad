"""Where replies are kept, what is under way, what is counted and what is spent; each across processes."""

import multiprocessing
import sqlite3
import time
from contextlib import closing

import pytest

from facemllm.asking.requests import Reply, Request
from facemllm.asking.store import Account, Counters, Replies, Reserved, Wait, most_tokens, price, purge
from tests.refusing import refuses

ANNA, BERT = "a" * 64, "b" * 64
KEY, OTHER = "1" * 64, "2" * 64
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["facemllm.asking.store"])


def reply(image_id=ANNA, key=KEY, **values):
    return Reply(image_id=image_id, key=key, model="m", prompt_hash="p", **{"text": "said", **values})


def request(image_id=ANNA, key=KEY, repair=False):
    return Request(image_id=image_id, key=key, prompt_hash="p", messages=[], picture=b"", repair=repair)


@pytest.fixture
def store(tmp_path):
    with closing(Replies(tmp_path)) as replies:
        yield replies


@pytest.fixture
def account(store):
    return Account(store, "job")


def hold(home, ready):
    """Reserve a request in a process of its own, and be killed."""
    Account(Replies(home), "job").reserve(request(), (10, 5), None, None)
    ready.set()
    time.sleep(600)


def spend(home, name):
    """Have two hundred requests answered in a process of its own, as far as the budget goes."""
    account = Account(Replies(home), "job")
    for number in range(200):
        asked = name * 64, f"{name}{number}"
        reserved = account.reserve(request(*asked), (10, 5), 250, None)
        if isinstance(reserved, Reserved):
            account.answered(reserved, reply(*asked, prompt_tokens=8, completion_tokens=2))


def test_a_reply_is_read_as_it_was_written_and_never_replaced(store, tmp_path):
    assert store.read(ANNA, KEY) is None
    kept = reply(prompt_tokens=7, completion_tokens=2, finish="stop", seconds=0.5, time="2026-01-01", cost=0.25)
    store.write(kept)
    store.write(reply(key=OTHER, text=None, error="too long"))
    store.write(reply(BERT, text="half a pair \ud83d, \x00"))
    store.write(reply(text="another answer to the same"))
    with closing(Replies(tmp_path)) as other:
        assert other.read(ANNA, KEY) == kept
        assert other.read(ANNA, OTHER).text is None
        assert other.read(BERT, KEY).text == "half a pair \ud83d, \x00"
        assert other.read(BERT, OTHER) is None
    for name in ("../../etc/passwd", "A" * 64, "a" * 63, ""):
        refuses("is no SHA-256", store.write, reply(name), error=ValueError)


def test_a_transaction_that_fails_leaves_nothing(store, account):
    def fail():
        with store.transaction():
            account.reserve(request(), (10, 5), None, None)
            store.write(reply())
            raise OSError(28, "No space left on device")

    refuses("No space", fail, error=OSError)
    assert store.read(ANNA, KEY) is None
    assert account.read() == Counters()
    assert isinstance(account.reserve(request(), (10, 5), None, None), Reserved)


def test_a_purge_takes_every_reply_of_the_pictures_and_leaves_no_byte(store, account, tmp_path):
    for image_id in (ANNA, BERT):
        store.write(reply(image_id))
        store.write(reply(image_id, OTHER, text="words of " + image_id[:1] * 3))
    reserved = account.reserve(request(key="3" * 64), (10, 5), None, None)
    assert purge(tmp_path, [ANNA, "c" * 64]) == 2
    data = b"".join(path.read_bytes() for path in store.path.parent.iterdir())
    assert ANNA.encode() not in data
    assert b"words of aaa" not in data
    assert b"words of bbb" in data
    assert not account.answered(reserved, reply(key="3" * 64)), "it came after its picture was forgotten"
    assert store.read(ANNA, "3" * 64) is None
    assert store.read(BERT, KEY) == reply(BERT)
    assert purge(tmp_path, [ANNA]) == 0
    assert purge(tmp_path / "none", [ANNA]) == 0
    assert not (tmp_path / "none").exists()


def test_a_purge_says_when_its_bytes_are_still_in_the_log(store, tmp_path, monkeypatch):
    monkeypatch.setattr("facemllm.asking.store._WAIT_S", 0.05)
    store.write(reply())
    with closing(sqlite3.connect(store.path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM replies").fetchall()
        refuses("is being read", purge, tmp_path, [ANNA], error=TimeoutError)
    assert purge(tmp_path, [ANNA]) == 0
    assert ANNA.encode() not in b"".join(path.read_bytes() for path in store.path.parent.iterdir())


def test_what_tokens_cost_and_that_the_bound_of_a_prompt_is_above_what_models_use():
    costs = [price(1_000_000, 500_000, 2.0, 6.0), price(None, 500_000, 2.0, 6.0), price(5, 5, None, 6.0)]
    assert costs == [5.0, 3.0, None]
    assert most_tokens("x" * 4000, 448) == 2000 + 1024  # four characters of English a token; LLaVA sees 576


def test_a_request_under_way_keeps_others_out_until_its_process_dies(account, tmp_path):
    ready = FORKS.Event()
    holder = FORKS.Process(target=hold, args=(tmp_path, ready))
    holder.start()
    try:
        assert ready.wait(60)
        assert account.reserve(request(), (10, 5), None, None) == Wait()
        assert isinstance(account.reserve(request(key=OTHER), (10, 5), None, None), Reserved)
        assert account.reserve(request(key=OTHER), (10, 5), None, None) == Wait(), "nor does it ask the same itself"
        assert account.read().in_doubt == 0
    finally:
        holder.kill()
        holder.join(10)
    assert isinstance(account.reserve(request(), (10, 5), None, None), Reserved)
    now = account.read()
    assert (now.requests, now.in_doubt, now.held) == (3, 1, 45), "what became of it nobody knows, so it stays charged"


def test_what_was_answered_meanwhile_is_not_reserved_again(account, store):
    reserved = account.reserve(request(), (10, 5), 1, None)
    assert account.reserve(request(), (10, 5), 1, None) == Wait()
    account.answered(reserved, reply())
    assert account.reserve(request(), (10, 5), 1, None) == reply(), "looked up in the transaction that would reserve it"
    assert account.read().requests == 1


def test_a_budget_of_requests_is_strict_over_processes_and_restarts(account, store, tmp_path):
    spenders = [FORKS.Process(target=spend, args=(tmp_path, name)) for name in "ab"]
    for spender in spenders:
        spender.start()
    for spender in spenders:
        spender.join(60)
    assert account.read() == Counters(requests=250, answered=250, prompt_tokens=2000, completion_tokens=500, largest=8)
    assert account.reserve(request(), (10, 5), 250, None) == Wait("max_requests")
    assert isinstance(account.reserve(request(), (10, 5), 251, None), Reserved)
    assert Account(store, "another").read() == Counters()


def test_tokens_are_set_aside_before_and_settled_after(account):
    first = account.reserve(request(), (100, 50), None, 300)
    assert first.tokens == 150
    assert account.reserve(request(key=OTHER), (100, 60), None, 300) == Wait("max_tokens")
    assert account.answered(first, reply(prompt_tokens=120, completion_tokens=10))
    assert account.read().tokens == 130
    second = account.reserve(request(key=OTHER, repair=True), (100, 50), None, 300)
    assert second.tokens == 170, "the largest prompt seen is what the next one may use"
    account.unanswered(second, in_doubt=False)
    assert account.answered(account.reserve(request(key=OTHER), (100, 50), None, 300), reply(key=OTHER))
    now = account.read()
    assert (now.requests, now.answered, now.refused, now.unmetered, now.held) == (3, 2, 1, 1, 170)
    assert (now.tokens, now.repairs) == (300, 1)
    lost = account.reserve(request(key="3" * 64), (100, 50), None, None)
    account.unanswered(lost, in_doubt=True)
    account.count(retries=1)
    assert account.read().less(now) == Counters(requests=1, in_doubt=1, retries=1, held=170)


def test_the_form_that_an_endpoint_understands_is_known_by_its_address(account, store):
    assert account.form("http://a/v1") is None
    account.remember_form("http://a/v1", 1)
    account.count(retries=1)
    assert Account(store, "job").form("http://a/v1") == 1
    assert account.form("http://b/v1") is None
    assert Account(store, "another").form("http://a/v1") is None
