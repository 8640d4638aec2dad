"""The task door: what can be asked and how well it was evaluated (`GET /tasks`), asking it by name (`POST /tasks`), and
what may not be asked (`GET /policy`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from facemllm.serve.caller import CALLER
from facemllm.serve.doors.instances import write_answer
from facemllm.serve.doors.reading import Pictures, read_json, read_names
from facemllm.serve.language import Ask, Limits, Question, Refused
from facemllm.serve.service import Service

_FIELDS = frozenset({"image", "tasks", "segmentation", "box", "characteristics", "min_probability"})
MOST_TASKS = 256


def read_request(body: Any, service: Service, limits: Limits) -> Ask:
    """What a body asks about its one picture: `tasks` by name ("attributes", all its items; "attributes.hair_color"),
    or all tasks of this deployment. Raises Refused."""
    if not isinstance(body, Mapping):
        raise Refused(422, 'the body must be {"image": {"b64": "..."}, "tasks": ["..."]}')
    if unknown := sorted(set(body) - _FIELDS):
        raise Refused(422, f"unknown field '{unknown[0][:40]}'; known are {', '.join(sorted(_FIELDS))}")
    names = body.get("tasks", list(service.offered))
    if not isinstance(names, list) or not 1 <= len(names) <= MOST_TASKS:
        raise Refused(422, f"tasks must be a list of 1 to {MOST_TASKS} names")
    asked: dict[tuple[str, str | None], None] = {}
    for n, name in enumerate(names):
        first, _, item = name.partition(".") if isinstance(name, str) else (name, "", "")
        task, one = read_names(first, item, f"tasks[{n}]", limits)
        known = service.tasks.get(task)
        items = [one] if one or known is None else [question.item for question in known.questions()]
        asked |= dict.fromkeys((task, item) for item in items)
    wants, least = body.get("characteristics", False), body.get("min_probability")
    if not isinstance(wants, bool):
        raise Refused(422, "characteristics must be true or false")
    if least is not None and (isinstance(least, bool) or not isinstance(least, int | float) or not 0 <= least <= 1):
        raise Refused(422, "min_probability must be a number from 0 to 1")
    pictures = Pictures(limits)
    image = pictures.image(body.get("image"), "image")
    parts = pictures.map(body["segmentation"], "segmentation") if "segmentation" in body else None
    box = _read_box(body["box"], image.width, image.height) if "box" in body else None
    questions = tuple(Question(task=task, item=item) for task, item in asked)
    return Ask(image, questions, parts, box, wants, least, "tasks")


def _read_box(value: Any, width: int, height: int) -> tuple[float, float, float, float]:
    """Left, top, right, bottom, in pixels of the picture."""
    numbers = isinstance(value, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    if not numbers or len(value) != 4:
        raise Refused(422, "box must be [left, top, right, bottom], in pixels")
    left, top, right, bottom = value
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise Refused(422, f"box must lie within the picture of {width}x{height} pixels, left of right, top of bottom")
    return left, top, right, bottom


def describe(service: Service) -> dict[str, Any]:
    """What can be asked: tasks, their items with options and an example, and how well it was evaluated."""
    entries = []
    for task in service.offered.values():
        refusal = service.policy.refuses_task(task.name)
        figures = dict(service.evaluated.tasks.get(task.name, {}))
        of_items = figures.pop("items", {})
        items = [
            {
                "name": question.item,
                "form": question.form,
                "question": question.templates[0],
                "options": [{"value": option.value, "text": option.text} for option in question.options],
                "evaluated": of_items.get(question.item),
            }
            for question in task.questions()
        ]
        about = {"name": task.name, "use": task.use, "unit": task.unit or None, "sensitive": task.sensitive}
        entries.append({**about, "refused": refusal and refusal.reason, "items": items, "evaluated": figures or None})
    return {"model": _model(service), "split": service.evaluated.split, "tasks": entries}


def _model(service: Service) -> dict[str, Any]:
    model = service.model
    return {"name": model.name, "version": model.version, "digest": model.digest}


def router(service: Service, limits: Limits) -> APIRouter:
    """The routes of the door."""
    routes = APIRouter(tags=["tasks"])

    async def ask(request: Request) -> JSONResponse:
        asked, caller = read_request(read_json(await request.body()), service, limits), CALLER.get()
        (found,) = await service.answer([asked], client=caller.client, deadline=caller.deadline)
        said: dict[str, Any] = {"model": _model(service), "answers": [write_answer(one) for one in found.answers]}
        if found.characteristics is not None:
            said["characteristics"] = dict(found.characteristics)
        return JSONResponse(said)

    async def tell() -> JSONResponse:
        return JSONResponse(describe(service))

    async def policy() -> JSONResponse:
        return JSONResponse({"model": _model(service), **service.policy.describe()})

    routes.add_api_route("/tasks", ask, methods=["POST"], response_model=None)
    routes.add_api_route("/tasks", tell, methods=["GET"], response_model=None)
    routes.add_api_route("/policy", policy, methods=["GET"], response_model=None)
    return routes
