"""Observability of a server, put together for it: its observer, its page and its door for corrections."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from facemllm.core.corrections import Corrections
from facemllm.serve.asked.policy import rule_names
from facemllm.serve.caller import CALLER
from facemllm.serve.doors import feedback as feedback_door
from facemllm.serve.doors.feedback import Feedback
from facemllm.serve.language import Limits
from facemllm.serve.metrics import Metrics
from facemllm.serve.observer import Observer
from facemllm.serve.page import router as page_door
from facemllm.serve.page.router import Page
from facemllm.serve.records import Records
from facemllm.serve.service import Served, Service
from facemllm.serve.traces import traces

if TYPE_CHECKING:
    from fastapi import APIRouter

    from facemllm.settings.serve import Serve


def observer(served: Served, tasks: Iterable[str], chosen: Serve, kept: Path) -> Observer:
    """The observer of a server: metrics in KServe's registry, traces if they are configured, the log of requests.

    `tasks` are those that labels may name; `kept` is the folder of answers, used where the settings keep them.
    """
    about = {"name": served.name, "version": served.version or "", "digest": served.digest}
    folder = kept if chosen.retention.answers else None
    records = Records(about["digest"], folder, chosen.retention.days)
    return Observer(Metrics(tasks, rule_names(), about), traces(about), records)


def routers(
    service: Service,
    limits: Limits,
    info: Callable[[], Mapping[str, Any]],
    chosen: Serve,
    refuses: Callable[[str], str | None],
    admit: Callable[[Request, str], str],
    asks_key: bool = False,
) -> list[APIRouter]:
    """The page, and the door for corrections where they are taken (see `Page` for the arguments). The folder of
    corrections is absolute in `chosen`, for a server runs anywhere."""
    taken: Feedback | None = None
    settings = chosen.feedback
    if settings.folder is not None:
        store = Corrections(Path(settings.folder), int(settings.max_mb * 2**20), settings.per_minute)
        consent = (settings.consent.version, settings.consent.text)
        taken = Feedback(store, consent, list(service.tasks), str(info()["digest"]), limits, service.policy)
    page = Page(service, limits, info, refuses, admit, asks_key, taken)
    made = [page_door.router(page)]
    if taken is not None:
        made.append(feedback_door.router(taken, lambda request: CALLER.get().client))
    return made
