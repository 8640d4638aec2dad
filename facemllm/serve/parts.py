"""What `Service` is put together from: the parts that it needs, as far as it needs them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from facemllm.serve.language import Encoded
from facemllm.tasks.base import Item, Question

if TYPE_CHECKING:
    from facemllm.model.inference import Query, Scored

Chat = Sequence[tuple[str, str]]
"""(role, text) by turns, the user's question last."""


class Match(Protocol):
    """A question that was understood: the item it asks for, and the taught wording that the model is given."""

    @property
    def question(self) -> Question:
        """What it asks for."""

    @property
    def wording(self) -> str:
        """How the model is asked."""

    def reply(self, item: Item, value: str, text: str) -> str:
        """The words of an answer to what was asked; `text` says the item's `value`."""


class Matcher(Protocol):
    """Knows which item a question asks for."""

    def match(self, text: str) -> Match | None:
        """The item that a text asks for; None if it asks for something else."""

    def suggestions(self, text: str, count: int = 3) -> list[str]:
        """Taught questions that come near a text."""

    def about_faces(self, text: str) -> bool:
        """Whether a question that asks for no item may be answered in free text."""


class Refusal(Protocol):
    """Why something is not answered."""

    @property
    def rule(self) -> str:
        """Name of the rule."""

    @property
    def reason(self) -> str:
        """One line for the client."""


class Policy(Protocol):
    """Knows what may not be asked here."""

    def refuses(self, text: str) -> Refusal | None:
        """Why a text may not be asked."""

    def refuses_task(self, task: str) -> Refusal | None:
        """Why a task may not be asked."""

    def describe(self) -> dict[str, Any]:
        """The policy, for people."""


class Face(Protocol):
    """A decoded picture as the engine takes it; `facts` are what was measured of it."""

    @property
    def facts(self) -> Mapping[str, float]:
        """Sharpness, brightness, size."""


class Decoder(Protocol):
    """Decodes pictures within bounds."""

    async def prepared(
        self, image: Encoded, map: Encoded | None, box: tuple[float, float, float, float] | None
    ) -> Face:
        """The face of a picture. Raises Refused."""


class RefusesPicture(Protocol):
    """Knows which pictures are worse than those that evaluation covers."""

    def __call__(self, facts: Mapping[str, float]) -> str | None:
        """Why nothing should be said of a picture with these facts."""


class Found(Protocol):
    """What an engine found of a face, in the order asked."""

    @property
    def scored(self) -> Sequence[Scored]:
        """Of each closed question."""

    @property
    def texts(self) -> Sequence[str]:
        """Of each open one."""

    @property
    def characteristics(self) -> Mapping[str, float]:
        """Probability of each characteristic, by name, if asked for."""


class Engine(Protocol):
    """Answers with the model. `deadline` is in seconds of `time.monotonic()`; both raise Refused (429, 503, 504)."""

    @property
    def takes_maps(self) -> bool:
        """Whether the model looks at maps of face parts."""

    @property
    def characteristic_names(self) -> tuple[str, ...]:
        """Those it scores."""

    async def answer(
        self,
        face: Any,
        closed: Sequence[Query],
        open_: Sequence[Chat],
        *,
        characteristics: bool,
        client: str,
        deadline: float,
    ) -> Found:
        """Score closed questions and answer open ones about one face."""

    def stream(self, face: Any, chat: Chat, *, client: str, deadline: float) -> AsyncIterator[str]:
        """The answer to one open question, piece by piece."""


class Tokens(Protocol):
    """Counts tokens as the model sees them, for OpenAI's `usage`."""

    def asked(self, chat: Chat) -> int:
        """Tokens of a chat about a picture, the picture's own included."""

    def said(self, text: str) -> int:
        """Tokens of an answer."""
