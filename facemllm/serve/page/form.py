"""The page's forms: from a posted form to an ask, with the limits of the other doors, and none of other sites' forms.

A form of another site could make a visitor's browser send pictures and corrections here. There is no cookie and no
login that it could use in their name, so no token is needed; the browser says where a form comes from, and one from
elsewhere is refused.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from facemllm.serve.guard.images import check_image, read_map
from facemllm.serve.language import Ask, Encoded, Limits, Question, Refused
from facemllm.tasks.base import Task

_MOST_FIELDS, _MOST_FIELD = 64, 64 * 1024


@dataclass(frozen=True)
class Typed:
    """What a visitor chose and wrote, as the form shows it again."""

    tasks: Sequence[str] = ()
    questions: str = ""


@dataclass(frozen=True)
class Asked:
    """What a visitor asks, and as what it was typed."""

    ask: Ask
    typed: Typed


async def read_form(request: Request, max_bytes: int) -> FormData:
    """The fields and files of a posted form; files stay in memory, which BodyLimit bounds. Raises Refused."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Refused(415, "a picture is posted as multipart/form-data; use the form on the page")
    parser = MultiPartParser(
        request.headers, request.stream(), max_files=2, max_fields=_MOST_FIELDS, max_part_size=_MOST_FIELD
    )
    parser.spool_max_size = max_bytes + 1  # beyond it, a picture would go to disk
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise Refused(400, f"that form cannot be read: {error.message}") from None


def text(form: FormData, name: str) -> str:
    """A field of text; empty where there is none."""
    value = form.get(name)
    return value.strip() if isinstance(value, str) else ""


async def picture(form: FormData, name: str, limits: Limits) -> Encoded | None:
    """A file of the form, checked up to its header; None where none was chosen. Raises Refused."""
    data = await _bytes(form, name)
    return check_image(data, f"the {name}", limits) if data else None


def typed(form: FormData, known: Mapping[str, Task]) -> Typed:
    """What the form holds beside files."""
    chosen = [name for name in form.getlist("task") if isinstance(name, str) and name in known]
    return Typed(chosen, text(form, "questions"))


async def read_ask(form: FormData, known: Mapping[str, Task], limits: Limits) -> Asked:
    """What the form asks. Raises Refused, in words of the form."""
    held = typed(form, known)
    image = await picture(form, "picture", limits)
    if image is None:
        raise Refused(422, "choose a picture first")
    parts = None
    if data := await _bytes(form, "map"):
        parts = read_map(base64.b64encode(data).decode(), "the map", limits)
        if image.width * image.height + parts.width * parts.height > limits.max_pixels:
            raise Refused(413, f"picture and map are too large together; this server takes {limits.max_pixels} pixels")
    questions = [Question(task=name, item=one.item) for name in held.tasks for one in known[name].questions()]
    for line in (line.strip() for line in held.questions.splitlines()):
        if len(line) > limits.max_question_chars:
            raise Refused(422, f"a question has {len(line)} characters; this server takes {limits.max_question_chars}")
        questions += [Question(text=line)] if line else []
    if not questions:
        raise Refused(422, "choose what to ask, or write a question")
    if len(questions) > limits.max_instances:
        raise Refused(422, f"these are {len(questions)} questions; this server takes {limits.max_instances} at once")
    return Asked(Ask(image, tuple(questions), parts), held)


async def _bytes(form: FormData, name: str) -> bytes:
    file = form.get(name)
    return await file.read() if isinstance(file, UploadFile) else b""
