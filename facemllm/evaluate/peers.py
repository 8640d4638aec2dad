"""`facemllm evaluate`: any model on any conversations, and a report of it; ours, or by the same questions another's.

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
import time
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
from facemllm.asking.bill import Bill, announcement
from facemllm.asking.endpoint import EndpointSender, parameters, reach, sender
from facemllm.asking.requests import Filtered, JobStopped, MakeRequest, Reply, Request, Sender, content_key, encoded
from facemllm.asking.store import Replies, replies
from facemllm.core import digests, progress
from facemllm.core.files import require_absent
from facemllm.errors import UserError
from facemllm.evaluate import run
from facemllm.evaluate.predict import KINDS, Put, Shown, puts
from facemllm.report.run import write_report
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

    @property
    def takes_maps(self) -> bool:
        """Others are shown the picture alone."""
        return False

    @property
    def digest(self) -> str:
        """SHA-256 of what identifies the model."""
        return digests.of_json(self.identity)

    def answer(self, shown: Sequence[Shown]) -> Iterator[dict[str, Any]]:
        """Answers in order. Raises UserError when the model can answer nothing more now, or when one of these questions
        got no usable answer; what was answered is in the store then."""
        asked: list[tuple[Put, str]] = []
        wanted = []
        for face in shown:
            picture = cache(partial(encoded, face.image, self.image_side))  # once for all questions, if one is asked
            for put in face.asked:
                asked.append((put, words(put)))
                wanted.append(self._wanted(face, picture, asked[-1][1]))
        try:
            said = replies(self.home, self.sender, wanted)
        except JobStopped as stop:
            with suppress(JobStopped), closing(Replies(self.home)) as store:
                for one, (image_id, key, _) in zip(asked, wanted, strict=True):
                    if (kept := store.read(image_id, key)) is not None:
                        self._row(*one, kept)  # which counts it
            raise UserError(f"evaluation stopped: {stop}. What was answered is kept; run again to go on") from None
        rows = [self._row(*one, reply) for one, reply in zip(asked, said, strict=True)]
        _require_all(said)
        yield from rows

    def _row(self, put: Put, text: str, reply: Reply | Exception) -> dict[str, Any]:
        """An answer as it is kept; it is counted by what becomes of it."""
        filtered = isinstance(reply, Filtered) or (isinstance(reply, Reply) and not reply.text and _is_filtered(reply))
        said = reply.text if isinstance(reply, Reply) and not filtered else DECLINED if filtered else None
        raw = (said or "").encode("utf-8", "replace").decode()  # JSON can hold half a surrogate pair
        parsed = None if filtered else tasks.read(put.question, raw)
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
        return {"raw": raw[-LONGEST:], "parsed": parsed, "question": text}

    def key(self, image_id: str, change: str, text: str) -> str:
        """The content key of the reply to a question in words about a picture, to which `change` was done."""
        # what was done to the picture is part of what is seen
        return content_key(f"{image_id} {change}".strip(), digests.of_json(_messages(text)), self.digest, None)

    def _wanted(self, face: Shown, picture: Callable[[], bytes], text: str) -> tuple[str, str, MakeRequest]:
        messages, image_id = _messages(text), face.face["image_id"]
        key, prompt = self.key(image_id, face.change, text), digests.of_json(messages)

        def request() -> Request:
            return Request(image_id=image_id, key=key, prompt_hash=prompt, messages=messages, picture=picture())

        return image_id, key, request


def _messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "text": text}]


def _is_filtered(reply: Reply) -> bool:
    return reply.finish.lower() in ("content_filter", "safety")


def _require_all(said: Sequence[Reply | Exception]) -> None:
    """Raises UserError unless each is an answer; one that a filter declined is."""
    missing = Counter(str(one) for one in said if isinstance(one, Exception) and not isinstance(one, Filtered))
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
class _Reached:
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


def evaluate(settings: Settings, model: str, conversations: Path, out: Path, *, endpoint: bool) -> Mapping[str, Any]:
    """Evaluate into the folder `out`, `report.html` included; returns the metrics.

    `model` is a directory of ours, else one of transformers; at an endpoint, the settings name it. Raises UserError
    when it cannot be found, asked or go on, the ledger forbids it, `out` exists, or the split holds no questions; then
    `out` is not made, and what a peer answered is in the store.
    """
    require_absent(out)
    if not endpoint:
        check_name(model)
    sources = open_table(conversations, CONVERSATIONS).sources
    ledger.require(settings, sources, "evaluate")
    started, rows = time.monotonic(), ledger.entries(settings)

    def report(folder: Path, metrics: Mapping[str, Any]) -> None:
        summary = {
            "run": out.name,
            "profile": settings.profile,
            "seconds": time.monotonic() - started,
            "tasks": metrics["tasks"],
            "closed_mean": metrics["closed_mean"],
            "sources": [rows[name].model_dump(mode="json") for name in sources],
            "model": {"digest": metrics["model_digest"], "name": model if endpoint else Path(model).name},
        }
        write_report(folder / "report.html", summary, folder, source=", ".join(sources))

    if not endpoint and is_ours(model):
        digest = digests.of_tree(Path(model))
        return run.evaluate(settings, Path(model), digest, conversations, out, finish=report)
    peer = at_endpoint(settings, conversations) if endpoint else on_this_machine(settings, model)
    about = {"model_digest": peer.digest, "model": {**peer.identity, "name": peer.name}}
    asks = peer.sender.sender if isinstance(peer.sender, _Reached) else peer.sender
    count, missing, characters = _to_ask(settings, peer, conversations)
    if missing and isinstance(asks, EndpointSender):
        progress.event(note=announcement(asks, count, missing, characters))
    with Bill(asks, peer.name, count, peer.outcomes) as bill:

        def finish(folder: Path, metrics: Mapping[str, Any]) -> None:
            (folder / "bill.json").write_bytes(bill.encoded())
            report(folder, metrics)

        return run.answered(settings, lambda: (peer, None), about, conversations, out, finish)


def _to_ask(settings: Settings, peer: Peer, conversations: Path) -> tuple[int, int, int]:
    """How many questions an evaluation has, how many of them are not answered yet, and the characters of those."""
    table, split = open_table(conversations, CONVERSATIONS), settings.evaluate.split
    disturbed = set(run.drawn(table, split, settings.evaluate.disturbed_faces))
    count = missing = characters = 0
    with closing(Replies(peer.home)) as store:
        for face in table.iterate(["image_id", "messages", "turns"], split):
            for put in puts(face):
                text, image_id = words(put), face["image_id"]
                for change in ("", *(KINDS if image_id in disturbed and run.is_native(put.question) else ())):
                    count += 1
                    if store.read(image_id, peer.key(image_id, change, text)) is None:
                        missing, characters = missing + 1, characters + len(text)
    return count, missing, characters


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
    asks = _Reached(sender(settings, account, backoff_s=backoff_s))
    return Peer(name=name, identity=identity, image_side=shape["image_side"], sender=asks, home=settings.home)


def on_this_machine(settings: Settings, model: str) -> Peer:
    """A model that transformers opens as an image-text-to-text model: a folder, or an id of the hub. Raises UserError
    when there is none, or its weights are no safetensors."""
    check_name(model)
    folder = local.folder_of(str(Path(model).resolve()) if Path(model).is_dir() else model, "MODEL")
    weights, shape = local.digest_of(folder), parameters(settings)
    asks = local.Generated(folder, settings.home, weights, shape["max_tokens"], shape["temperature"])
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
