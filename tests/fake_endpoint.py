"""An OpenAI-compatible endpoint on loopback that misbehaves as it is told, and counts.

    with FakeEndpoint(script=["500", "429:0.2"]) as fake: ... fake.base_url ... fake.received ... fake.completed
    python tests/fake_endpoint.py --latency 0.05        (prints its address; ends when its standard input does)

Behaviours: good · 400 401 403 404 413 429 500 503 (any status) · 429:SECONDS (with Retry-After) · hang · hold (until
`release`) · drip · broken (half of a JSON body) · compressed · huge · redirect · reset (before the answer) · cut (in
the middle of it) · nousage · text:CONTENT (an answer with that content) · wrong (a JSON object of another form) ·
length (cut off by max_tokens), silent (before it said anything), thinks (in a thought) · empty (null, and
stop) · gzip (as it says, unlike `compressed`) · page (HTML)
· error:WHAT (200, with an error of that code or message) · flagged (403) · quota (429)
· long (400, more tokens than it reads).
Each request takes the next behaviour of its key's `plan`, else of the `script`, else `default`.
"""

import argparse
import asyncio
import base64
import contextlib
import gzip
import hashlib
import json
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_PHRASES = {200: "OK", 302: "Found", 400: "Bad Request", 401: "Unauthorized", 429: "Too Many Requests"}
_FLAGGED = {"message": "Your chosen model requires moderation and your input was flagged", "code": 403}
_QUOTA = {"message": "You exceeded your current quota, please check your plan.", "code": "insufficient_quota"}
_LONG = {"message": "This model's maximum context length is 1024 tokens.", "code": 400}
_ERRORS: dict[str, tuple[int, Any]] = {"flagged": (403, {"error": _FLAGGED}), "quota": (429, {"error": _QUOTA})}
_ERRORS["long"] = (400, {"error": _LONG})
_HUGE = 3 * 2**20
PROMPT_TOKENS, COMPLETION_TOKENS = 900, 60


class FakeEndpoint:
    """The server, in a thread of its own. `received` and `completed` count requests and whole answers by their
    Idempotency-Key; `bodies` holds the last body of each key when `keep` is set; `authorizations` what keys were shown.

    `knows_schema: False` answers 400 to a `response_format`, `knows_max_tokens: False` to `max_tokens`.
    """

    def __init__(
        self,
        *,
        latency_s: float = 0.0,
        plan: Mapping[str, Iterable[str]] | None = None,
        script: Iterable[str] = (),
        default: str = "good",
        answer: Callable[[Mapping[str, Any]], str] | None = None,
        knows_schema: bool = True,
        knows_max_tokens: bool = True,
        keep: bool = False,
    ) -> None:
        self.latency_s, self.default = latency_s, default
        self.plan = {key: list(steps) for key, steps in (plan or {}).items()}
        self.script = list(script)
        self.answer = answer or usual_answer
        self.knows_schema, self.knows_max_tokens, self.keep = knows_schema, knows_max_tokens, keep
        self.received: Counter[str] = Counter()
        self.completed: Counter[str] = Counter()
        self.bodies: dict[str, Any] = {}
        self.authorizations: set[str] = set()
        self.in_flight = 0
        self._loop = asyncio.new_event_loop()
        self._released = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "FakeEndpoint":
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def release(self) -> None:
        """Answer what is on hold."""
        self._loop.call_soon_threadsafe(self._released.set)

    async def _start(self) -> asyncio.Server:
        return await asyncio.start_server(self._connection, "127.0.0.1", 0, limit=2**20)

    async def _stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
        data = await reader.readexactly(int(headers.get("content-length", 0)))
        if head[0].startswith("GET"):
            counts = {"received": self.received.total(), "completed": self.completed.total()}
            counts["most"] = max(self.completed.values(), default=0)
            await _send(writer, 200, counts)
            return True
        body, key = json.loads(data), headers.get("idempotency-key", "")
        self.received[key] += 1
        self.authorizations.add(headers.get("authorization", ""))
        if self.keep:
            self.bodies[key] = body
        self.in_flight += 1
        try:
            await asyncio.sleep(self.latency_s)
            return await self._behave(body, key, writer)
        finally:
            self.in_flight -= 1

    async def _behave(self, body: Mapping[str, Any], key: str, writer: asyncio.StreamWriter) -> bool:
        unknown = {"response_format": not self.knows_schema, "max_tokens": not self.knows_max_tokens}
        if any(unknown.get(name) for name in body):
            await _send(writer, 400, {"error": {"message": "unsupported parameter"}})
            return True
        steps = self.plan.get(key) or self.script
        how = steps.pop(0) if steps else self.default
        kind, _, detail = how.partition(":")
        if kind.isdecimal():
            extra = {"Retry-After": detail} if detail else {}
            await _send(writer, int(kind), {"error": {"message": f"told to say {kind}"}}, extra)
            return True
        if kind in _ERRORS:
            await _send(writer, *_ERRORS[kind])
            return True
        if kind == "error":
            named = {"code": int(detail)} if detail.isdecimal() else {"code": detail}
            await _send(writer, 200, {"error": {"message": detail, **named}, "choices": None})
            return True
        if kind == "hang":
            await asyncio.sleep(3600)
        if kind == "hold":
            await self._released.wait()
        if kind == "redirect":
            await _send(writer, 302, {}, {"Location": self.base_url + "/elsewhere"})
            return True
        if kind == "reset":
            _reset(writer)
            return False
        content = {"text": detail, "wrong": '{"description": "a face"}', "huge": "a" * _HUGE}.get(kind)
        answer = completion(self.answer(body) if content is None else content)
        if kind == "nousage":
            del answer["usage"]
        if kind == "length":
            answer["choices"][0] |= {"finish_reason": "length", "message": {"role": "assistant", "content": '{"capt'}}
        if kind == "empty":
            answer["choices"][0]["message"]["content"] = None
        if kind in ("silent", "thinks"):
            said = {"silent": None, "thinks": "<think>Let me look at the picture"}[kind]
            answer["choices"][0] |= {"finish_reason": "length", "message": {"role": "assistant", "content": said}}
        text = b"<html><style>a {}</style><h1>Sign in</h1></html>" if kind == "page" else json.dumps(answer).encode()
        if kind in ("drip", "cut", "broken", "compressed", "gzip", "page"):
            return await _spoil(kind, text, writer)
        await _send(writer, 200, answer)
        self.completed[key] += 1
        return True


def completion(content: str) -> dict[str, Any]:
    """A chat completion with that content."""
    message = {"role": "assistant", "content": content}
    usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": COMPLETION_TOKENS}
    return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}


def usual_answer(body: Mapping[str, Any]) -> str:
    """A sound reply that depends on the picture alone, and states nothing that a label could contradict."""
    (picture,) = (part["image_url"]["url"] for part in body["messages"][1]["content"] if part["type"] == "image_url")
    jpeg = base64.b64decode(picture.partition(",")[2])
    name = hashlib.sha256(jpeg).hexdigest()
    return reply(caption=f"A face before a plain background, in picture {name[:12]}.", Bangs=int(name, 16) % 2 == 0)


def reply(caption: str, expression: Any = None, age: Any = None, gender: Any = None, **attributes: Any) -> str:
    """The content of a reply of the right form."""
    labels = {"expression": expression, "age": age, "gender": gender}
    return json.dumps({"caption": caption, "attributes": attributes, **labels})


async def _spoil(kind: str, text: bytes, writer: asyncio.StreamWriter) -> bool:
    encoding = "Content-Encoding: gzip\r\n" if kind in ("compressed", "gzip") else ""
    sent = text[: len(text) // 2] if kind == "broken" else gzip.compress(text) if kind == "gzip" else text
    writer.write(f"HTTP/1.1 200 OK\r\n{encoding}Content-Length: {len(sent)}\r\n\r\n".encode())
    if kind == "drip":
        for byte in sent:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.05)
    if kind == "cut":
        writer.write(sent[: len(sent) // 2])
        await writer.drain()
        await asyncio.sleep(0.02)
        _reset(writer)
        return False
    writer.write(sent)
    await writer.drain()
    return True


async def _send(
    writer: asyncio.StreamWriter, status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> None:
    data = json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} {_PHRASES.get(status, 'Status')}", f"Content-Length: {len(data)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    writer.write("\r\n".join([*lines, "Content-Type: application/json", "", ""]).encode() + data)
    await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End the connection with RST instead of a polite end."""
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    with FakeEndpoint(latency_s=parser.parse_args().latency) as fake:
        print(json.dumps({"base_url": fake.base_url}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
