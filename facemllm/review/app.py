"""The server of the review page: paths, forms, and one line for whatever goes wrong."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp

from facemllm.errors import UserError, one_line
from facemllm.report.web import plain
from facemllm.review import deciding, render
from facemllm.review.deciding import Changed, Offer
from facemllm.review.fields import is_digest
from facemllm.review.pages import Pages
from facemllm.review.security import Guard, Sessions, Turned, form_of, session_of
from facemllm.review.views import FILES, STATES
from facemllm.settings import Settings
from facemllm.signing import keys, local
from facemllm.signing.statements import Refused

log = logging.getLogger(__name__)

_TYPES = {".json": "application/json", ".md": "text/markdown; charset=utf-8"}
_PICTURES = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png"}
_TITLES = {
    401: "Log in",
    403: "Refused",
    404: "Not here",
    405: "Not possible",
    409: "Changed meanwhile",
    413: "Too long",
}


def application(pages: Pages, sessions: Sessions, hosts: Sequence[str], cookie: str = "facemllm_review") -> ASGIApp:
    """The page as an ASGI application behind its guard; `hosts` are the names (with port) it answers under."""
    site = {"read_only": pages.read_only, "mlflow": pages.mlflow}

    def html(template: str, status: int = 200, **data: Any) -> HTMLResponse:
        return HTMLResponse(render.page(template, site=site, **data), status)

    def error_page(status: int, why: str, back: str = "") -> HTMLResponse:
        title = _TITLES.get(status, "Not possible" if status < 500 else "Failed")
        return html("said.html.jinja", status, title=title, why=plain(one_line(UserError(why))), back=back)

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)

    @app.exception_handler(Turned)
    def _turned(_: Request, error: Turned) -> Response:
        return error_page(error.status, error.why)

    @app.exception_handler(UserError)
    def _refused(request: Request, error: UserError) -> Response:
        missing = isinstance(error, Refused) and error.check == "missing"
        bundle = request.path_params.get("bundle", "")
        back = f"/requests/{bundle}" if request.method == "POST" and is_digest(bundle) else "/"
        return error_page(404 if missing else 409 if isinstance(error, Changed | Refused) else 400, str(error), back)

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(HTTPException)
    def _unknown(_: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 404
        return error_page(status, "there is no such page; the queue lists every request")

    @app.exception_handler(Exception)
    def _failed(request: Request, error: Exception) -> Response:
        log.error("%s %s", request.method, request.url.path, exc_info=error)
        return error_page(500, "this failed; the terminal in which `facemllm review` runs says why")

    @app.get("/login")
    def login(request: Request, token: str = "") -> Response:
        found = sessions.enter(token)
        if found is None:
            raise Turned(403, "that link was used already, or is another server's; start `facemllm review` again")
        answer = html("login.html.jinja")
        secure = request.headers.get("x-forwarded-proto") == "https"
        answer.set_cookie(cookie, found, path="/", httponly=True, samesite="strict", secure=secure)
        return answer

    @app.get("/style.css")
    def style() -> Response:
        return Response(render.STYLE, media_type="text/css")

    @app.get("/")
    def queue(state: str = "waiting", page: str = "1") -> Response:
        if state not in STATES:
            raise Turned(404, f"no such state; there are {', '.join(STATES)}")
        number = int(page) if page.isascii() and page.isdigit() and len(page) < 7 else 1
        return html("queue.html.jinja", queue=pages.queue(state, number))

    @app.get("/requests/{bundle}")
    def request(request: Request, bundle: str, signed: str = "") -> Response:
        shown = pages.request(_known(bundle))
        done = next((one for one in shown.history if one.id == signed and not one.refused), None)
        if done is not None:
            shown = replace(shown, notice=f"Signed: {done.decision} by {done.person}. Statement {done.id[:12]}.")
        return html("request.html.jinja", request=shown, csrf=session_of(request).csrf)

    @app.get("/requests/{bundle}/files/{name}")
    def file(bundle: str, name: str) -> Response:
        if name not in FILES:
            raise Turned(404, f"a bundle's files are {', '.join(FILES)}")
        data = pages.file(_known(bundle), name)
        headers = {"Content-Disposition": f'attachment; filename="{bundle[:12]}-{name}"'}
        return Response(data, media_type=_TYPES[name[name.index(".") :]], headers=headers)

    @app.get("/requests/{bundle}/images/{name:path}")
    def image(bundle: str, name: str) -> Response:
        data = pages.picture(_known(bundle), name)
        kind = next((kind for start, kind in _PICTURES.items() if data and data.startswith(start)), None)
        if data is None or kind is None:
            raise Turned(404, "this bundle has no such picture")
        return Response(data, media_type=kind)

    if pages.read_only:
        return Guard(app, sessions, hosts, cookie, error_page)

    def confirm_page(session: Any, what: Offer, problem: str = "", status: int = 200) -> Response:
        shown = pages.request(what.bundle).facts
        encrypted = keys.encrypted(local.keys_folder(pages.settings), what.key)
        days = pages.current()[1].rule.valid_days
        number = sessions.offer(session, what)
        facts = {"name": shown.name, "version": shown.version, "valid_days": days, "encrypted": encrypted}
        return html(
            "confirm.html.jinja", status, offer=what, number=number, csrf=session.csrf, problem=problem, **facts
        )

    @app.post("/requests/{bundle}/confirm")
    async def confirm(request: Request, bundle: str) -> Response:
        fields, session = await form_of(request), session_of(request)
        given = {name: fields.get(name, "") for name in ("decision", "reason", "key", "seen")}

        def shown() -> Response:
            return confirm_page(session, deciding.offer(pages.request(_known(bundle)), **given))

        return await run_in_threadpool(shown)

    @app.post("/requests/{bundle}/sign")
    async def sign(request: Request, bundle: str) -> Response:
        fields, session = await form_of(request), session_of(request)

        def signed() -> Response:
            number = fields.get("offer", "")
            what = sessions.offered(session, number)
            if not isinstance(what, Offer) or what.bundle != bundle or not sessions.withdraw(session, number):
                raise Changed("that form was sent already or is too old; nothing was signed now: read the page again")
            try:
                statement = deciding.decide(pages, what, fields.get("passphrase", "").encode() or None)
            except (Changed, Refused):
                raise
            except UserError as error:
                return confirm_page(session, what, one_line(error), 403)
            return RedirectResponse(f"/requests/{bundle}?signed={statement.id}", 303)

        return await run_in_threadpool(signed)

    return Guard(app, sessions, hosts, cookie, error_page)


def _known(bundle: str) -> str:
    if not is_digest(bundle):
        raise Turned(404, "a request is named by the SHA-256 of its bundle; the queue lists every request")
    return bundle


def serve(settings: Settings, host: str, port: int, read_only: bool, names: Sequence[str]) -> None:
    """Serve until interrupted; prints the link that opens a session. Raises UserError where it may not listen so."""
    import uvicorn

    try:
        loopback = host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        raise UserError(f"--host {host}: give an address of this machine, as 127.0.0.1 or 0.0.0.0") from None
    if not (loopback or read_only):
        raise UserError(f"--host {host}: the page that signs listens on loopback alone; --read-only shows elsewhere")
    pages, sessions = Pages(settings, read_only), Sessions(reusable=read_only)
    pages.queue()
    hosts = [f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}"]
    hosts += [with_port for name in names for with_port in (name, f"{name}:{port}")]
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            raise UserError(f"{host}:{port}: {error.strerror}; --port chooses another (services.review_port)") from None
        listening.listen()
        where = names[0] if names else f"127.0.0.1:{port}" if loopback else f"{host}:{port}"
        often = "it opens the page for whoever has it" if read_only else "it works once"
        print(f"http://{where}/login?token={sessions.token}\nOpen this link; {often}. Ctrl-C stops.", flush=True)
        config = uvicorn.Config(
            application(pages, sessions, hosts, f"facemllm_review_{port}"),
            log_level="warning",
            access_log=False,  # it would repeat the link
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            limit_concurrency=100,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=16 * 1024,
        )
        uvicorn.Server(config).run(sockets=[listening])
