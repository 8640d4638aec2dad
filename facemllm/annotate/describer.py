"""An annotator that is a model: asks it about each row, checks its reply, has it mended once, and refuses what is left.

Who answers is a `Sender`'s matter: an OpenAI-compatible endpoint (`annotator: endpoint`), or a model on this machine
(`local`). What is asked, how replies are named, kept, read and turned into annotations is the same for both. Replies
come from the store first. A row is described by its own reply alone, so neither batches, nor tasks, nor how often the
job was killed shows in the result.

What it costs is said before (`estimate`) and after (`asking.bill`). In the table the cost of a row is its tokens at the
configured prices, once for each row, so it is the same however the job went; what was really paid stands in the bill.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from facemllm.annotate import prompt
from facemllm.annotate.annotator import Annotation
from facemllm.annotate.prompt import Misfit
from facemllm.asking import local as local_model
from facemllm.asking.bill import expected
from facemllm.asking.endpoint import EndpointSender, parameters, sender
from facemllm.asking.requests import Reply, Request, RowRefused, Sender, content_key, reduced
from facemllm.asking.store import Opening, Replies, price, replies
from facemllm.core import digests, progress
from facemllm.errors import UserError
from facemllm.settings import Settings
from facemllm.tables import FACES, open_table
from facemllm.version import ledger


@dataclass(frozen=True, kw_only=True)
class Describer:
    """A model that describes rows of `faces`. `model` and `parameters` name the model in the keys of replies.
    `model_digest` stands in provenance. `forbidden` has the reason why rows of a source must not be shown to it. Prices
    are per million tokens."""

    name: str
    model: str
    model_digest: str
    parameters: Mapping[str, Any]
    sender: Sender
    home: Path
    opening: Opening
    forbidden: Mapping[str, str] = field(default_factory=dict)
    input_price: float | None = None
    output_price: float | None = None
    gpus: float = 0.0
    one_machine: bool = False
    needs_image: bool = True
    columns: tuple[str, ...] = ("image_id", "source", *prompt.COLUMNS)

    @property
    def digest(self) -> str:
        """SHA-256 of what decides the answers: model, parameters, words, and how replies are read."""
        return digests.of_json([self.model_digest, self.parameters, prompt.template_digest(), prompt.READING])

    def annotate(self, rows: Sequence[Mapping[str, Any]]) -> list[Annotation | Exception]:
        """What the model says of each row; RowRefused where it may not look, gives no answer, or none that fits."""
        done: list[Annotation | Exception | None] = [
            RowRefused(self.forbidden[row["source"]]) if row["source"] in self.forbidden else None for row in rows
        ]
        asked = {place: prompt.messages(rows[place]) for place, refused in enumerate(done) if refused is None}
        first = self._replies(rows, asked, repair=False)
        mending: dict[int, prompt.Messages] = {}
        for place, reply in first.items():
            try:
                done[place] = self._annotation(asked[place], [reply])
            except Misfit as misfit:
                assert isinstance(reply, Reply)
                mending[place] = prompt.repair(asked[place], reply.text or "", str(misfit))
        for place, reply in self._replies(rows, mending, repair=True).items():
            try:
                done[place] = self._annotation(asked[place], [first[place], reply])
            except Misfit as misfit:
                done[place] = RowRefused(f"the model's reply does not fit, nor does the mended one: {misfit}")
        assert None not in done
        return [answer for answer in done if answer is not None]

    def kept_by(self, opening: Opening) -> Describer:
        """The same, with its replies kept there."""
        assert isinstance(self.sender, local_model.Generated)
        return replace(self, opening=opening, sender=replace(self.sender, opening=opening))

    def request(self, row: Mapping[str, Any], messages: prompt.Messages, repair: bool = False) -> Request:
        """The request about a row. Raises RowRefused when its picture cannot be used."""
        return Request(
            image_id=row["image_id"],
            key=self.key(row["image_id"], messages),
            prompt_hash=digests.of_json(messages),
            messages=messages,
            picture=reduced(row["image"]["bytes"], self.parameters["image_side"]),
            repair=repair,
        )

    def key(self, image_id: str, messages: prompt.Messages) -> str:
        """The content key of a reply: picture, words, model, parameters."""
        return content_key(image_id, digests.of_json(messages), self.model, self.parameters)

    def _replies(
        self, rows: Sequence[Mapping[str, Any]], asked: Mapping[int, prompt.Messages], *, repair: bool
    ) -> dict[int, Reply | Exception]:
        """A reply, or why there is none, for every place that asks."""
        wanted = [
            (
                rows[place]["image_id"],
                self.key(rows[place]["image_id"], messages),
                partial(self.request, rows[place], messages, repair),
            )
            for place, messages in asked.items()
        ]
        return dict(zip(asked, replies(self.opening, self.sender, wanted), strict=True))

    def _annotation(self, asked: prompt.Messages, given: Sequence[Reply | Exception]) -> Annotation | Exception:
        """The annotation that the last reply gives, at the price of all. Raises Misfit when it does not fit."""
        for reply in given:
            if isinstance(reply, Exception):
                return reply
        paid = [reply for reply in given if isinstance(reply, Reply)]
        if paid[-1].text is None:
            return RowRefused(f"the model's reply cannot be used: {paid[-1].error}")
        try:
            said = prompt.read(paid[-1].text)
        except Misfit:
            if paid[-1].finish == "length":
                limit = self.parameters["max_tokens"]
                raise Misfit(f"it was cut off after {limit} tokens; be shorter") from None
            raise
        by = {"origin": "annotator", "model_digest": self.model_digest, "prompt_hash": digests.of_json(asked)}
        return Annotation(
            caption=said["caption"],
            labels={column: value for column, value in said.items() if column != "caption"},
            cost=sum(self._price(reply) for reply in paid),
            by=dict.fromkeys(said, by),
        )

    def _price(self, reply: Reply) -> float:
        return price(reply.prompt_tokens, reply.completion_tokens, self.input_price, self.output_price) or 0.0


def endpoint(settings: Settings, sources: Iterable[str], backoff_s: float = 1.0) -> Describer:
    """The configured endpoint, for a table of these sources. Rows of a source that the ledger keeps from third parties
    are refused with its reason and never leave the machine. Raises UserError when its address or key cannot be used, or
    when no source may be sent to it."""
    chosen, shape = settings.annotate.endpoint, parameters(settings)
    model = str(settings.annotate.vision_language.model)
    account = digests.of_json([model, prompt.template_digest(), shape])[:16]
    return Describer(
        name="endpoint",
        model=model,
        model_digest=digests.of_json(["endpoint", model, shape]),
        parameters=shape,
        sender=sender(settings, account, prompt.schema(), backoff_s),
        home=settings.home,
        opening=partial(Replies, settings.home),
        one_machine=True,  # the account is in a database that machines must not share
        forbidden=_forbidden(settings, sources) if chosen.third_party else {},
        input_price=chosen.input_price,
        output_price=chosen.output_price,
    )


def local(settings: Settings) -> Describer:
    """The configured model, on our own machines. Nothing leaves them, so the ledger has no say. Each Ray task takes a
    GPU where there are any. Raises UserError when the model is not there or is none that may be loaded."""
    chosen = settings.annotate.vision_language
    path = local_model.folder_of(str(chosen.model))
    digest, opening = local_model.digest_of(path), partial(Replies, settings.home)
    return Describer(
        name="local",
        model=digest,
        model_digest=digest,
        parameters=parameters(settings),
        sender=local_model.Generated(path, opening, digest, chosen.max_tokens, chosen.temperature),
        home=settings.home,
        opening=opening,
        gpus=1.0,
    )


def _forbidden(settings: Settings, sources: Iterable[str]) -> dict[str, str]:
    """The sources whose pictures must not be sent to a third party, with the ledger's reason. Raises UserError when
    that is all of them."""
    reasons: dict[str, str] = {}
    named = sorted(set(sources))
    for source in named:
        try:
            ledger.require(settings, [source], "third_party")
        except UserError as error:
            reasons[source] = str(error)
    if named and len(reasons) == len(named):
        ledger.require(settings, named, "third_party")
    return reasons


def estimate(settings: Settings, faces: Path) -> dict[str, Any]:
    """What annotating the table would ask for: `rows`, of which `stored` are answered already and `ledger_refused` must
    not be sent; `requests` left, without repairs; `prompt_tokens` and `completion_tokens` they may use; `price`, None
    without prices; `measured`, whether the tokens are the account's own averages. Raises UserError as `annotate` would:
    no sound table, no source that may be sent, no key."""
    table = open_table(faces, FACES)
    chosen = settings.annotate
    found: dict[str, Any] = {"annotator": chosen.annotator, "rows": table.rows}
    if chosen.annotator != "endpoint":
        return {**found, "requests": 0, "price": 0.0}
    model = endpoint(settings, table.sources)
    stored = refused = requests = characters = 0
    with closing(Replies(model.home)) as replies, progress.bar("estimating", table.rows) as bar:
        for number, row in enumerate(table.iterate(list(model.columns)), start=1):
            messages = prompt.messages(row)
            if row["source"] in model.forbidden:
                refused += 1
            elif replies.read(row["image_id"], model.key(row["image_id"], messages)) is not None:
                stored += 1
            else:
                requests += 1
                characters += sum(len(message["text"]) for message in messages)
            bar.update(number)
    assert isinstance(model.sender, EndpointSender)
    return {
        **found,
        "model": model.model,
        "stored": stored,
        "ledger_refused": refused,
        "requests": requests,
        **expected(model.sender, requests, characters),
    }
