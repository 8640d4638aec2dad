"""Pictures from outside: what each odd or hostile one becomes, or the exact words with which it is refused."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from facemllm.core import images
from facemllm.core.images import BadPicture, TooLarge
from tests.pictures import encode, png_chunk, png_of
from tests.refusing import refuses

NOT_ONE = "not a JPEG, PNG, WEBP, BMP picture, whatever its name says"
CONVERT = "convert it to JPEG, as with: magick FILE out.jpg"


def plain(color=(200, 30, 60), size=(16, 12)):
    return Image.new("RGB", size, color)


def near(pixel, color, reach=3):
    return all(abs(a - b) <= reach for a, b in zip(pixel, color, strict=True))


def noise():
    return np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)


def webp_header(kind, width, height, length=60):
    """A WebP of a few bytes that claims a size, in one of the three kinds of header."""
    if kind == b"VP8X":
        body = b"\0" * 4 + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif kind == b"VP8L":
        body = b"\x2f" + ((width - 1) | (height - 1) << 14).to_bytes(4, "little")
    else:
        body = b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height)
    head = b"RIFF" + struct.pack("<I", length - 8) + b"WEBP" + kind + struct.pack("<I", length - 20)
    return (head + body).ljust(length, b"\0")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP"])
def test_the_four_formats_come_out_as_rgb(form):
    image = images.opened(encode(plain(), form))
    assert (image.mode, image.size) == ("RGB", (16, 12))
    assert near(image.getpixel((5, 5)), (200, 30, 60), 6)


@pytest.mark.parametrize(
    ("image", "form", "color"),
    [
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", (254, 0, 0)),
        (Image.new("L", (8, 8), 77), "PNG", (77, 77, 77)),
        (Image.new("1", (8, 8), 1), "PNG", (255, 255, 255)),
        (Image.new("LA", (8, 8), (200, 128)), "PNG", (100, 100, 100)),
        (Image.new("RGBA", (8, 8), (200, 100, 50, 0)), "PNG", (0, 0, 0)),
        (Image.new("RGBA", (8, 8), (200, 100, 50, 128)), "WEBP", (100, 50, 25)),
        (Image.fromarray(np.full((8, 8), 65535, np.uint16)), "PNG", (255, 255, 255)),
        (Image.fromarray(np.full((8, 8), 32896, np.uint16)), "PNG", (128, 128, 128)),
        (Image.fromarray(np.full((8, 8), 200, np.uint16)), "PNG", (1, 1, 1)),
    ],
    ids=["cmyk", "grey", "bilevel", "grey and alpha", "clear", "half clear", "16 bit", "16 bit, half", "16 bit, dark"],
)
def test_other_modes_are_converted_and_transparency_laid_on_black(image, form, color):
    taken = images.opened(encode(image, form))
    assert taken.mode == "RGB"
    assert near(taken.getpixel((4, 4)), color)


def test_transparent_colours_of_palettes_and_of_rgb_are_laid_on_black():
    palette, keyed = Image.new("P", (2, 1)), plain((1, 2, 3), (2, 1))
    palette.putpalette([250, 10, 20, 10, 200, 30])
    palette.putpixel((1, 0), 1)
    keyed.putpixel((1, 0), (9, 8, 7))
    for image, clear, other in ((palette, 0, (10, 200, 30)), (keyed, (1, 2, 3), (9, 8, 7))):
        taken = images.opened(encode(image, transparency=clear))
        assert [taken.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), other]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(form):
    image = Image.new("RGB", (40, 20))
    image.paste((255, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: what is left comes to the top
    taken = images.opened(encode(image, form, exif=exif))
    assert taken.size == (20, 40)
    assert near(taken.getpixel((10, 5)) + taken.getpixel((10, 35)), (255, 0, 0, 0, 0, 0), 6)


def test_nothing_but_pixels_leaves():
    exif = Image.Exif()
    exif[0x010E] = "secret words"
    data = encode(plain(), "JPEG", comment=b"secret words", exif=exif, icc_profile=b"secret words" * 20)
    assert data.count(b"secret words") == 22
    left = images.encoded(images.opened(data + b"PK\x03\x04 secret words"))
    assert b"secret" not in left
    assert set(Image.open(io.BytesIO(left)).info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


def test_the_first_picture_of_a_cameras_multi_picture_jpeg_is_taken():
    data = encode(plain((200, 30, 60)), "MPO", save_all=True, append_images=[plain((0, 0, 0))])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert near(images.opened(data).getpixel((5, 5)), (200, 30, 60))


@pytest.mark.parametrize("form", ["WEBP", "PNG"])
def test_animated_pictures_are_refused(form):
    data = encode(plain(), form, save_all=True, append_images=[plain((0, 0, 0))])
    refuses(r"^an animated picture; only still ones are read$", images.opened, data, error=BadPicture)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"PK\x03\x04rest of an archive", f"{NOT_ONE} (it looks like a ZIP archive)"),
        (encode(plain(), "GIF"), f"{NOT_ONE} (it looks like a GIF; {CONVERT})"),
        (
            encode(plain(), "GIF", save_all=True, append_images=[plain((0, 0, 0))]),
            f"{NOT_ONE} (it looks like a GIF; {CONVERT})",
        ),
        (encode(plain(), "TIFF"), f"{NOT_ONE} (it looks like a TIFF; {CONVERT})"),
        (b"<!doctype html>", f"{NOT_ONE} (it looks like a text or web page)"),
        (b"%PDF-1.7", f"{NOT_ONE} (it looks like a PDF)"),
        (b"\0" * 100, NOT_ONE),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", f"{NOT_ONE} (it looks like a HEIC; {CONVERT})"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif", f"{NOT_ONE} (it looks like an AVIF; {CONVERT})"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp42", f"{NOT_ONE} (it looks like a video)"),
        (encode(plain(), "AVIF"), f"{NOT_ONE} (it looks like an AVIF; {CONVERT})"),
        (encode(plain(), "JPEG2000"), f"{NOT_ONE} (it looks like a JPEG 2000; {CONVERT})"),
        (b"\xff\xd8\xff", f"{NOT_ONE} (it looks like a JPEG cut short)"),
        (encode(plain(), "PNG")[:30], f"{NOT_ONE} (it looks like a PNG cut short)"),
    ],
)
def test_what_is_no_picture_is_refused_by_its_content(data, reason):
    assert refuses(None, images.opened, data, error=BadPicture) == reason


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP"])
def test_truncated_and_damaged_pictures_are_refused(form):
    data = bytearray(encode(Image.fromarray(noise()), form))
    refuses(r"^damaged: \S", images.opened, bytes(data[: len(data) // 2]), error=BadPicture)
    data[len(data) // 2] ^= 0xFF
    if form == "PNG":  # the others have no checksum
        refuses(r"^damaged: \S", images.opened, bytes(data), error=BadPicture)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png_of(100_000, 100_000), "more than 64,000,000 pixels"),
        (png_of(8001, 8000), "8001x8000 pixels, more than 64,000,000 in all"),
        (webp_header(b"VP8X", 16384, 16384), "16384x16384 pixels, more than 64,000,000 in all"),
        (webp_header(b"VP8L", 16384, 16384), "16384x16384 pixels, more than 64,000,000 in all"),
        (webp_header(b"VP8L", 16384, 16384, 27), "16384x16384 pixels, more than 64,000,000 in all"),
        (webp_header(b"VP8 ", 16383, 16383), "16383x16383 pixels, more than 64,000,000 in all"),
    ],
)
def test_decompression_bombs_are_refused_by_their_header(data, reason):
    assert refuses(None, images.opened, data, error=TooLarge) == reason


def test_a_bomb_inside_a_png_is_refused():
    """A text chunk that unpacks to far more than the picture itself."""
    data = encode(plain())
    bomb = png_chunk(b"zTXt", b"key\0\0" + zlib.compress(b"\0" * 2**21))
    refuses(r"^damaged: ", images.opened, data[:33] + bomb * 40 + data[33:], error=BadPicture)


def test_limits_are_exact():
    data = encode(plain(size=(20, 10)))
    assert images.opened(data, max_pixels=200).size == (20, 10)
    refuses("20x10 pixels, more than 199 in all", images.opened, data, max_pixels=199, error=TooLarge)
    with pytest.raises(TooLarge, match="the file has 67,108,865 bytes, more than 67,108,864"):
        images.checked(bytes(images.MAX_BYTES + 1))


def test_a_header_is_looked_at_without_decoding():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = images.checked(encode(plain(), "JPEG")[:-10])
    assert (image.format, image.size) == ("JPEG", (16, 12))


def test_the_perceptual_hash_is_the_one_that_tombstones_hold():
    across, down = np.meshgrid(np.arange(96), np.arange(64))
    drawn = np.stack([across * 2, down * 3, (across * down) % 256], axis=-1).astype(np.uint8)
    stored = "8000006f05ff0ffe17f81fc03f013e077e1f3c3f783c78f870f070e371c36387"
    assert images.perceptual_hash(Image.fromarray(drawn)).hex() == stored
