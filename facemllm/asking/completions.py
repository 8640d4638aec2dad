"""One HTTP request to an OpenAI-compatible endpoint, and what its outcome means.

An endpoint is not trusted: an attempt ends after `timeout_s` seconds in all, however slowly bytes drip; a reply has a
size limit, also when it comes compressed; no redirect is followed. An error may come with any status, 200 included.
Servers differ in what they understand: the request is first made with a JSON schema, if there is one, then plainly,
then with the newer names of parameters. The first form that is answered is kept, beside the account, for all requests
of the job.

Reads the key from the environment, sends it, and keeps it out of every message.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import httpx

from facemllm.asking.requests import Request
from facemllm.core import machine
from facemllm.settings.data import Endpoint, VisionLanguage

MAX_REPLY = 2**20
_MAX_WAIT_S = 120.0
_CONNECT_S = 10.0
_FORMS = tuple((with_schema, newer) for newer in (False, True) for with_schema in (True, False))
_FILTER = re.compile(
    r"content[_ ](?:filter|policy|management)|responsible ?ai|data_?inspection_?failed|flagged|moderation|usage polic"
    r"|safety (?:system|filter|setting|reason)",
    re.IGNORECASE,
)
_LENGTH = re.compile(
    r"context[_ ](?:length|window)|maximum context|max[_ ]model[_ ]len|prompt is too long|too many (?:input )?tokens",
    re.IGNORECASE,
)
_SPENT = re.compile(
    r"insufficient[_ ](?:user[_ ])?(?:quota|balance|credits?|funds)|billing_hard_limit|out of credits"
    r"|credit balance is too low|exceeded your monthly|arrearage",
    re.IGNORECASE,
)
_INFLATED = ("identity", "gzip", "deflate")  # which grow a thousandfold at most, unlike brotli and zstd
_STATUSES = frozenset(map(str, range(400, 600)))
_LONG = re.compile(r"[\w+/=-]{60,}")  # a picture, or a key


@dataclass(frozen=True)
class Answered:
    """An answer that is paid for. `text` is None when it cannot be used, and `error` says why."""

    text: str | None
    error: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish: str = ""


@dataclass(frozen=True)
class Declined:
    """The endpoint will not answer this request. `form`: it did not like the form of it; `filtered`: its content filter
    did not like what is asked; `forbidden`: this request, or all; `long`: it is more than the model reads."""

    reason: str
    form: bool = False
    filtered: bool = False
    forbidden: bool = False
    long: bool = False


@dataclass(frozen=True)
class Again:
    """No answer; asking again may help. `doubt`: it may have been paid for. `everyone`: it is no matter of this row.
    `sent`: it went out."""

    reason: str
    doubt: bool = False
    everyone: bool = False
    after_s: float | None = None
    sent: bool = True


@dataclass(frozen=True)
class Broken:
    """The endpoint will answer no request; `mend` says what to do about it."""

    reason: str
    mend: str = "mend its key or address"


Outcome = Answered | Declined | Again | Broken


class _TooLarge(Exception):
    """An answer over the size limit."""


class Completions:
    """Requests to one endpoint, made while it is `connected`. `form` is the one that it is known to understand."""

    def __init__(
        self, endpoint: Endpoint, model: VisionLanguage, schema: Mapping[str, Any] | None, form: int | None
    ) -> None:
        self.endpoint, self.model, self.schema = endpoint, model, schema
        self.url = str(endpoint.base_url).rstrip("/") + "/chat/completions"
        self._key = key_of(endpoint)
        self._forms = [n for n, (with_schema, _) in enumerate(_FORMS) if not with_schema or schema is not None]
        self.form = form if form in self._forms else None
        self._http: httpx.AsyncClient

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Connections that are used again and again within the block, and closed after it."""
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        parallel, trust_env = self.endpoint.parallel, not is_loopback(self.url)  # proxies never lead back here
        async with httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(None, connect=min(_CONNECT_S, self.endpoint.timeout_s)),
            limits=httpx.Limits(max_connections=parallel, max_keepalive_connections=parallel),
            follow_redirects=False,
            trust_env=trust_env,
            verify=_certificates(trust_env),
        ) as self._http:
            yield

    async def attempt(self, request: Request) -> tuple[Outcome, int]:
        """One request, more only while it is open which form the endpoint understands: the outcome, and how many."""
        first = self._forms[0] if self.form is None else self.form
        outcome = await self._post(request, first)
        if isinstance(outcome, Declined) and outcome.form and first != self.form:
            others = [n for n in self._forms if n != first] if self.form is None else [self.form]
            for posts, other in enumerate(others, start=2):
                second = await self._post(request, other)
                if not (isinstance(second, Declined) and second.form):
                    return second, posts
            return outcome, 1 + len(others)
        return outcome, 1

    async def _post(self, request: Request, form: int) -> Outcome:
        content = json.dumps(self._body(request, *_FORMS[form])).encode()
        headers = {"Idempotency-Key": request.key}
        try:
            async with asyncio.timeout(self.endpoint.timeout_s):
                async with self._http.stream("POST", self.url, content=content, headers=headers) as response:
                    body = await _body_of(response, MAX_REPLY)
                    answered = _read_reply(body) if response.status_code == 200 else None
                    if answered is None:
                        return self._failure(response, body)
        except _TooLarge:
            if response.status_code != 200:
                return self._failure(response, b"")
            answered = Answered(None, f"the reply has more than {MAX_REPLY:,} bytes")
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            return Again(f"no connection ({self._clean(str(error))})", everyone=True, sent=False)
        except TimeoutError:
            return Again(f"no whole answer within {self.endpoint.timeout_s:g} s", doubt=True)
        except (httpx.HTTPError, httpx.StreamError) as error:
            return Again(f"the connection broke ({type(error).__name__})", doubt=True)
        if self.form is None:
            self.form = form
        return answered

    def _body(self, request: Request, with_schema: bool, newer: bool) -> dict[str, Any]:
        urls = ["data:image/jpeg;base64," + base64.b64encode(one).decode("ascii") for one in request.pictures]
        messages: list[dict[str, Any]] = [{"role": m["role"], "content": m["text"]} for m in request.messages]
        first = next(message for message in messages if message["role"] == "user")
        pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        first["content"] = [*pictures, {"type": "text", "text": first["content"]}]
        body: dict[str, Any] = {"model": self.model.model, "messages": messages}
        if newer:  # models that reason: no temperature, and the tokens of an answer go by another name
            body["max_completion_tokens"] = self.model.max_tokens
        else:
            body |= {"max_tokens": self.model.max_tokens, "temperature": self.model.temperature}
        if with_schema:
            schema = {"name": "face", "strict": True, "schema": self.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    def _failure(self, response: httpx.Response, body: bytes) -> Outcome:
        """What an answer without a completion means, by its status, or by the one that its error states."""
        status, doubt = response.status_code, response.status_code == 200
        if 300 <= status < 400:
            return Declined(f"{status}: it redirects, and no redirect is followed")
        error, stated = _error_of(body)
        said = self._clean(error)
        text = f"{status}: {said}" if said else f"{status} {response.reason_phrase}".strip()
        if doubt:
            status = stated or status
            text = f"its answer is no chat completion ({said or 'it is empty'})"
        whole = body.decode("utf-8", "replace") if not doubt or stated is not None else ""
        if _SPENT.search(whole):
            return Broken(text, "its quota or credit is used up; renew it there, and run again to go on")
        if status in (401, 402, 404, 405, 407):
            return Broken(text)
        if status == 429:
            return Again(text, doubt, everyone=True, after_s=_retry_after(response))
        filtered = _FILTER.search(whole) is not None
        if status in (408, 409, 425) or status >= 500 or (status < 400 and not filtered):
            return Again(text, doubt, after_s=_retry_after(response))
        plain = not filtered
        long = plain and status in (400, 413, 422) and _LENGTH.search(whole) is not None
        return Declined(text, plain and status in (400, 422) and not long, filtered, plain and status == 403, long)

    def _clean(self, text: str) -> str:
        """Words of a stranger in one short line, without keys or pictures that it may repeat."""
        if self._key:
            text = text.replace(self._key, "...")
        text = _LONG.sub("...", "".join(c if c.isprintable() else " " for c in text))
        return " ".join(text.split())[:200]


def key_of(endpoint: Endpoint) -> str:
    """The key of the endpoint in this process's environment; empty without one."""
    return os.environ.get(endpoint.key_variable, "").strip()


def is_loopback(url: str) -> bool:
    """Whether an address is of this machine itself."""
    return machine.is_loopback(urlsplit(url).hostname or "")


@cache
def _certificates(trust_env: bool) -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=trust_env)


async def _body_of(response: httpx.Response, limit: int) -> bytes:
    if response.headers.get("content-encoding", "identity").strip().lower() not in _INFLATED:
        raise httpx.DecodingError("compressed in a way that nobody asked for")
    data = bytearray()
    async for chunk in response.aiter_bytes():
        data += chunk
        if len(data) > limit:
            raise _TooLarge
    return bytes(data)


def _read_reply(data: bytes) -> Answered | None:
    """The reply in a body; None when there is none, or an error in its place."""
    try:
        answer = json.loads(data)
        choice = answer["choices"][0]
        content = choice["message"].get("content") or choice["message"].get("refusal")
        failed = not content and (answer.get("error") or choice.get("error"))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None
    if isinstance(content, list):
        content = "".join(str(p.get("text") or "") for p in content if isinstance(p, dict))
    if failed or (content is not None and not isinstance(content, str)):
        return None
    usage = answer.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    prompt, completion = (n if isinstance(n, int) and not isinstance(n, bool) and n >= 0 else None for n in counts)
    return Answered(content or "", "", prompt, completion, str(choice.get("finish_reason") or "")[:40])


def _error_of(data: bytes) -> tuple[str, int | None]:
    """What an answer says in place of a reply, from the places where servers put it; and the status that its error
    states, 0 if it states none, None if there is no error."""
    try:
        said: Any = json.loads(data)
    except (ValueError, RecursionError):
        text = data.decode("utf-8", "replace")
        return re.sub(r"<(style|script)\b.*?</\1>|<[^>]*>", " ", text, flags=re.DOTALL | re.IGNORECASE), None
    status = None
    match said:
        case {"error": error} | {"choices": [{"error": error}, *_]} if error:
            stated = error.get("code", error.get("status")) if isinstance(error, dict) else None
            said, status = error, int(str(stated)) if str(stated) in _STATUSES else 0
    for name in ("message", "detail"):
        said = said[name] if isinstance(said, dict) and name in said else said
    return said if isinstance(said, str) else json.dumps(said), status


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the endpoint asks to wait, at most two minutes; None if it does not say."""
    stated = response.headers.get("retry-after", "").strip()
    try:
        seconds = float(stated)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(stated) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0), _MAX_WAIT_S) if seconds == seconds else None
