"""Requests that nobody should send, the same ones for the same seed: mutated pictures, bodies, tensors, messages.

Each case is made from its seed and number alone, so a failing one can be made again: `case(seed, number)`.
"""

from __future__ import annotations

import base64
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from tests.pictures import encode, png_of, progressive, repeated_scans

DOORS = ("v1", "tasks", "chat", "v2", "v2 binary", "grpc")
JSON = {"Content-Type": "application/json"}
MODEL = "face-mllm"
HAT = "Is the person wearing a hat?"


@dataclass(frozen=True)
class Case:
    """A request: over HTTP by POST, or over gRPC as the bytes of a message to `path`."""

    door: str
    number: int
    path: str
    body: bytes = field(repr=False)
    headers: dict[str, str] = field(default_factory=lambda: dict(JSON))


def case(seed: int, number: int) -> Case:
    """The case of this number."""
    rng = random.Random(f"{seed}:{number}")
    door = rng.choice(DOORS)
    return _MAKERS[door](rng, number)


def good(door: str, picture: bytes | None = None) -> Case:
    """A request to a door as it should be."""
    return _MAKERS[door](None, -1, picture or _pictures()[0])


@cache
def _pictures() -> tuple[bytes, ...]:
    """Whole pictures of every format and of odd modes, and some that cost much."""
    noise = np.random.default_rng(0).integers(0, 255, (48, 48, 4), np.uint8)
    rgb, rgba = Image.fromarray(noise[..., :3]), Image.fromarray(noise)
    smooth = Image.radial_gradient("L").resize((64, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    made: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (smooth.convert("RGB"), "PNG", {}),
        (rgb, "JPEG", {}),
        (rgb, "JPEG", {"progressive": True, "exif": exif}),
        (smooth, "JPEG", {"restart_marker_blocks": 2}),
        (rgb.convert("CMYK"), "JPEG", {}),
        (rgba, "PNG", {}),
        (rgb.quantize(16), "PNG", {}),
        (Image.fromarray(noise[..., 0].astype(np.uint16) * 257), "PNG", {}),
        (smooth.convert("1"), "PNG", {}),
        (rgb, "WEBP", {}),
        (rgba, "WEBP", {"lossless": True, "exif": exif}),
        (rgb, "WEBP", {"save_all": True, "append_images": [smooth.convert("RGB").resize((48, 48))]}),
        (rgb, "PNG", {"save_all": True, "append_images": [smooth.convert("RGB").resize((48, 48))]}),
        (rgb, "BMP", {}),
        (smooth, "BMP", {}),
        (rgb, "GIF", {}),
        (rgb, "MPO", {"save_all": True, "append_images": [smooth.convert("RGB")]}),
    ]
    return (
        *(encode(image, form, **options) for image, form, options in made),
        repeated_scans(progressive(512), 900),
        repeated_scans(progressive(512), 60),
        png_of(60_000, 60_000, bytes(1000)),
    )


def bytes_of(rng: random.Random, data: bytes) -> bytes:
    """Bytes changed in one of the ways in which files break, or are broken."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at = rng.randrange(len(found) + 1)
        size = rng.choice((1, 2, 4, 16, 256))
        match rng.randrange(8):
            case 0 if found:
                found[at % len(found)] ^= 1 << rng.randrange(8)
            case 1:
                del found[at:]
            case 2:
                found[at:at] = rng.randbytes(size)
            case 3:
                del found[at : at + size]
            case 4:
                found[at : at + size] = rng.choice((b"\0", b"\xff", b"\x7f", b"[", b'"')) * size
            case 5:
                found[at:at] = found[at : at + size] * rng.choice((2, 50))
            case 6:
                found[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0"))
            case _:
                other = rng.choice(_pictures())
                found[at:] = other[rng.randrange(len(other)) :]
    return bytes(found[: 2**19])


def picture(rng: random.Random) -> bytes:
    """A picture, most often a broken one. In its first bytes the size and the sense of the rest are said."""
    data = rng.choice(_pictures())
    if rng.random() < 0.1:
        return data
    if rng.random() < 0.5:
        return bytes_of(rng, data)
    cut = rng.choice((32, 64, 200))
    return bytes_of(rng, data[:cut])[: cut + 64] + data[cut:]


def _odd(rng: random.Random) -> Any:
    odd: Callable[[], Any] = rng.choice(
        (
            lambda: None,
            lambda: rng.choice((True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -1e300)),
            lambda: rng.choice(
                ("", " ", "\0", "é" * 9, "\ud800", "x" * 600, "<image>", "</s>", "../../etc/passwd", "@@@")
            ),
            lambda: [],
            dict,
            lambda: [[[[0]]]],
            lambda: {"b64": base64.b64encode(picture(rng)).decode()},
            lambda: {"url": "http://127.0.0.1:9/"},
            lambda: [HAT] * rng.choice((2, 40)),
        )
    )
    return odd()


def tree(rng: random.Random, value: Any) -> Any:
    """JSON with one node, some levels down, changed, left out, doubled or put elsewhere."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        changed = dict(value)
        match rng.randrange(12):
            case 0:
                del changed[key]
            case 1:
                changed[rng.choice(("id", "x", "parameters", key.upper()))] = _odd(rng)
            case _:
                changed[key] = tree(rng, value[key])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        match rng.randrange(8):
            case 0:
                return value[:at]
            case 1:
                return [*value, *value * rng.choice((1, 12))]
            case _:
                return [*value[:at], tree(rng, value[at]), *value[at + 1 :]]
    return _odd(rng)


def _b64(rng: random.Random | None, whole: bytes | None) -> str:
    data = whole if rng is None else rng.choice((picture(rng), _pictures()[0]))
    assert data is not None
    return base64.b64encode(data).decode()


def _written(rng: random.Random | None, body: Any) -> bytes:
    """A body as text: its tree changed, or its bytes, or neither (then the picture is)."""
    if rng is None or (way := rng.random()) < 0.35:
        return json.dumps(body).encode()
    if way < 0.8:
        return json.dumps(tree(rng, body)).encode()
    if way < 0.95:
        return bytes_of(rng, json.dumps(body).encode())
    odd = (
        b"[" * 50_000,
        b'{"a":' * 500,
        b'{"instances": NaN}',
        b'{"instances": [1e999]}',
        b'{"instances": [], "instances": [{}]}',
        b"\xef\xbb\xbf{}",
        json.dumps(body).encode("utf-16"),
        b"",
        b"[" + b"0," * 60_000 + b"0]",
    )
    return rng.choice(odd)


def _headers(rng: random.Random | None) -> dict[str, str]:
    if rng is None or rng.random() < 0.9:
        return dict(JSON)
    kinds = ("text/plain", "application/x-www-form-urlencoded", "application/cloudevents+json", "image/png", "x", "")
    odd = ({"Content-Encoding": "gzip"}, {"ce-specversion": "1.0", "ce-type": "x", "ce-source": "y", "ce-id": "1"}, {})
    return {"Content-Type": rng.choice(kinds), **rng.choice(odd)}


def _v1(rng: random.Random | None, number: int, whole: bytes | None = None) -> Case:
    ways = [{"question": HAT}, {"task": "age"}, {"task": "attributes", "item": "Wearing_Hat"}]
    way = ways[0] if rng is None else rng.choice(ways)
    body = {"instances": [{"image": {"b64": _b64(rng, whole)}, **way}]}
    if rng is not None and rng.random() < 0.1:
        body["instances"][0]["segmentation"] = {"b64": _b64(rng, None)}
    return Case("v1", number, f"/v1/models/{MODEL}:predict", _written(rng, body), _headers(rng))


def _tasks(rng: random.Random | None, number: int, whole: bytes | None = None) -> Case:
    body: dict[str, Any] = {"image": {"b64": _b64(rng, whole)}, "tasks": ["attributes.Wearing_Hat"]}
    if rng is not None and rng.random() < 0.3:
        body |= rng.choice(({"box": [4, 4, 40, 40]}, {"box": [0, 0, 1e308, -1]}, {"min_probability": 0.5}))
    return Case("tasks", number, "/tasks", _written(rng, body), _headers(rng))


def _chat(rng: random.Random | None, number: int, whole: bytes | None = None) -> Case:
    url = f"data:image/png;base64,{_b64(rng, whole)}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": HAT}]
    body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
    if rng is not None and rng.random() < 0.5:
        schema = {"type": "object", "properties": {"hat": {"type": "boolean"}}, "required": ["hat"]}
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        body |= rng.choice(({"stream": True}, {"logprobs": True, "top_logprobs": 2}, {"response_format": wanted}))
    return Case("chat", number, "/v1/chat/completions", _written(rng, body), _headers(rng))


def _v2(rng: random.Random | None, number: int, whole: bytes | None = None) -> Case:
    inputs = [
        {"name": "image", "datatype": "BYTES", "shape": [1], "data": [_b64(rng, whole)]},
        {"name": "question", "datatype": "BYTES", "shape": [1], "data": [HAT]},
    ]
    return Case("v2", number, f"/v2/models/{MODEL}/infer", _written(rng, {"inputs": inputs}), _headers(rng))


def _tensor(*values: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def _v2_binary(rng: random.Random | None, number: int, whole: bytes | None = None) -> Case:
    tensors = [_tensor(whole if rng is None else picture(rng)), _tensor(HAT.encode())]  # type: ignore[arg-type]
    inputs = [
        {"name": name, "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(tensor)}}
        for name, tensor in zip(("image", "question"), tensors, strict=True)
    ]
    head, rest = _written(rng, {"inputs": inputs}), b"".join(tensors)
    length = str(len(head))
    if rng is not None:
        rest = bytes_of(rng, rest) if rng.random() < 0.3 else rest
        length = rng.choice(("0", "-1", "9" * 20, "x", str(len(head) + 1))) if rng.random() < 0.1 else length
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": length}
    return Case("v2 binary", number, f"/v2/models/{MODEL}/infer", head + rest, headers)


def _grpc(rng: random.Random | None, number: int, whole: bytes | None = None) -> Case:
    from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb

    def odd(*values: Any) -> Any:
        return values[0] if rng is None or rng.random() < 0.94 else rng.choice(values)

    contents = [whole if rng is None else picture(rng), HAT.encode()]
    request = pb.ModelInferRequest(model_name=odd(MODEL, "", "other", "x" * 5000), id=odd("1", "", "é" * 999))
    raw = rng is not None and rng.random() < 0.5
    for name, value in zip(("image", "question"), contents, strict=True):
        tensor = request.inputs.add()
        tensor.name, tensor.datatype = odd(name, "", "image", "x" * 999), odd("BYTES", "FP32", "UINT8", "")
        tensor.shape.extend(odd([1], [], [-1], [2**62], [1, 1, 1], [0], [4]))
        if raw:
            request.raw_input_contents.append(odd(_tensor(value), value, b"", b"\xff\xff\xff\xff"))  # type: ignore[arg-type]
        else:
            tensor.contents.bytes_contents.extend(odd([value], [], [value] * 40))
            if rng is not None and rng.random() < 0.1:
                tensor.contents.fp32_contents.extend([float("nan")] * 9)
    message = request.SerializeToString()
    if rng is not None and rng.random() < 0.3:
        message = bytes_of(rng, message)
    methods = ("ModelInfer", "ModelMetadata", "ModelReady", "RepositoryModelLoad", "RepositoryModelUnload", "None")
    method = methods[0] if rng is None or rng.random() < 0.95 else rng.choice(methods)
    return Case("grpc", number, f"/inference.GRPCInferenceService/{method}", message)


_MAKERS: dict[str, Callable[..., Case]] = {
    "v1": _v1,
    "tasks": _tasks,
    "chat": _chat,
    "v2": _v2,
    "v2 binary": _v2_binary,
    "grpc": _grpc,
}
