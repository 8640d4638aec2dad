"""The body of an OpenAI chat completion, read into an ask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from facemllm import tasks
from facemllm.serve.doors.instances import MAX_MESSAGES
from facemllm.serve.doors.reading import Pictures, read_text
from facemllm.serve.doors.schemas import Property, read_format, titles
from facemllm.serve.language import Ask, Encoded, Limits, Question, Refused

MOST_LOGPROBS = 20
_READ: tuple[str, ...] = ("model", "messages", "stream", "stream_options", "response_format", "logprobs")
_READ += ("top_logprobs", "max_tokens", "max_completion_tokens", "n")
_NO_EFFECT: tuple[str, ...] = ("temperature", "top_p", "seed", "user", "metadata", "store", "safety_identifier")
_NO_EFFECT += ("prompt_cache_key", "reasoning_effort", "service_tier", "parallel_tool_calls")
"""The likeliest answer is given, whatever these say; nothing is sampled, stored or thought about aloud."""
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "stop": ([],),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
}
"""What clients send by default, and mean nothing by; any other value asks for what is not offered."""
_MESSAGE = {"user": frozenset({"role", "content", "name"})}
_MESSAGE["assistant"] = _MESSAGE["user"] | {"refusal"}


@dataclass(frozen=True)
class ChatRequest:
    """A request: what is asked (one question, or one for each of `properties`), and how the answer is to be given."""

    ask: Ask
    turns: tuple[tuple[str, str], ...]
    properties: tuple[Property, ...]
    titles: tuple[str, ...]
    stream: bool
    usage: bool
    logprobs: int | None
    max_tokens: int | None


def read_chat(body: Any, model: str, served: Mapping[str, tasks.Task], limits: Limits) -> ChatRequest:
    """The request in a body. Raises Refused."""
    if not isinstance(body, Mapping):
        raise Refused(400, "the body must be an object")
    given = {key: value for key, value in body.items() if value is not None}
    neutral = {name for name, values in _NEUTRAL.items() if name in given and given[name] in values}
    if unknown := sorted(set(given) - {*_READ, *_NO_EFFECT} - neutral):
        raise Refused(400, f"{unknown[0][:40]} is not supported by this model; leave it out")
    if given.get("model") != model:
        raise Refused(404, f"no model '{str(given.get('model'))[:80]}'; this server has '{model}'")
    if given.get("n", 1) != 1:
        raise Refused(400, "n must be 1: the same question has the same answer")
    image, turns = _read_messages(given.get("messages"), limits)
    text = turns[-1][1]
    properties = read_format(given.get("response_format"), text, served, limits)
    questions = tuple(one.question for one in properties) or (Question(text, chat=turns),)
    options = given.get("stream_options", {})
    if not isinstance(options, Mapping):
        raise Refused(400, "stream_options must be an object")
    lengths = [_whole(given, name, 1, 1_000_000) for name in ("max_tokens", "max_completion_tokens")]
    many = _whole(given, "top_logprobs", 0, MOST_LOGPROBS)
    wants = _flag(given, "logprobs")
    if many is not None and not wants:
        raise Refused(400, "top_logprobs needs logprobs: true")
    return ChatRequest(
        Ask(image, questions, where="messages"),
        turns,
        properties,
        titles(given["response_format"]) if properties else (),
        _flag(given, "stream"),
        _flag(options, "include_usage"),
        (many or 0) if wants else None,
        min((length for length in lengths if length is not None), default=None),
    )


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name)
    if value not in (None, True, False) or (isinstance(value, int | float) and not isinstance(value, bool)):
        raise Refused(400, f"{name} must be true or false")
    return bool(value)


def _whole(given: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    value = given.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most):
        raise Refused(400, f"{name} must be a whole number from {least} to {most}")
    return value


def _read_messages(messages: Any, limits: Limits) -> tuple[Encoded, tuple[tuple[str, str], ...]]:
    """The one picture of a chat, and its turns as (role, text)."""
    if not isinstance(messages, list) or not 1 <= len(messages) <= MAX_MESSAGES:
        raise Refused(400, f"messages must be a list of 1 to {MAX_MESSAGES}")
    pictures, images, turns = Pictures(limits), list[Encoded](), list[tuple[str, str]]()
    for n, message in enumerate(messages):
        here, role = f"messages[{n}]", ("user", "assistant")[n % 2]
        if not isinstance(message, Mapping):
            raise Refused(400, f"{here} must be an object")
        if message.get("role") in ("system", "developer"):
            raise Refused(400, f"{here}: this model takes no {message['role']} message; ask in the user's")
        filled = {key for key, value in message.items() if value not in (None, [], {})}
        if message.get("role") != role or filled - _MESSAGE[role]:
            raise Refused(400, f"{here} must have the role {role} and content alone: user and assistant alternate")
        texts = []
        content = message.get("content") or message.get("refusal")  # of a message as this server sent it
        for place, part in enumerate(_parts(content, here)):
            match part:
                case {"type": "text", "text": text}:
                    texts.append(text)
                case {"type": "image_url", "image_url": {"url": str(url)}} if role == "user":
                    images.append(_picture(url, f"{here}.content[{place}].image_url", pictures))
                case _:
                    raise Refused(400, f"{here}.content[{place}]: parts are text and, of the user's, image_url")
        if not texts or not all(isinstance(text, str) for text in texts):
            raise Refused(400, f"{here} must hold a text")
        turns.append((role, read_text("\n".join(texts), f"{here}.content", limits)))
    if len(turns) % 2 == 0:
        raise Refused(400, "messages must end with a question of the user")
    if len({image.digest for image in images}) != 1:
        raise Refused(400, f"messages must hold one picture of a face, as image_url; there are {len(images)}")
    return images[0], tuple(turns)


def _parts(content: Any, where: str) -> list[Any]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise Refused(400, f"{where}.content must be a text or a list of parts")
    return content


def _picture(url: str, where: str, pictures: Pictures) -> Encoded:
    head, comma, data = url.partition(",")
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        line = "must be a data URL (data:image/jpeg;base64,...); pictures are not fetched from addresses"
        raise Refused(400, f"{where} {line}")
    return pictures.base64(data, where)
