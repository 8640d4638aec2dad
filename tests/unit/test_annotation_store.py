"""Where replies are kept, who may ask, what is counted and what is spent; each across processes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from facemllm.asking.account import Account, Counters, most_tokens
from facemllm.asking.store import Claims, Replies, Reply, price, purge

ANNA, BERT = "a" * 64, "b" * 64
KEY, OTHER = "1" * 64, "2" * 64


def reply(image_id=ANNA, key=KEY, **values):
    return Reply(image_id=image_id, key=key, model="m", prompt_hash="p", **{"text": "said", **values})


def elsewhere(code, *arguments):
    """A process that runs `code`, prints a line and waits for its standard input to close."""
    command = [sys.executable, "-c", code + "\nprint('ready', flush=True)\nsys.stdin.read()", *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


HOLD = """
import sys
from pathlib import Path
from facemllm.asking.store import Claims, Replies
home, image_id, key = Path(sys.argv[1]), *sys.argv[2:4]
claims = Claims(home)
assert claims.take(key)
Replies(home).note(image_id, key)
"""


def test_a_reply_is_read_as_it_was_written_and_lies_under_its_picture(tmp_path):
    store = Replies(tmp_path)
    assert store.read(ANNA, KEY) is None
    assert not store.has(ANNA, KEY)
    kept = reply(prompt_tokens=7, completion_tokens=2, finish="stop", seconds=0.5, time="2026-01-01", cost=0.25)
    store.write(kept)
    store.write(reply(key=OTHER, text=None, error="too long"))
    assert store.read(ANNA, KEY) == kept
    assert store.has(ANNA, KEY)
    assert store.read(ANNA, OTHER).text is None
    assert {path.name.partition(".")[0] for path in store.of_image(ANNA)} == {ANNA}
    assert len(list(store.of_image(ANNA))) == 2
    assert not list(store.of_image(BERT))


def test_a_damaged_reply_counts_as_none_and_no_name_leads_out(tmp_path):
    store = Replies(tmp_path)
    store.write(reply())
    (path,) = store.of_image(ANNA)
    path.write_text("{")
    assert store.read(ANNA, KEY) is None
    for name in ("../../etc/passwd", "A" * 64, "a" * 63, ""):
        with pytest.raises(ValueError, match="is no SHA-256"):
            store.read(name, KEY)
        assert not store.has(name, KEY)


def test_a_full_disk_leaves_no_half_reply(tmp_path, monkeypatch):
    store = Replies(tmp_path)
    store.write(reply(key=OTHER))

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.write(reply())
    monkeypatch.undo()
    assert store.read(ANNA, KEY) is None
    assert len(list(store.of_image(ANNA))) == 1


def test_a_note_stays_until_the_outcome_is_known(tmp_path):
    store = Replies(tmp_path)
    assert not store.noted(ANNA, KEY)
    store.note(ANNA, KEY)
    store.note(ANNA, KEY)
    assert store.noted(ANNA, KEY)
    assert not store.noted(ANNA, OTHER)
    store.unnote(ANNA, KEY)
    store.unnote(ANNA, KEY)
    assert not store.noted(ANNA, KEY)


def test_a_claim_keeps_other_processes_out_until_its_holder_dies(tmp_path):
    claims = Claims(tmp_path)
    holder = elsewhere(HOLD, tmp_path, ANNA, KEY)
    try:
        assert not claims.take(KEY)
        assert claims.take(OTHER)
        holder.kill()
        holder.wait(10)
        assert claims.take(KEY)
        claims.give(KEY)
    finally:
        holder.kill()
        claims.close()


def test_a_purge_takes_every_reply_of_the_pictures_and_nothing_else(tmp_path):
    store = Replies(tmp_path)
    twin = ANNA[:3] + "0" * 61  # in the same folder
    for image_id in (ANNA, BERT, twin):
        store.write(reply(image_id))
        store.write(reply(image_id, OTHER))
    store.note(ANNA, "3" * 64)
    partial = next(iter(store.of_image(ANNA))).with_name(f".{ANNA}.{KEY}.json.99.1")
    partial.write_text("half a reply of a process that was killed")
    assert purge(tmp_path, [ANNA, "c" * 64]) == 2
    assert not list(store.of_image(ANNA))
    assert not partial.exists()
    assert len(list(store.of_image(BERT))) == len(list(store.of_image(twin))) == 2
    assert purge(tmp_path, [ANNA]) == 0
    assert purge(tmp_path / "none", [ANNA]) == 0


def test_a_purge_waits_for_the_request_that_is_under_way(tmp_path):
    store = Replies(tmp_path)
    store.write(reply(key=OTHER))
    holder = elsewhere(HOLD, tmp_path, ANNA, KEY)
    try:
        with pytest.raises(TimeoutError, match="still under way"):
            purge(tmp_path, [ANNA], wait_s=0.1)

        def answered():
            time.sleep(0.2)
            store.write(reply())
            holder.kill()

        thread = threading.Thread(target=answered)
        thread.start()
        assert purge(tmp_path, [ANNA], wait_s=10) == 2
        thread.join()
    finally:
        holder.kill()
        holder.wait(10)
    assert not list(store.of_image(ANNA))


def test_what_tokens_cost():
    assert price(1_000_000, 500_000, 2.0, 6.0) == 5.0
    assert price(None, 500_000, 2.0, 6.0) == 3.0
    assert price(5, 5, None, 6.0) is None


SPEND = """
import sys
from pathlib import Path
from facemllm.asking.account import Account
account = Account(Path(sys.argv[1]), "job")
for _ in range(400):
    hold = account.reserve(10, 5, 500, None)
    if isinstance(hold, int):
        account.settle(hold, 8, 2)
"""


def test_a_budget_of_requests_is_strict_over_processes_and_restarts(tmp_path):
    spenders = [elsewhere(SPEND, tmp_path) for _ in range(2)]
    for spender in spenders:
        spender.communicate("", timeout=20)
    account = Account(tmp_path, "job")
    assert account.read() == Counters(requests=500, answered=500, prompt_tokens=4000, completion_tokens=1000, largest=8)
    assert account.reserve(10, 5, 500, None) == "max_requests"
    assert isinstance(account.reserve(10, 5, 501, None), int)
    assert Account(tmp_path, "another").read() == Counters()


def test_tokens_are_set_aside_before_and_settled_after(tmp_path):
    account = Account(tmp_path, "job")
    first = account.reserve(100, 50, None, 300)
    assert first == 150
    assert account.reserve(100, 60, None, 300) == "max_tokens"
    account.settle(first, 120, 10)
    assert account.read().tokens == 130
    assert account.reserve(100, 50, None, 300) == 170, "the largest prompt seen is what the next one may use"
    account.give_back(170)
    unmetered = account.reserve(100, 50, None, 300)
    account.settle(unmetered, None, None)
    now = account.read()
    assert (now.requests, now.answered, now.refused, now.unmetered, now.held) == (2, 2, 1, 1, 170)
    assert now.tokens == 300
    before = now
    account.add(in_doubt=1, retries=2)
    assert account.read().less(before) == Counters(in_doubt=1, retries=2)


def test_the_bound_of_a_prompt_is_above_what_models_use():
    assert most_tokens("x" * 4000, 448) == 2000 + 1024  # four characters of English a token; LLaVA sees 576
