"""Pictures that are cheap to send and dear to open are refused before a decoder sees them; ordinary ones pass."""

import io
import struct
import time
import zlib
from functools import cache

import numpy as np
import pytest
from PIL import Image

from facemllm.core import bombs, images
from facemllm.core.images import BadPicture, TooLarge, TooSlow
from tests.pictures import encode, png_chunk, png_of, progressive, repeated_scans
from tests.refusing import refuses

SIDE = 4000


def segment(kind, body):
    return bytes([0xFF, kind]) + struct.pack(">H", len(body) + 2) + body


@cache
def plain(size=(64, 48)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def after(data, start, extra):
    return data[:start] + extra + data[start:]


@pytest.fixture(scope="module")
def many_scans():
    """The bomb that stopped the server: one scan of a 16-megapixel picture again and again."""
    return repeated_scans(progressive(SIDE), 1500)


def test_a_small_jpeg_of_very_many_scans_is_refused_without_decoding(many_scans, monkeypatch):
    monkeypatch.setattr(Image, "open", None)  # the decoder is never asked
    assert len(many_scans) < 200_000
    line = "a JPEG with more than 1,536,000,000 samples in its scans together; save a plain JPEG"
    assert refuses(None, images.opened, many_scans, error=TooLarge) == line
    small = repeated_scans(progressive(64), 200)
    assert refuses(None, images.opened, small, error=TooLarge) == "a JPEG with more than 200 scans; save a plain JPEG"
    line = "a JPEG with more than 24,000,000 samples in its scans together; save a plain JPEG"
    assert refuses(None, images.checked, repeated_scans(progressive(1000), 30), 1000 * 1000, error=TooLarge) == line


def test_the_bomb_is_one_that_a_decoder_would_have_decoded():
    """Else the refusal would prove nothing: with fewer scans the same construction is a picture."""
    assert Image.open(io.BytesIO(repeated_scans(progressive(256), 300))).load() is not None
    assert images.opened(repeated_scans(progressive(256), 90)).size == (256, 256)


@pytest.mark.parametrize("subsampling", [0, 2])
def test_ordinary_progressive_jpegs_pass_at_the_full_size(subsampling):
    data = encode(plain((300, 300)), "JPEG", progressive=True, subsampling=subsampling)
    assert images.opened(data, 300 * 300).size == (300, 300)
    assert images.opened(repeated_scans(progressive(400), 90), 1000 * 1000).size == (400, 400)


def test_scans_are_counted_up_to_the_end_of_the_picture_only():
    """What follows it (depth and gain maps of phones) is not decoded."""
    data = progressive(64)
    assert images.opened(data + data * 300).size == (64, 64)


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        (segment(0xE5, b"") * 3000, "a JPEG with more than 2,000 segments; save it without metadata"),
        (segment(0xFE, b"x") * 3000, "a JPEG with more than 2,000 segments; save it without metadata"),
        (segment(0xE2, b"ICC_PROFILE\0\1\1") * 3000, "a JPEG with more than 2,000 segments; save it without metadata"),
        (segment(0xE1, b"Exif\0\0II") * 40, "a JPEG with more than 32 segments of EXIF; save it without metadata"),
        (b"\0" * 70_000, "a JPEG with more than 65,536 bytes between its segments; save it without metadata"),
        (b"\xff" * 70_000, "a JPEG with more than 65,536 bytes between its segments; save it without metadata"),
    ],
    ids=["segments", "comments", "profiles", "exif", "junk", "padding"],
)
def test_what_pillow_reads_one_by_one_in_a_jpeg_is_counted(extra, line):
    assert refuses(None, images.opened, after(encode(plain(), "JPEG"), 20, extra), error=TooLarge) == line


def test_junk_without_an_end_is_counted_too():
    refuses("more than 65,536 bytes between", images.opened, b"\xff\xd8\xff\xe0\0\2" + bytes(70_000), error=TooLarge)


def test_profiles_and_metadata_of_ordinary_size_pass():
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    data = encode(plain(), "JPEG", icc_profile=bytes(3_000_000), exif=exif, comment=b"y" * 60_000)
    assert images.opened(data).size == (64, 48)
    data = encode(plain(), "JPEG", restart_marker_blocks=1)  # a restart is a marker, but no segment
    assert data.count(b"\xff\xd0") == 2
    assert images.opened(data).size == (64, 48)


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt"])
def test_compressed_chunks_of_a_png_are_counted(kind):
    head = {b"iCCP": b"a\0\0", b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0"}[kind]
    small = png_chunk(kind, head + zlib.compress(bytes(2**20 - 1), 9))
    data = encode(plain())
    assert images.opened(after(data, 33, small * 10)).size == (64, 48)
    line = "a PNG with more than 64 compressed profiles and texts; save it without metadata"
    assert refuses(None, images.opened, after(data, 33, small * 65), error=TooLarge) == line
    assert refuses(None, images.opened, after(data, len(data) - 12, small * 65), error=TooLarge) == line


def test_chunks_of_a_png_are_counted():
    line = "a PNG with more than 20,000 chunks; save it without metadata"
    many = after(encode(plain()), 33, png_chunk(b"abCd", b"") * 20_000)
    assert refuses(None, images.opened, many, error=TooLarge) == line


def test_data_behind_the_pixels_of_a_png_cost_nothing():
    assert images.opened(png_of(8, 8, bytes(16 * 2**20))).size == (8, 8)


def test_chunks_of_a_webp_are_counted_and_frames_seen_before_its_decoder_opens_it(monkeypatch):
    moving = encode(plain(), "WEBP", save_all=True, append_images=[Image.new("RGB", (64, 48))])
    many = after(encode(plain(), "WEBP", exif=b"Exif\0\0II*\0\10\0\0\0\0\0"), 30, b"abcd\0\0\0\0" * 3000)
    monkeypatch.setattr(Image, "open", None)
    assert refuses(None, images.checked, moving, error=BadPicture) == "an animated picture; only still ones are read"
    line = "a WebP with more than 2,000 chunks; save it without metadata"
    assert refuses(None, images.checked, many, error=TooLarge) == line


def test_an_exif_directory_that_names_the_same_bytes_again_and_again_is_harmless():
    """Pillow bounds it; were it not so, this would hold 3 GB."""
    size, entries = 60_000, 50_000 // 12
    body = b"".join(struct.pack("<HHLL", tag, 2, size, 8) for tag in range(entries))
    exif = b"Exif\0\0II*\0\10\0\0\0" + struct.pack("<H", entries) + body
    data = encode(plain(), "JPEG", exif=exif.ljust(size, b"x"))
    with pytest.warns(UserWarning, match="larger than file"):
        assert images.opened(data).size == (64, 48)


def test_run_length_bmps_are_small():
    head = b"BM" + struct.pack("<IHHI", 0, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 8, 1, 0, 0, 0, 0, 0)
    line = "a run-length encoded BMP with more than 4,194,304 bytes; save it as PNG"
    assert refuses(None, images.opened, head.ljust(bombs.MAX_RLE_BYTES + 1, b"\0"), error=TooLarge) == line


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP"])
def test_decoding_is_given_up_when_the_time_is_over(form):
    data = encode(plain((300, 300)), form)
    assert images.opened(data, deadline=time.monotonic() + 60).size == (300, 300)
    image = images.checked(data, deadline=time.monotonic() + 60)
    image.fp.deadline = 0.0  # over once the header was read
    with pytest.raises(TooSlow, match="decoding it takes too long"):
        image.load()
    refuses("decoding it takes too long", images.opened, data, deadline=0.0, error=TooSlow)


def test_sixteen_bit_grey_comes_out_as_before():
    values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    wanted = (values.astype(np.float64) / 257).clip(0, 255).round().astype(np.uint8)
    assert np.array_equal(np.asarray(images.opened(encode(Image.fromarray(values))))[..., 0], wanted)
