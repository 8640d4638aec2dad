"""Chat templates of published models. A template is a program that somebody else wrote, so it is tried in a bounded
process (`model.sandbox`) before transformers renders it here, and has to write the same text in both. One that was
written to tell the two apart is not held by this."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from facemllm.errors import UserError, one_line

SECONDS, BYTES, CHARACTERS = 5, 2**29, 2**17
"""What rendering may take: processor time, memory, and characters of a template or of a text."""

_CANNOT = "the model's chat template cannot render a conversation"
_WAIT_SECONDS = 120.0


def template_of(processor: Any) -> str:
    """The chat template by which a processor asks. Raises UserError where it has none."""
    found = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    if isinstance(found, dict):
        found = found.get("default")
    if not found:
        raise UserError(
            "the model has no chat template (chat_template.jinja), so nobody can say how it is asked; "
            "take an instruction-tuned checkpoint, or write one"
        )
    return str(found)


def render(processor: Any, chats: Sequence[tuple[Any, bool]]) -> list[str]:
    """Texts of chats, (messages, whether the assistant is to go on). Raises UserError for a template that cannot render
    them within `SECONDS`, `BYTES` and `CHARACTERS`, or whose text depends on the time or on chance."""
    template = template_of(processor)
    if len(template) > CHARACTERS:
        raise UserError(f"the model's chat template has {len(template)} characters; at most {CHARACTERS} are read")
    if "strftime_now" in template:
        raise UserError(
            "the model's chat template writes the time (strftime_now), so that no two days ask alike; "
            "write a date into it (chat_template.jinja)"
        )
    tokens = processor.tokenizer.special_tokens_map
    calls = [
        {"messages": chat, "tools": None, "documents": None, "add_generation_prompt": goes_on, **tokens}
        for chat, goes_on in chats
    ]
    tried = _tried(template, json.dumps(calls, default=str))
    try:
        texts = [
            str(processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=goes_on))
            for chat, goes_on in chats
        ]
    except Exception as error:
        raise UserError(f"{_CANNOT}: {one_line(error)}") from error
    if texts != list(tried):
        raise UserError("the model's chat template does not write the same text each time (chat_template.jinja)")
    return texts


@lru_cache(256)
def _tried(template: str, calls: str) -> tuple[str, ...]:
    bounds = {"seconds": SECONDS, "bytes": BYTES, "characters": CHARACTERS}
    asked = json.dumps({"template": template, "calls": json.loads(calls), **bounds})
    environment: Mapping[str, str] = {**os.environ, "PYTHONPATH": os.pathsep.join(one for one in sys.path if one)}
    command = [sys.executable, "-P", str(Path(__file__).with_name("sandbox.py"))]
    try:
        ran = subprocess.run(
            command, input=asked, env=environment, capture_output=True, text=True, timeout=_WAIT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{_CANNOT} in {_WAIT_SECONDS:.0f} s") from None
    if ran.returncode < 0:
        raise UserError(f"{_CANNOT}: it takes more than {SECONDS} s of processor time, or all memory")
    if ran.returncode:
        raise UserError(f"{_CANNOT}: {one_line(ran.stderr[-200:] or 'no message')}")
    answer = json.loads(ran.stdout)
    if isinstance(answer, dict):
        raise UserError(f"{_CANNOT}: {one_line(answer['error'])}")
    return tuple(answer)
