"""The page as a door: `GET /` shows the form to who asks for HTML, `POST /` answers it, `/page/feedback` takes
corrections from it.

It asks the service as every door does and makes HTML of what it says, on the server: with scripts the browser puts the
same HTML in place. What is refused is shown with its status.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from facemllm.report import web
from facemllm.serve.doors.feedback import Feedback
from facemllm.serve.language import Limits, Refused
from facemllm.serve.page import views
from facemllm.serve.page.form import Typed, picture, read_ask, read_form, text, typed
from facemllm.serve.page.parts import legend

if TYPE_CHECKING:
    from fastapi import APIRouter

    from facemllm.serve.service import Service

HERE = Path(__file__).parent
HEADERS = web.headers(script_src="'self'", connect_src="'self'", img_src="'self' data: blob:")


@dataclass(frozen=True)
class Page:
    """What the page is made of: `info` is what GET /info gives, `refuses` the reason for which the policy refuses a
    task; `admit` names the client of a request from the key that the form holds ("" where none is asked for), or raises
    Refused; `feedback` takes corrections, where any are taken."""

    service: Service
    limits: Limits
    info: Callable[[], Mapping[str, Any]]
    refuses: Callable[[str], str | None] = lambda _: None
    admit: Callable[[Request, str], str] = lambda request, _: request.client.host if request.client else ""
    asks_key: bool = False
    feedback: Feedback | None = None

    @property
    def max_bytes(self) -> int:
        """Bytes of a form."""
        return int(self.limits.max_body_mb * 2**20)

    async def answered(self, request: Request) -> Response:
        """The page with answers, or with what was refused."""
        held: Typed | None = None
        try:
            form = await read_form(request, self.max_bytes)
            held = typed(form, self.service.tasks)
            client = self.admit(request, text(form, "key"))
            asked = await read_ask(form, self.service.tasks, self.limits)
            started = time.perf_counter()
            (found,) = await self.service.answer([asked.ask], client=client, deadline=None)
            seconds, script = time.perf_counter() - started, bool(text(form, "script"))
            shown = views.result(asked, found, self.service.tasks, seconds, script)
        except Refused as refused:
            return self.html(held, refused=refused)
        return self.html(held, result=shown)

    async def corrected(self, request: Request) -> Response:
        """The page, saying that a correction was stored, or why not."""
        try:
            if self.feedback is None:
                raise Refused(404, "this server takes no corrections")
            form = await read_form(request, self.max_bytes)
            client = self.admit(request, text(form, "key"))
            consent = text(form, "consent") == "yes"
            shown = await picture(form, "picture", self.limits) if consent else None
            given: dict[str, Any] = {"image": text(form, "image"), "correction": text(form, "correction")}
            given |= {"consent": consent, **({"consent_text": text(form, "consent_text")} if consent else {})}
            given |= _about(text(form, "about"))
            said = await run_in_threadpool(self.feedback.take, given, client, shown)
        except Refused as refused:
            return self.html(None, refused=refused)
        kept = "with the picture" if said["picture"] else "without the picture"
        return self.html(None, notice=f"Thank you. The correction was stored {kept}.")

    def html(
        self,
        held: Typed | None,
        *,
        result: views.Result | None = None,
        refused: Refused | None = None,
        notice: str = "",
    ) -> Response:
        """The page as it stands after a request."""
        offers = views.offered(self.service.offered, self.refuses)
        chosen = held.tasks if held else views.preselected(offers, self.limits.max_instances)
        body = (
            _environment()
            .get_template("page.html.jinja")
            .render(
                model=views.model(self.info()),
                offers=offers,
                chosen=chosen,
                questions=held.questions if held else "",
                limits=self.limits,
                takes_maps=self.service.takes_maps,
                asks_key=self.asks_key,
                consent=self.feedback.consent if self.feedback else None,
                result=result,
                refused=refused.reason if refused else "",
                notice=notice,
                legend=legend(),
            )
        )
        headers = dict(HEADERS)
        if refused and refused.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(refused.retry_after)))
        status = refused.status if refused else 200
        return Response(body, status, headers, "text/html; charset=utf-8")


def _about(value: str) -> dict[str, Any]:
    """What a correction is about, as the page wrote it into its form."""
    try:
        task, item, question, answer = json.loads(value)
    except (ValueError, TypeError, RecursionError):
        raise Refused(422, "choose the answer that is wrong") from None
    about = {"question": question} if question is not None else {"task": task, "item": item}
    return {**about, "answer": answer}


@lru_cache(maxsize=1)
def _environment() -> Environment:
    return web.environment(HERE / "templates", {})


def router(page: Page) -> APIRouter:
    """The routes of the page; they take the place of KServe's own `/`."""
    from fastapi import APIRouter

    routes = APIRouter(include_in_schema=False)
    style, script = web.style(HERE / "page.css"), (HERE / "page.js").read_text("utf-8")

    async def show(request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):
            return page.html(None)
        return JSONResponse({"status": "alive"})  # V1's liveness, as KServe's own `/` gives it

    async def show_style() -> Response:
        return Response(style, headers=HEADERS, media_type="text/css")

    async def show_script() -> Response:
        return Response(script, headers=HEADERS, media_type="text/javascript")

    async def answer(request: Request) -> Response:
        return await page.answered(request)

    async def correct(request: Request) -> Response:
        return await page.corrected(request)

    routes.add_api_route("/", show, methods=["GET"], response_model=None)
    routes.add_api_route("/page.css", show_style, methods=["GET"], response_model=None)
    routes.add_api_route("/page.js", show_script, methods=["GET"], response_model=None)
    routes.add_api_route("/", answer, methods=["POST"], response_model=None)
    routes.add_api_route("/page/feedback", correct, methods=["POST"], response_model=None)
    return routes
