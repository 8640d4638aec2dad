"""Who may read and post: one printed link, sessions, and a guard that every request passes before any page.

The guard refuses a Host it does not know (a name of another's that resolves to this machine), a POST from another
origin, a body beyond `MOST_BODY`, and everyone without a session but for the style sheet and the login. What it lets
through is answered with headers that forbid scripts, frames, other origins and caches.
"""

from __future__ import annotations

import hmac
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request, cookie_parser
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from facemllm.report import web

MOST_BODY = 32 * 1024
"""Bytes of a form; a reason of 2,000 characters, each written as 12 bytes, fits."""
MOST_FIELDS = 8
SESSION_S = 8 * 3600.0
OFFER_S = 600.0
"""How long what was shown on the last page before signing can be signed."""
_MOST_SESSIONS, _MOST_OFFERS = 64, 16
OPEN = ("/login", "/style.css")
HEADERS = web.headers()


class Turned(Exception):
    """A request that gets no page but one line saying why, with an HTTP status."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


@dataclass
class Session:
    """One browser: its form token, and what it was last offered to sign, by number, with the time until which."""

    csrf: str
    until: float
    offers: dict[str, tuple[float, object]] = field(default_factory=dict)


class Sessions:
    """Sessions by their cookie, in memory. The printed token opens one session; any number where it may be reused."""

    def __init__(self, reusable: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.token = secrets.token_urlsafe(32)
        self._reusable, self._clock = reusable, clock
        self._spent = False
        self._open: dict[str, Session] = {}
        self._lock = threading.Lock()

    def enter(self, token: str) -> str | None:
        """The cookie of a new session, if this is the printed token and it still opens one."""
        with self._lock:
            if not same(token, self.token) or self._spent:
                return None
            self._spent = not self._reusable
            now = self._clock()
            self._open = {cookie: one for cookie, one in self._open.items() if one.until > now}
            while len(self._open) >= _MOST_SESSIONS:
                del self._open[next(iter(self._open))]
            cookie = secrets.token_urlsafe(32)
            self._open[cookie] = Session(secrets.token_urlsafe(32), now + SESSION_S)
            return cookie

    def find(self, cookie: str | None) -> Session | None:
        """The session of a cookie, unless it ended."""
        found = self._open.get(cookie or "")
        return found if found is not None and found.until > self._clock() else None

    def offer(self, session: Session, what: object) -> str:
        """Keep what a page offers to sign; returns the number that the page's form sends back."""
        with self._lock:
            while len(session.offers) >= _MOST_OFFERS:
                del session.offers[next(iter(session.offers))]
            number = secrets.token_urlsafe(16)
            session.offers[number] = (self._clock() + OFFER_S, what)
            return number

    def offered(self, session: Session, number: str) -> object | None:
        """What was offered under a number, if not too long ago."""
        until, what = session.offers.get(number, (0.0, None))
        return what if until > self._clock() else None

    def withdraw(self, session: Session, number: str) -> bool:
        """Take an offer away; whether it was still there. Of two posts of one form, one gets True."""
        with self._lock:
            return session.offers.pop(number, None) is not None


def same(given: str, known: str) -> bool:
    """Whether two secrets are equal, in a time that does not tell."""
    return hmac.compare_digest(given.encode(errors="replace"), known.encode())


class Guard:
    """The first to see a request. `hosts` are the names and ports it may be asked under; what it refuses is written by
    `error_page(status, why)`."""

    def __init__(
        self,
        app: ASGIApp,
        sessions: Sessions,
        hosts: Sequence[str],
        cookie: str,
        error_page: Callable[[int, str], Response],
    ) -> None:
        self.app, self.sessions, self.cookie, self.error_page = app, sessions, cookie, error_page
        self.hosts = frozenset(name.lower() for name in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        try:
            self._admit(scope)
        except Turned as refused:
            await self.error_page(refused.status, refused.why)(scope, receive, headed)
            return
        await self.app(scope, receive, headed)

    def _admit(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.getlist("host")
        if len(host) != 1 or host[0].lower() not in self.hosts:
            raise Turned(421, "this server does not answer under that name; open the address that the command printed")
        if scope["method"] not in ("GET", "HEAD", "POST"):
            raise Turned(405, "this page is read with GET and decided on with POST")
        if scope["method"] == "POST":
            origins = headers.getlist("origin")
            if origins not in ([f"http://{host[0].lower()}"], [f"https://{host[0].lower()}"]):
                raise Turned(403, "that form came from another site; nothing was done")
            if headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
                raise Turned(415, "a decision is posted as a form; use the one on the page")
        cookies = cookie_parser(headers.get("cookie", "")[:4096])
        scope["review.session"] = found = self.sessions.find(cookies.get(self.cookie))
        if found is None and scope["path"] not in OPEN:
            raise Turned(401, "no session: open the link that `facemllm review` printed when it started")


def session_of(request: Request) -> Session:
    """The session that the guard found. Raises Turned where there is none."""
    found = request.scope.get("review.session")
    if not isinstance(found, Session):
        raise Turned(401, "no session: open the link that `facemllm review` printed when it started")
    return found


async def form_of(request: Request) -> Mapping[str, str]:
    """The fields of a posted form, whose token is this session's. Raises Turned for anything else."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BODY:
            raise Turned(413, f"a form of more than {MOST_BODY:,} bytes; write a shorter reason")
    try:
        pairs = parse_qsl(
            body.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=True,
            errors="strict",
            max_num_fields=MOST_FIELDS,
        )
    except ValueError:
        raise Turned(400, "that form cannot be read; use the one on the page") from None
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise Turned(400, "a field stands twice in that form; use the one on the page")
    if not same(fields.pop("csrf", ""), session_of(request).csrf):
        raise Turned(403, "that form is not of this session; open the page again, nothing was done")
    return fields
