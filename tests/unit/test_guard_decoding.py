"""The decoder: beside the event loop, a few at once, each picture once, within a time and so many bytes."""

import asyncio
import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image

from facemllm.core import digests
from facemllm.serve.guard.decoding import WAITING_A_THREAD, Decoder
from facemllm.serve.guard.images import decode
from facemllm.serve.language import Encoded, Refused
from tests.pictures import encode, progressive


@dataclass
class Small:
    pixels: np.ndarray
    map: np.ndarray | None
    key: tuple[str, ...]
    size: tuple[int, int]


@dataclass
class Preparing:
    """Prepares pictures, counts how often, and can be made to wait."""

    count: int = 0
    most: int = 0
    now: int = 0
    go: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self):
        self.go.set()

    def __call__(self, image, classes, key):
        with self.lock:
            self.count, self.now = self.count + 1, self.now + 1
            self.most = max(self.most, self.now)
        self.begun.set()
        self.go.wait(30)
        with self.lock:
            self.now -= 1
        return Small(np.asarray(image.resize((8, 8))), classes, key, image.size)


def picture(value=0, size=(40, 20), form="PNG"):
    return encoded(encode(Image.new("RGB", size, (value, 0, 0)), form), size)


def encoded(data, size=(40, 20)):
    return Encoded(data, *size, digests.of_bytes(data))


def map_of(classes):
    return encoded(encode(classes), classes.shape[::-1])


def decoder(prepare, threads=2, seconds=30.0, cache=2**20):
    return Decoder(prepare, threads=threads, seconds=seconds, cache=cache)


def refused(status, act):
    with pytest.raises(Refused) as caught:
        asyncio.run(act)
    assert caught.value.status == status
    return caught.value


def test_a_picture_is_decoded_once_for_all_who_ask_and_kept():
    prepare = Preparing()
    made = decoder(prepare)

    async def act():
        crowd = await asyncio.gather(*(made.prepared(picture(), None, None) for _ in range(20)))
        return [*crowd, await made.prepared(picture(), None, None)]

    found = asyncio.run(act())
    assert prepare.count == 1
    assert all(one is found[0] for one in found)
    assert found[0].key == (picture().digest, "", "")
    assert np.array_equal(found[0].pixels, np.asarray(Image.new("RGB", (8, 8))))


def test_image_map_and_box_make_the_key_and_the_box_crops_both():
    prepare, made = (prepare := Preparing()), decoder(prepare)
    classes = np.zeros((10, 20), np.uint8)
    classes[:, 10:] = 3
    box = (20.0, 0.0, 40.0, 20.0)

    async def act():
        image, map_ = picture(), map_of(classes)
        return [await made.prepared(image, m, b) for m in (None, map_) for b in (None, box)]

    plain, cropped, mapped, both = asyncio.run(act())
    assert prepare.count == 4
    assert len({one.key for one in (plain, cropped, mapped, both)}) == 4
    assert (plain.size, cropped.size) == ((40, 20), (20, 20))
    assert (both.map.shape, set(both.map.ravel())) == ((10, 10), {3})
    assert np.array_equal(mapped.map, classes)


@pytest.mark.parametrize(
    "box", [(0, 0, 41, 20), (5, 5, 5, 20), (0, 0, 7, 20), (float("nan"), 0, 40, 20), (-1, 0, 40, 20)]
)
def test_a_box_outside_the_image_is_refused(box):
    assert "box must be" in refused(422, decoder(Preparing()).prepared(picture(), None, box)).reason


def test_no_more_than_its_threads_decode_at_once_and_the_event_loop_goes_on():
    prepare = Preparing()
    prepare.go.clear()
    made = decoder(prepare, threads=2)

    async def act():
        asked = [asyncio.create_task(made.prepared(picture(n), None, None)) for n in range(8)]
        while prepare.count < 2:
            await asyncio.sleep(0.001)
        for _ in range(50):
            await asyncio.sleep(0.001)
        assert prepare.count == 2
        prepare.go.set()
        await asyncio.gather(*asked)

    asyncio.run(act())
    assert (prepare.count, prepare.most) == (8, 2)


def test_when_too_many_wait_or_too_long_a_request_is_refused_with_a_time_to_come_back():
    prepare = Preparing()
    prepare.go.clear()
    made = decoder(prepare, threads=1, seconds=30)

    async def act():
        room = 1 + WAITING_A_THREAD
        asked = [asyncio.create_task(made.prepared(picture(n), None, None)) for n in range(room)]
        await asyncio.sleep(0)
        with pytest.raises(Refused) as caught:
            await made.prepared(picture(room), None, None)
        prepare.go.set()
        await asyncio.gather(*asked)
        return caught.value

    found = asyncio.run(act())
    assert (found.status, found.retry_after) == (429, 1)
    prepare.go.clear()
    prepare.begun.clear()
    late = decoder(prepare, threads=1, seconds=0.2)

    async def two():
        first = asyncio.create_task(late.prepared(picture(200), None, None))
        await asyncio.to_thread(prepare.begun.wait)
        return await asyncio.gather(first, late.prepared(picture(201), None, None), return_exceptions=True)

    running, waiting = asyncio.run(two())
    prepare.go.set()
    assert (running.status, waiting.status, waiting.retry_after) == (422, 429, 1)


def test_what_nobody_waits_for_is_never_begun():
    prepare = Preparing()
    prepare.go.clear()
    made = decoder(prepare, threads=1)

    async def act():
        first = asyncio.create_task(made.prepared(picture(1), None, None))
        await asyncio.to_thread(prepare.begun.wait)
        left, stays = (asyncio.create_task(made.prepared(picture(2), None, None)) for _ in range(2))
        gone = asyncio.create_task(made.prepared(picture(3), None, None))
        await asyncio.sleep(0)
        for one in (left, gone):
            one.cancel()
        await asyncio.gather(left, gone, return_exceptions=True)
        prepare.go.set()
        await asyncio.gather(first, stays)
        return await made.prepared(picture(4), None, None)

    asyncio.run(act())
    assert prepare.count == 3  # of four


def test_the_bytes_it_keeps_are_bounded_and_those_used_last_stay():
    prepare = Preparing()
    made = decoder(prepare, cache=3 * (1024 + 8 * 8 * 3))

    async def act():
        for n in (1, 2, 3, 1, 4, 1, 2):
            await made.prepared(picture(n), None, None)

    asyncio.run(act())
    assert prepare.count == 5  # 2 was given up for 4
    assert made.kept_bytes <= 3 * (1024 + 8 * 8 * 3)


def test_a_broken_picture_is_refused_for_all_and_not_kept():
    prepare = Preparing()
    made = decoder(prepare)
    cut = encoded(progressive(64)[:-300])

    async def act():
        return await asyncio.gather(*(made.prepared(cut, None, None) for _ in range(3)), return_exceptions=True)

    assert {(one.status, one.reason.split(":")[0]) for one in asyncio.run(act())} == {(400, "the image cannot be read")}
    assert (prepare.count, made.kept_bytes) == (0, 0)


def test_decoding_stops_when_its_time_is_over():
    with pytest.raises(Refused) as caught:
        decode(picture(), deadline=0.0)
    found = caught.value
    assert found.status == 422
    assert found.reason == "the image cannot be read: decoding it takes too long"
