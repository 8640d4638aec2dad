"""KServe's V1 `:predict`: `{"instances": [...]}`, each an image and one question; `{"predictions": [...]}` back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from facemllm import tasks
from facemllm.serve.doors.reading import Pictures, read_names, read_text
from facemllm.serve.language import Answer, Answers, Ask, Encoded, Limits, Question, Refused

MAX_MESSAGES = 16
_FIELDS = frozenset({"image", "question", "task", "item", "messages", "segmentation", "characteristics"})


def read_request(payload: Any, limits: Limits) -> list[Ask]:
    """The asks of a `:predict` body, one an instance. Raises Refused (422 for its shape, 400 for an image)."""
    if not isinstance(payload, Mapping) or set(payload) != {"instances"}:
        raise Refused(422, 'the body must be {"instances": [...]} and hold nothing else')
    instances = payload["instances"]
    if not isinstance(instances, list) or not instances:
        raise Refused(422, "instances must be a list of at least one object")
    if len(instances) > limits.max_instances:
        raise Refused(413, f"{len(instances)} instances; this server takes {limits.max_instances} a request")
    pictures = Pictures(limits)
    return [_read_instance(value, f"instances[{n}]", limits, pictures) for n, value in enumerate(instances)]


def write_answers(answers: Iterable[Answers]) -> dict[str, Any]:
    """The reply to a request."""
    return {"predictions": [_prediction(found) for found in answers]}


def write_answer(found: Answer) -> dict[str, Any]:
    """One answer as JSON: what there is not is null, or left out where it seldom is."""
    said: dict[str, Any] = {"answer": found.text, "value": found.value, "scores": found.scores}
    said |= {"task": found.task, "item": found.item, "kind": found.kind, "probability": found.probability}
    if found.task is not None and found.item is not None and (unit := _unit(found.task, found.item)):
        said["unit"] = unit
    said["reason"] = found.reason
    if found.rule is not None:
        said["rule"] = found.rule
    if found.suggestions:
        said["suggestions"] = list(found.suggestions)
    return said


def _unit(task: str, item: str) -> str:
    """The unit of an item that is answered by a number."""
    known = tasks.get(task)
    return known.unit if known.question(item).form == "number" else ""


def _prediction(found: Answers) -> dict[str, Any]:
    said = write_answer(found.answers[0])
    if found.characteristics is not None:
        said["characteristics"] = dict(found.characteristics)
    return said


def _read_instance(value: Any, where: str, limits: Limits, pictures: Pictures) -> Ask:
    if not isinstance(value, Mapping):
        raise Refused(422, f"{where} must be an object")
    if unknown := sorted(set(value) - _FIELDS):
        raise Refused(422, f"{where}: unknown field '{unknown[0][:40]}'; known are {', '.join(sorted(_FIELDS))}")
    image, question = _read_question(value, where, limits, pictures)
    wants = value.get("characteristics", False)
    if not isinstance(wants, bool):
        raise Refused(422, f"{where}.characteristics must be true or false")
    parts = pictures.map(value["segmentation"], f"{where}.segmentation") if "segmentation" in value else None
    return Ask(image, (question,), map=parts, characteristics=wants, where=where)


def _read_question(
    value: Mapping[str, Any], where: str, limits: Limits, pictures: Pictures
) -> tuple[Encoded, Question]:
    if sum(key in value for key in ("question", "task", "messages")) != 1:
        raise Refused(422, f"{where}: give exactly one of question, task and messages")
    if "item" in value and "task" not in value:
        raise Refused(422, f"{where}: item needs task")
    source: Any = value.get("image")
    chat: tuple[tuple[str, str], ...] = ()
    if "messages" in value:
        source, chat = _read_chat(value["messages"], f"{where}.messages", source, limits)
    image = pictures.image(source, f"{where}.image")
    if chat:
        return image, Question(chat[-1][1], chat=chat)
    if "question" in value:
        return image, Question(read_text(value["question"], f"{where}.question", limits))
    task, item = read_names(value["task"], value.get("item", ""), where, limits)
    return image, Question(task=task, item=item)


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
        chat.append((role, read_text(texts[0], f"{here}.content", limits)))
    if len(chat) % 2 == 0:
        raise Refused(422, f"{where} must end with a question of the user")
    if len(pictures) != 1:
        raise Refused(422, f"{where} needs exactly one image, in its first message or beside it; found {len(pictures)}")
    return pictures[0], tuple(chat)


def _parts(content: Any, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise Refused(422, f"{where}.content must be a text or a list of parts")
    return content
