"""Models of others, asked the same questions as ours.

A peer, at an OpenAI-compatible endpoint or any of transformers', is asked one question at a time about one picture, in
the words of the conversations, which also say how to answer. It is never scored by likelihood: its text is read as
strictly as everyone's (`tasks.read`), and what cannot be read counts as wrong and is never guessed; so does what the
model, or a filter before it, declines. A request that gets no answer is no answer of the model's: it ends the
evaluation. Every reply is kept in the store that annotation uses, so a run that was killed, lacks answers or has spent
its budget goes on where it was. What it will ask an endpoint for, and what that may cost, is said before; what became
of every question, and the bill, is said after, however it ends, and kept as `bill.json`. Settings are those of
`annotate`: `vision_language` and `endpoint`. A third party is shown only what the ledger allows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from facemllm import tasks
from facemllm.asking import local
from facemllm.asking.endpoint import EndpointSender, parameters, reach, sender
from facemllm.asking.requests import (
    Filtered,
    JobStopped,
    MakeRequest,
    Reply,
    Request,
    Sender,
    TooLong,
    content_key,
    encoded,
)
from facemllm.asking.store import Replies, replies
from facemllm.core import digests
from facemllm.errors import UserError
from facemllm.evaluate.predict import Put, Shown
from facemllm.settings import Settings
from facemllm.tables import CONVERSATIONS, open_table
from facemllm.tasks.answers import refuses
from facemllm.tasks.items import Several
from facemllm.tasks.spoken import spoken
from facemllm.version import ledger

LONGEST = 8000
"""Characters kept of a reply: the last, since what reasons answers at its end."""

OUTCOMES = ("answered", "declined", "cut_off", "unreadable", "no_answer")
"""What becomes of a question that is asked. `declined`: by a filter, or in words; `cut_off`: unreadable, and ended by
`max_tokens`; `no_answer`: none that can be used, which ends the evaluation."""

DECLINED = "(declined by the endpoint's content filter)"

_HUB_ID = re.compile(r"\w[\w.-]*(?:/[\w.-]+)?")


@dataclass(frozen=True)
class Asked:
    """A question as it is put to a peer: the picture's name (of several, the first's), the words, the pictures as JPEG,
    how the answer is read, and what else about the pictures its reply hangs on."""

    image_id: str
    text: str
    pictures: Callable[[], tuple[bytes, ...]]
    read: Callable[[str], str | None]
    change: str = ""


@dataclass
class Used:
    """What replies used, whenever they were made: tokens and cost of those that say so, seconds of them all."""

    replies: int = 0
    metered: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    cost: float | None = None

    def add(self, reply: Reply) -> None:
        """Count a reply."""
        self.replies += 1
        self.seconds += reply.seconds
        if reply.prompt_tokens is not None and reply.completion_tokens is not None:
            self.metered += 1
            self.tokens_in += reply.prompt_tokens
            self.tokens_out += reply.completion_tokens
        if reply.cost is not None:
            self.cost = (self.cost or 0.0) + reply.cost


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A model that is asked in words. `identity` is all that its answers hang on; its digest names the model, also in
    the keys of its replies, under `home`. `name` is what people call it. `image_side` bounds the pictures it is sent,
    in pixels."""

    name: str
    identity: Mapping[str, Any]
    image_side: int
    sender: Sender
    home: Path
    outcomes: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(OUTCOMES, 0)), compare=False)
    used: Used = field(default_factory=Used, compare=False)

    @property
    def takes_maps(self) -> bool:
        """Others are shown the picture alone."""
        return False

    @property
    def digest(self) -> str:
        """SHA-256 of what identifies the model."""
        return digests.of_json(self.identity)

    def answer(self, shown: Sequence[Shown]) -> Iterator[dict[str, Any]]:
        """Answers in order, as `ask` gives them. Raises UserError for a question that is too long, too."""
        for row in self.ask([one for face in shown for one in self._asked(face)]):
            if "why" in row:
                raise UserError(f"evaluation stopped: the question {row['question'][:80]!r} is {row['why']}")
            yield row

    def _asked(self, face: Shown) -> Iterator[Asked]:
        pictures = cache(lambda: (encoded(face.image, self.image_side),))  # once for all questions, if one is asked
        for put in face.asked:
            read = partial(tasks.read, put.question)
            yield Asked(face.face["image_id"], words(put), pictures, read, face.change)

    def ask(self, asked: Sequence[Asked]) -> Iterator[dict[str, Any]]:
        """Answers in order. Raises UserError when the model can answer nothing more now, or when one of these questions
        got no usable answer; what was answered is in the store then. A question that is more than the model reads is
        not asked: `raw` is None, and `why` says so."""
        wanted = [self._wanted(one) for one in asked]
        try:
            said = replies(partial(Replies, self.home), self.sender, wanted)
        except JobStopped as stop:
            with suppress(JobStopped), closing(Replies(self.home)) as store:
                for one, (image_id, key, _) in zip(asked, wanted, strict=True):
                    if (kept := store.read(image_id, key)) is not None:
                        self._row(one, kept)  # which counts it
            raise UserError(f"evaluation stopped: {stop}. What was answered is kept; run again to go on") from None
        rows = [self._row(*one) for one in zip(asked, said, strict=True)]
        _require_all(said)
        yield from rows

    def _row(self, one: Asked, reply: Reply | Exception) -> dict[str, Any]:
        """An answer as it is kept; it is counted by what becomes of it, and so is what it used."""
        if isinstance(reply, TooLong):
            return {"raw": None, "parsed": None, "question": one.text, "why": str(reply)}
        filtered = isinstance(reply, Filtered) or (isinstance(reply, Reply) and not reply.text and _is_filtered(reply))
        said = reply.text if isinstance(reply, Reply) and not filtered else DECLINED if filtered else None
        raw = (said or "").encode("utf-8", "replace").decode()  # JSON can hold half a surrogate pair
        parsed = None if filtered else one.read(raw)
        became = "unreadable"
        if said is None:
            became = "no_answer"
        elif parsed is not None:
            became = "answered"
        elif filtered or refuses(spoken(raw)):
            became = "declined"
        elif isinstance(reply, Reply) and reply.cut_off:
            became = "cut_off"
        self.outcomes[became] += 1
        if isinstance(reply, Reply):
            self.used.add(reply)
        return {"raw": raw[-LONGEST:], "parsed": parsed, "question": one.text}

    def key(self, image_id: str, change: str, text: str) -> str:
        """The content key of the reply to a question in words about a picture, to which `change` was done."""
        # what was done to the picture is part of what is seen
        return content_key(f"{image_id} {change}".strip(), digests.of_json(_messages(text)), self.digest, None)

    def _wanted(self, one: Asked) -> tuple[str, str, MakeRequest]:
        messages, image_id = _messages(one.text), one.image_id
        key, prompt = self.key(image_id, one.change, one.text), digests.of_json(messages)

        def request() -> Request:
            first, *others = one.pictures()
            fields: dict[str, Any] = {"image_id": image_id, "key": key, "prompt_hash": prompt, "messages": messages}
            return Request(**fields, picture=first, others=tuple(others))

        return image_id, key, request


def _messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "text": text}]


def _is_filtered(reply: Reply) -> bool:
    return reply.finish.lower() in ("content_filter", "safety")


def _require_all(said: Sequence[Reply | Exception]) -> None:
    """Raises UserError unless each is an answer, or declined by a filter, or too long to be asked."""
    missing = Counter(
        str(one) for one in said if isinstance(one, Exception) and not isinstance(one, Filtered | TooLong)
    )
    unusable = Counter(one.error or "no text" for one in said if isinstance(one, Reply) and one.text is None)
    if missing:
        raise UserError(
            f"evaluation stopped: {missing.total()} of {len(said)} questions got no answer "
            f"({_commonest(missing)}). What was answered is kept; run again to go on"
        )
    if unusable:
        raise UserError(
            f"evaluation stopped: {unusable.total()} of {len(said)} replies cannot be used ({_commonest(unusable)}); "
            "they are kept and not asked for again. Mend the endpoint, and change "
            "annotate.vision_language.max_tokens to ask anew"
        )


def _commonest(reasons: Counter[str]) -> str:
    (reason, _), *others = reasons.most_common()
    return f"{reason}, and {len(others)} other reasons" if others else reason


@dataclass
class Reached:
    """A sender that first sees whether anybody is there: somebody waits, and to ask again and again takes minutes."""

    sender: EndpointSender
    reached: bool = False

    def send(self, requests: Sequence[MakeRequest]) -> Sequence[Reply | Exception]:
        """As the sender; raises JobStopped at once when nobody is at the address."""
        if not self.reached:
            reach(str(self.sender.endpoint.base_url))
            self.reached = True
        return self.sender.send(requests)


def words(put: Put) -> str:
    """A question as a peer is asked it: its own words, and the form of the answer."""
    question = put.question
    texts = [option.text for option in question.options]
    item = tasks.get(question.task).item(question.item)
    if question.form == "statement":
        form = "Answer with true or false."
    elif question.form == "boolean":
        form = "Answer with yes or no."
    elif question.form == "choice":
        form = f"Answer with one of these and nothing else: {', '.join(texts)}."
    elif question.form == "number":
        examples = f'"{texts[0]}", "{texts[len(texts) // 2]}" or "{texts[-1]}"'
        form = f"Answer with a number of {tasks.get(question.task).unit}, in words as in {examples}."
    elif isinstance(item, Several):
        things = ", ".join(thing.text for thing in item.things)
        form = f"Answer with those of these that apply, or none, and nothing else: {things}."
    else:
        form = ""  # open, or lettered, which says it itself
    if re.search(r"\bleft\b", f"{put.text} {form}") and "picture" not in put.text:
        form += " Left and right are those of the picture."
    return f"{put.text} {form}".strip()


def at_endpoint(settings: Settings, conversations: Path, backoff_s: float = 1.0) -> Peer:
    """The model of `annotate.vision_language` at the endpoint of `annotate.endpoint`, for these conversations. Raises
    UserError when either is missing, address or key cannot be used, or the ledger keeps a picture from it."""
    chosen, name = settings.annotate.endpoint, settings.annotate.vision_language.model
    if name is None or chosen.base_url is None:
        raise UserError("no endpoint is named; give --base-url https://host/v1, or set annotate.endpoint.base_url")
    _require_name(name)
    if chosen.third_party:
        ledger.require(settings, open_table(conversations, CONVERSATIONS).sources, "third_party")
    shape = parameters(settings)
    parts = urlsplit(chosen.base_url)
    # without user and password, which `sender` refuses, too
    address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2].lower()}{parts.path.rstrip('/')}"
    identity = {"kind": "endpoint", "name": name, "address": address, "parameters": shape}
    account = digests.of_json([identity, "evaluation"])[:16]
    asks = Reached(sender(settings, account, backoff_s=backoff_s))
    return Peer(name=name, identity=identity, image_side=shape["image_side"], sender=asks, home=settings.home)


def on_this_machine(settings: Settings, model: str) -> Peer:
    """A model that transformers opens as an image-text-to-text model: a folder, or an id of the hub. Raises UserError
    when there is none, or its weights are no safetensors."""
    check_name(model)
    folder = local.folder_of(str(Path(model).resolve()) if Path(model).is_dir() else model, "MODEL")
    weights, shape = local.digest_of(folder), parameters(settings)
    asks = local.Generated(folder, partial(Replies, settings.home), weights, shape["max_tokens"], shape["temperature"])
    name = model if not Path(model).is_dir() else folder.name
    identity = {"kind": "transformers", "weights": weights, "parameters": shape}
    return Peer(name=name, identity=identity, image_side=shape["image_side"], sender=asks, home=settings.home)


def check_name(model: str) -> None:
    """Raises UserError when a model can be neither a directory nor in the hub, before anything is looked for."""
    _require_name(model)
    if not Path(model).is_dir() and not _HUB_ID.fullmatch(model):
        raise UserError(f"{model} is not a model directory, nor the id of a model of the hub")


def _require_name(model: str) -> None:
    if not model.strip():
        raise UserError("MODEL is empty; name a model directory, a model of the hub, or with --endpoint its name there")


def is_ours(model: str) -> bool:
    """Whether a model is a directory that this project's training wrote."""
    return (Path(model) / "lineage.json").is_file()
