"""The body of KServe's V1 `:predict`: `{"instances": [...]}`, each an image and one question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from facemllm.serve.guard.images import read_image, read_map
from facemllm.serve.language import Encoded, Limits, Refused

MAX_MESSAGES = 16
_FIELDS = frozenset({"image", "question", "task", "item", "messages", "segmentation", "characteristics"})


@dataclass(frozen=True)
class Ask:
    """One instance of a request: an image, and a question, the name of an item, or a chat that ends in a question.

    `map` is a map of the face's parts; `characteristics` asks for the scores beside the answer.
    """

    image: Encoded
    question: str | None
    task: str | None = None
    item: str | None = None
    chat: tuple[tuple[str, str], ...] = ()
    map: Encoded | None = None
    characteristics: bool = False


def read_request(payload: Any, limits: Limits) -> list[Ask]:
    """The questions of a `:predict` body. Raises Refused (422 for its shape, 400 for an image)."""
    if not isinstance(payload, Mapping) or set(payload) != {"instances"}:
        raise Refused(422, 'the body must be {"instances": [...]} and hold nothing else')
    instances = payload["instances"]
    if not isinstance(instances, list) or not instances:
        raise Refused(422, "instances must be a list of at least one object")
    if len(instances) > limits.max_instances:
        raise Refused(413, f"{len(instances)} instances; this server takes {limits.max_instances} a request")
    held: dict[str, Encoded] = {}
    asks = [_read_instance(value, f"instances[{n}]", limits, held) for n, value in enumerate(instances)]
    if (pixels := sum(image.width * image.height for image in held.values())) > limits.max_pixels:
        raise Refused(413, f"the images hold {pixels} pixels; this server takes {limits.max_pixels} a request")
    return asks


def read_question(value: Any, where: str, limits: Limits) -> str:
    """Check a question's text. Raises Refused."""
    if not isinstance(value, str) or not value.strip():
        raise Refused(422, f"{where} must be a text")
    if len(value) > limits.max_question_chars:
        raise Refused(422, f"{where} has {len(value)} characters; this server takes {limits.max_question_chars}")
    return value.strip()


def _read_instance(value: Any, where: str, limits: Limits, held: dict[str, Encoded]) -> Ask:
    ask = _read_question(value, where, limits, held)
    wants = value.get("characteristics", False)
    if not isinstance(wants, bool):
        raise Refused(422, f"{where}.characteristics must be true or false")
    found = None
    if "segmentation" in value:
        source = value["segmentation"]
        if not isinstance(source, Mapping) or set(source) != {"b64"} or not isinstance(source["b64"], str):
            raise Refused(422, f'{where}.segmentation must be {{"b64": "<base64 of a PNG>"}}')
        key = f"segmentation {source['b64']}"  # a picture sent as both is checked as both
        if key not in held:
            held[key] = read_map(source["b64"], f"{where}.segmentation.b64", limits)
        found = held[key]
    return replace(ask, map=found, characteristics=wants)


def _read_question(value: Any, where: str, limits: Limits, held: dict[str, Encoded]) -> Ask:
    if not isinstance(value, Mapping):
        raise Refused(422, f"{where} must be an object")
    if unknown := sorted(set(value) - _FIELDS):
        raise Refused(422, f"{where}: unknown field '{unknown[0][:40]}'; known are {', '.join(sorted(_FIELDS))}")
    if sum(key in value for key in ("question", "task", "messages")) != 1:
        raise Refused(422, f"{where}: give exactly one of question, task and messages")
    if "item" in value and "task" not in value:
        raise Refused(422, f"{where}: item needs task")
    source: Any = value.get("image")
    chat: tuple[tuple[str, str], ...] = ()
    if "messages" in value:
        source, chat = _read_chat(value["messages"], f"{where}.messages", source, limits)
    if not isinstance(source, Mapping) or set(source) != {"b64"}:
        raise Refused(422, f'{where}.image must be {{"b64": "<base64 of the file>"}}')
    key = source["b64"] if isinstance(source["b64"], str) else ""
    if key not in held:
        held[key] = read_image(source["b64"], f"{where}.image.b64", limits)
    if chat:
        return Ask(held[key], chat[-1][1] if len(chat) == 1 else None, chat=chat)
    if "question" in value:
        return Ask(held[key], read_question(value["question"], f"{where}.question", limits))
    names = [value["task"], value.get("item", "")]
    if not all(isinstance(name, str) and len(name) <= limits.max_question_chars for name in names):
        raise Refused(422, f"{where}: task and item must be names")
    return Ask(held[key], None, names[0], names[1] or None)


def _read_chat(messages: Any, where: str, source: Any, limits: Limits) -> tuple[Any, tuple[tuple[str, str], ...]]:
    """The image of a chat (in its first message, or beside it) and its turns, as (role, text)."""
    if not isinstance(messages, list) or not 1 <= len(messages) <= MAX_MESSAGES:
        raise Refused(422, f"{where} must be a list of 1 to {MAX_MESSAGES} messages")
    pictures = [source] if source is not None else []
    chat = []
    for n, message in enumerate(messages):
        role = ("user", "assistant")[n % 2]
        here = f"{where}[{n}]"
        if not isinstance(message, Mapping) or set(message) != {"role", "content"} or message["role"] != role:
            raise Refused(422, f'{here} must be {{"role": "{role}", "content": ...}}: user and assistant alternate')
        content = message["content"]
        texts = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else _parts(content, here):
            if set(part) == {"type", "text"} and part["type"] == "text":
                texts.append(part["text"])
            elif set(part) == {"type", "b64"} and part["type"] == "image" and n == 0:
                pictures.append({"b64": part["b64"]})
            else:
                parts = '{"type": "text", "text"} or, in the first message, {"type": "image", "b64"}'
                raise Refused(422, f"{here}.content: parts are {parts}")
        if len(texts) != 1:
            raise Refused(422, f"{here} must hold one text")
        chat.append((role, read_question(texts[0], f"{here}.content", limits)))
    if len(chat) % 2 == 0:
        raise Refused(422, f"{where} must end with a question of the user")
    if len(pictures) != 1:
        raise Refused(422, f"{where} needs exactly one image, in its first message or beside it; found {len(pictures)}")
    return pictures[0], tuple(chat)


def _parts(content: Any, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise Refused(422, f"{where}.content must be a text or a list of parts")
    return content
