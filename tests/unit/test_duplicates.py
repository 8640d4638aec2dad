"""Copies and leaked people: found whatever their order, and the right one of each pair dropped."""

import hashlib
import io
import itertools

import numpy as np
import pytest
from PIL import Image

from facemllm.core.images import perceptual_hash as hashed
from facemllm.ingest.duplicates import Census

BITS = 14


def noise(seed: int, cells: int = 12) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (cells, cells, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((96, 96), Image.Resampling.BICUBIC)


def again(image: Image.Image, quality: int = 60, side: int = 80) -> Image.Image:
    buffer = io.BytesIO()
    image.resize((side, side)).save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def distance(first: bytes, second: bytes) -> int:
    return (int.from_bytes(first) ^ int.from_bytes(second)).bit_count()


def census(*rows: tuple[int | str, bytes, str, str | None]) -> Census:
    found = Census(BITS)
    for name, code, split, subject in rows:
        found.add(hashlib.sha256(str(name).encode()).hexdigest(), code, split, subject, (("split", split),))
    return found


def test_a_perceptual_hash_survives_saving_and_shrinking_and_tells_pictures_apart() -> None:
    hashes = [hashed(noise(seed)) for seed in range(20)]
    assert max(distance(code, hashed(again(noise(seed)))) for seed, code in enumerate(hashes)) <= BITS
    assert min(distance(a, b) for a, b in itertools.combinations(hashes, 2)) > 60


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(("near", "far"), [("test", "train"), ("test", "validation"), ("validation", "train")])
def test_of_a_pair_in_two_splits_the_one_farther_from_the_test_goes(near, far, order) -> None:
    rows = [("a", hashed(noise(1)), near, None), ("b", hashed(again(noise(1))), far, None)]
    dropped = census(*(rows[n] for n in order)).dropped()
    assert set(dropped) == {order.index(1)}
    assert f"of the {near} split" in next(iter(dropped.values()))


def test_in_one_split_the_later_goes_unless_both_are_of_one_person() -> None:
    code, copy = hashed(noise(1)), hashed(again(noise(1)))
    assert set(census(("a", code, "train", None), ("b", copy, "train", None)).dropped()) == {1}
    assert set(census(("a", code, "train", "x"), ("b", copy, "train", "y")).dropped()) == {1}
    assert not census(("a", code, "train", "x"), ("b", copy, "train", "x")).dropped()


def test_the_very_same_bytes_stay_once_even_of_one_person() -> None:
    code = hashed(noise(1))
    rows = [("a", code, "train", "x"), ("a", code, "train", "x"), ("c", hashed(noise(2)), "train", "x")]
    assert census(*rows).dropped() == {1: "the same picture as row 0 of the train split"}


def test_a_person_in_several_splits_keeps_the_one_nearest_the_test() -> None:
    splits = ["train", "test", "validation", "train", "test"]
    rows = [(n, hashed(noise(n)), split, "x") for n, split in enumerate(splits)]
    dropped = census(*rows, (9, hashed(noise(9)), "train", "y"), (10, hashed(noise(10)), "train", None)).dropped()
    assert (set(dropped), set(dropped.values())) == ({0, 2, 3}, {"the same person stands in the test split"})


def test_every_pair_within_the_bits_is_found_and_none_beyond() -> None:
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 256, (400, 32), dtype=np.uint8)
    for row in range(0, 400, 2):  # its neighbour is a copy with up to 16 bits turned
        bits = np.unpackbits(codes[row])
        bits[generator.choice(256, row // 2 % 17, replace=False)] ^= 1
        codes[row + 1] = np.packbits(bits)
    found = census(*((n, code.tobytes(), "train", None) for n, code in enumerate(codes))).dropped()
    near = {row + 1 for row in range(0, 400, 2) if distance(codes[row].tobytes(), codes[row + 1].tobytes()) <= BITS}
    assert set(found) == near
    assert 100 < len(near) < 200


def test_groups_are_counted_before_and_after() -> None:
    code = hashed(noise(1))
    found = census(("a", code, "train", None), ("b", code, "test", None), ("c", hashed(noise(3)), "train", None))
    dropped = found.dropped()
    assert found.counted({}) == {"split": {"test": 1, "train": 2}}
    assert found.counted(dropped) == {"split": {"test": 1, "train": 1}}
    assert found.report(dropped) == {"pictures alike, train": 1}


def test_what_looks_like_a_forgotten_picture_goes_whatever_its_split_or_person() -> None:
    found = census(("a", hashed(again(noise(1))), "test", "x"), ("b", hashed(noise(2)), "test", "x"))
    found.bar(hashed(noise(1)))
    assert (found.dropped(), found.report({0: "forgotten"})) == ({0: "forgotten"}, {"forgotten, test": 1})


def test_thousands_of_frames_of_one_person_cost_no_memory_for_their_pairs() -> None:
    code = hashed(noise(1))
    found = census(*((n, code, "train", "x") for n in range(600)))
    assert next(found._alike(), None) is None
    assert not found.dropped()
