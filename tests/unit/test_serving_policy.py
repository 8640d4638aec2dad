"""What a request may hold, batching, the rule for answers, and which model directories are served."""

import asyncio
import base64
import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from facemllm.serve import server
from facemllm.serve.doors.instances import read_request
from facemllm.serve.guard.bodies import BodyLimit
from facemllm.serve.guard.images import decode, decode_map, read_image, read_map
from facemllm.serve.language import Limits, Refused
from facemllm.tasks.answers import answer
from facemllm.tasks.base import Option, Question
from tests.pictures import encode, png_of

LIMITS = Limits(max_body_mb=1, max_pixels=1_000_000, max_question_chars=100, max_instances=4)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    return base64.b64encode(encode(image, kind, **options)).decode()


def plain(size: tuple[int, int] = (32, 48), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, "black" if mode != "RGBA" else (0, 0, 0, 0))


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", "RGB"), ("JPEG", "RGB"), ("WEBP", "RGB"), *(("PNG", mode) for mode in ("L", "P", "1", "RGBA", "I;16"))],
)
def test_pictures_are_known_by_their_content_and_become_rgb(kind: str, mode: str):
    image = read_image(encoded(plain(mode=mode), kind), "image", LIMITS)
    assert (image.width, image.height) == (32, 48)
    assert (decode(image).mode, decode(image).size) == ("RGB", (32, 48))


def test_a_turned_picture_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(read_image(encoded(plain(), "JPEG", exif=exif), "image", LIMITS)).size == (48, 32)


@pytest.mark.parametrize("lossless", [False, True])
def test_a_large_webp_is_refused_before_its_decoder_sees_it(lossless: bool, monkeypatch: pytest.MonkeyPatch):
    text = encoded(plain((1200, 1000)), "WEBP", lossless=lossless)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(Refused, match="1200x1000") as refusal:
        read_image(text, "image", LIMITS)
    assert refusal.value.status == 413


def faces_map(size: tuple[int, int] = (32, 48), value: int = 3, mode: str = "L") -> Image.Image:
    image = Image.new(mode, size, value)
    if mode == "P":
        image.putpalette(list(range(57)))
    return image


def with_map(text: Any, **fields: Any) -> dict[str, Any]:
    return {"instances": [{"image": {"b64": encoded(plain())}, "question": "q", "segmentation": text, **fields}]}


@pytest.mark.parametrize("mode", ["L", "P"])
def test_a_map_of_class_numbers_is_taken(mode: str):
    (ask,) = read_request(with_map({"b64": encoded(faces_map(mode=mode))}, characteristics=True), LIMITS)
    assert ask.characteristics
    assert ask.map is not None
    classes = decode_map(ask.map, plain())
    assert (classes.shape, classes.min(), classes.max()) == ((48, 32), 3, 3)
    assert decode_map(ask.map, plain((64, 96))).shape == (48, 32)  # the same proportions will do


@pytest.mark.parametrize(
    ("segmentation", "status", "line"),
    [
        ("AAAA", 422, r'must be \{"b64"'),
        ({"b64": 7}, 422, r'must be \{"b64"'),
        ({"b64": "%%%"}, 400, "not valid base64"),
        ({"b64": encoded(faces_map(), "BMP")}, 422, "is a BMP; a map of face parts has to be a PNG"),
        ({"b64": encoded(plain())}, 422, "one 8-bit class number a pixel"),
        ({"b64": encoded(faces_map(value=1, mode="1"))}, 422, "one 8-bit class number a pixel"),
        ({"b64": encoded(faces_map(mode="I;16"))}, 422, "one 8-bit class number a pixel"),
        ({"b64": encoded(faces_map((2000, 2000)))}, 413, "too large"),
    ],
)
def test_what_is_no_map_is_refused_in_one_line(segmentation: Any, status: int, line: str):
    read_request(with_map({"b64": encoded(faces_map((900, 900)))}), LIMITS)  # not yet too large
    with pytest.raises(Refused, match=line) as refusal:
        read_request(with_map(segmentation), LIMITS)
    assert refusal.value.status == status


def test_grey_values_of_four_bits_are_no_class_numbers():
    data = png_of(32, 48, (b"\0" + b"\x11" * 16) * 48, depth=4, color=0)
    with pytest.raises(Refused, match="one 8-bit class number a pixel"):
        read_map(base64.b64encode(data).decode(), "map", LIMITS)


def test_a_map_has_to_fit_its_picture_and_hold_known_classes():
    whole = base64.b64decode(encoded(Image.radial_gradient("L").resize((32, 48))))
    for text, line in (
        (encoded(faces_map((48, 32))), "48x32 pixels, the image 32x48: other proportions"),
        (encoded(faces_map(value=19)), "holds the class 19; there are 19, from 0 to 18"),
        (base64.b64encode(whole[: len(whole) // 2]).decode(), "damaged"),
    ):
        with pytest.raises(Refused, match=line) as refusal:
            decode_map(read_map(text, "map", LIMITS), plain())
        assert refusal.value.status == 422


def test_maps_count_as_pixels_and_scores_are_asked_for_plainly():
    small = Limits(max_body_mb=1, max_pixels=2000, max_question_chars=100, max_instances=4)
    with pytest.raises(Refused, match="hold 3072 pixels"):
        read_request(with_map({"b64": encoded(faces_map())}), small)
    with pytest.raises(Refused, match="characteristics must be true or false"):
        read_request(with_map({"b64": encoded(faces_map())}, characteristics="yes"), LIMITS)


def test_an_animation_is_refused():
    frames = [plain(), Image.new("RGB", (32, 48), "red")]
    with pytest.raises(Refused, match="animated"):
        read_image(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]), "image", LIMITS)


def test_pixels_count_over_a_whole_request_and_each_picture_once():
    large, other = plain((800, 800)), Image.new("RGB", (800, 800), "red")
    same = [{"image": {"b64": encoded(large)}, "question": f"q{n}"} for n in range(3)]
    assert len({ask.image.digest for ask in read_request({"instances": same}, LIMITS)}) == 1
    with pytest.raises(Refused, match="hold 1280000 pixels"):
        read_request({"instances": [*same, {"image": {"b64": encoded(other)}, "question": "q"}]}, LIMITS)


def test_a_chat_gives_its_image_and_its_turns():
    image = {"type": "image", "b64": encoded(plain())}
    messages = [
        {"role": "user", "content": [image, {"type": "text", "text": " one "}]},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    (ask,) = read_request({"instances": [{"messages": messages}]}, LIMITS)
    assert ask.questions[0].chat == (("user", "one"), ("assistant", "two"), ("user", "three"))
    odd = [{"role": "system", "content": "x"}]
    for wrong in (messages[:2], messages[1:], [*messages, messages[0]], [], "text", odd):
        with pytest.raises(Refused):
            read_request({"instances": [{"messages": wrong}]}, LIMITS)


def run_limited(chunks: list[bytes], headers: list[tuple[bytes, bytes]]) -> int:
    queue = [{"type": "http.request", "body": c, "more_body": n < len(chunks) - 1} for n, c in enumerate(chunks)]
    read: list[Any] = []

    async def receive() -> Any:
        read.append(queue[len(read)])
        return read[-1]

    async def app(scope: Any, receive: Any, send: Any):
        while (await receive())["more_body"]:
            pass

    try:
        asyncio.run(BodyLimit(app, 100, 2**20)({"type": "http", "headers": headers}, receive, pytest.fail))
    except Refused as refusal:
        return -refusal.status - len(read)
    return len(read)


def test_bodies_are_cut_off():
    assert run_limited([b"x" * 50, b"x" * 50], []) == 2
    assert run_limited([b"x" * 50, b"x" * 51, b"x"], []) == -413 - 3  # read to the end, so that the client sees why
    assert run_limited([b"x" * 200, b""], [(b"content-length", b"200")]) == -413 - 2
    assert run_limited([b"x" * 200], [(b"content-length", b"9999999999")]) == -413  # not this one


@pytest.mark.parametrize(
    ("body", "encoding", "line"),
    [
        (
            gzip.compress(b"{}", mtime=0),
            b"gzip",
            r"the body is compressed \(Content-Encoding: gzip\); send it as plain JSON in UTF-8",
        ),
        (b"{}", b" Br", "compressed"),
        *(
            ("{}".encode(name), b"", "in UTF-16 or UTF-32; send")
            for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32")
        ),
        ("{}".encode("utf-8-sig"), b"identity", ""),
    ],
)
def test_a_body_in_another_form_is_refused_with_what_to_send(body, encoding, line):
    came = []

    async def app(_, receive, __):
        came.append((await receive())["body"])

    async def receive():
        return {"type": "http.request", "body": body}

    async def send(_):
        pass

    async def go():
        headers = [(b"content-encoding", encoding)] if encoding else []
        await BodyLimit(app, 100, 2**20)({"type": "http", "headers": headers}, receive, send)

    if not line:
        asyncio.run(go())
        assert came == [b"{}"]
        return
    with pytest.raises(Refused, match=line) as refusal:
        asyncio.run(go())
    assert (refusal.value.status, came) == (415, [])


def question(form: Any, *values: str) -> Question:
    options = tuple(Option(value=value, text=f"{value} words") for value in values)
    return Question(task="t", item="i", form=form, templates=("?",), options=options)


def test_a_choice_is_its_likeliest_option_a_number_an_expectation_and_a_broken_model_says_nothing():
    found = answer(question("choice", "black", "blond"), [0.3, 0.7], 1)
    assert (found.value, found.text, found.scores) == ("blond", "blond words", {"black": 0.3, "blond": 0.7})
    unread = answer(question("boolean", "yes", "no"), [0.5, 0.5], None)
    assert (unread.value, unread.text) == (None, "yes words")
    assert answer(question("number", "-5", "0", "5"), [0.25, 0.25, 0.5], 2).value == "2.50"
    angle = replace(question("number", "-5", "0", "5"), center="mean")
    assert answer(angle, [0.25, 0.25, 0.5], 2).value == "1.25"
    assert answer(question("number", "-0.001", "0"), [1.0, 0.0], 0).value == "0.00"
    assert answer(question("number", "1", "2"), [0.5, 0.5], None).value is None
    for form in ("choice", "number"):
        assert answer(question(form, "1", "2"), [float("nan"), float("nan")], 0).value is None


def test_a_refused_model_ends_the_server_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert server.main(["--model", str(tmp_path / "none"), "--digest", "x"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
