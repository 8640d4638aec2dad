"""A vLLM server on loopback as the engine of plain models (`export.SERVED`): it computes, tokens and pictures are ours.

A picture is rendered once (`/v1/chat/completions/render`, the prepared pixels as PNG, which vLLM's processor takes as
they are): what comes back stands for it, at the place of the image tokens. Everything is asked by exact token ids
(`/inference/v1/generate`), so vLLM reads no text of strangers: an option by the log-likelihood of its tokens and end
token (`prompt_logprobs`), as `Predictor.score` has it, a chat by greedy tokens that are read here. The end token needs
a context of its own for each option, so options of one token cost a request each, too: `logprob_token_ids` would leave
it out.

Needs `vllm serve --enable-scale-out --generation-config vllm --served-model-name DIGEST`, with the digest of the model.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import numpy as np
from PIL import Image

from facemllm.errors import UserError, one_line
from facemllm.model.decoding import steering
from facemllm.model.inference import Query, Scored
from facemllm.model.reader import Reader
from facemllm.serve.engine.export import require_served
from facemllm.serve.engine.pieces import Pieces, settled, streamed
from facemllm.serve.engine.protocol import Chat, Found, Prepared
from facemllm.serve.engine.room import IDLE, Room, UnderWay, cost_of, require_short
from facemllm.serve.engine.turns import Turns
from facemllm.serve.engine.vllm_client import GENERATE, JSON, RENDER, VllmClient, readable, refusal
from facemllm.serve.language import Refused

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STEERED = {"repetition_penalty"}  # which vLLM counts as transformers does: over prompt and answer
_PROBE: Chat = (("user", "Is this a face?"), ("assistant", "yes"), ("user", "Whose?"))
_START_SECONDS = 60.0
_POLL_SECONDS = 0.5

T = TypeVar("T")


class VllmEngine:
    """Answers by a vLLM server at `url`, which has to serve the model `digest`. `at_once` bounds requests to it,
    `cache_mb` what is kept of rendered pictures."""

    takes_maps = False
    characteristic_names: tuple[str, ...] = ()

    def __init__(
        self,
        reader: Reader,
        url: str,
        digest: str,
        *,
        room: Room | None = None,
        max_new_tokens: int = 96,
        cache_mb: float = 64,
        at_once: int = 64,
    ) -> None:
        require_served(reader.config.model_type, "this one")
        self._steered = steering(reader.generation_config)
        if self._steered.keys() - _STEERED:
            raise UserError(
                "this model's generation_config.json asks for more than the likeliest token, which vLLM would do "
                "otherwise: serve it with the own engine, serve.engine.name: own"
            )
        self.reader, self._url, self._digest = reader, url.rstrip("/"), digest
        self._turns = Turns(room or Room(), at_once)
        self.counters = self._turns.counters
        self._longest = max_new_tokens
        self._context = int(getattr(reader.config.get_text_config(), "max_position_embeddings", 0) or 2**20)
        ends = reader.generation_config.eos_token_id
        self._ends = list(ends) if isinstance(ends, list) else [ends]
        self._rendered: OrderedDict[tuple[str, ...], bytes] = OrderedDict()
        self._most, self._held = int(cache_mb * 2**20), 0
        self._client = VllmClient(self._url, at_once)

    def make_ready(self, wait_s: float = 0.0) -> None:
        """Wait so long for the server, and prove that it serves this model and reads it as we do. Raises UserError."""
        until = time.monotonic() + wait_s
        with httpx.Client(base_url=self._url, timeout=_START_SECONDS, trust_env=False) as client:
            while True:
                try:
                    listed = client.get("/v1/models").raise_for_status().json()["data"][0]
                    break
                except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
                    if time.monotonic() >= until:
                        raise UserError(
                            f"no vLLM server answers at {self._url} ({type(error).__name__}): start it, or give "
                            "another serve.engine.vllm_url; serve.engine.vllm_wait_s is how long it may take to start"
                        ) from None
                    time.sleep(_POLL_SECONDS)
            if listed.get("id") != self._digest:
                raise UserError(
                    f"the vLLM server at {self._url} serves {str(listed.get('id'))[:64]!r}, not this model: start it "
                    f"with --served-model-name {self._digest}"
                )
            self._context = min(self._context, int(listed.get("max_model_len") or self._context))
            try:
                self._prove(client)
            except httpx.HTTPError as error:
                raise UserError(f"the vLLM server at {self._url} failed at a grey picture: {error}") from None
            except (ValueError, LookupError, TypeError) as error:
                raise UserError(
                    f"the vLLM server at {self._url} answered about a grey picture what cannot be used "
                    f"({one_line(error)}): it is of another version than docs/serving.md names, or changes pictures"
                ) from None

    def _prove(self, client: httpx.Client) -> None:
        grey = np.full(self.reader.prepared, 128, np.uint8)
        answer = client.post(RENDER, json=self._to_render(grey, _PROBE))
        if answer.status_code == 403:
            raise UserError(f"the vLLM server at {self._url} was started without --enable-scale-out: add it")
        rendered = answer.raise_for_status().json()
        if rendered["token_ids"] != self.reader.rendered(grey, _PROBE):
            raise UserError(
                f"the vLLM server at {self._url} makes other tokens of a chat than this model's processor: it serves "
                "another folder, or its chat template is set by --chat-template"
            )
        features = self._features_of(rendered)
        prompt = self.reader.chat([("user", "Is this a face?")])
        body = self._to_score(prompt, self.reader.frame.answer("yes"), features)
        answer = client.post(GENERATE, content=body, headers=JSON)
        answer.raise_for_status()
        _likelihood(answer.json(), self.reader.frame.answer("yes"))

    def check(self, *, client: str = "", deadline: float = math.inf, under_way: UnderWay = IDLE) -> None:
        """Raise Refused (429) where `answer` would now. See `Engine`."""
        self._turns.check(client, deadline, under_way=under_way)

    async def answer(
        self,
        face: Prepared,
        closed: Sequence[Query],
        open_: Sequence[Chat],
        *,
        characteristics: bool = False,
        client: str = "",
        deadline: float = math.inf,
    ) -> Found:
        """All answers about one face. See `Engine`."""
        asked = [self._asked(query) for query in closed]
        chats = [self._prompt(chat, self._longest) for chat in open_]
        cost = cost_of(len(closed), len(open_))
        async with self._turns.admitted(client, deadline, cost):
            features = await self._features(face, client)
            scores = [self._score(prompt, tokens, features, client) for prompt, own in asked for tokens in own]
            texts = [self._write(prompt, features, client) for prompt in chats]
            likely, written = await _all(_all_of(scores), _all_of(texts))
        scored = []
        rest = iter(likely)
        for _, own in asked:
            scored.append(_scored([next(rest) for _ in own]))
        return Found(tuple(scored), tuple(written))

    async def stream(
        self, face: Prepared, chat: Chat, *, client: str = "", deadline: float = math.inf
    ) -> AsyncIterator[str]:
        """The answer to a chat in pieces. See `Engine`."""
        pieces: Pieces = asyncio.Queue()
        prompt = self._prompt(chat, self._longest)

        async def work() -> None:
            async with self._turns.admitted(client, deadline, cost_of(0, 1)):
                await self._say(prompt, await self._features(face, client), client, pieces)

        async with aclosing(streamed(work(), pieces)) as streaming:
            async for piece in streaming:
                yield piece

    def close(self, seconds: float | None = None) -> None:
        """Nothing is held but connections, which end with the process."""

    def _asked(self, query: Query) -> tuple[list[int], list[list[int]]]:
        """Token ids of a closed question and of each of its options. Raises Refused."""
        if not query.options:
            raise ValueError(f"the question {query.question!r} has no options; ask it as an open one")
        require_short(query)
        options = [self.reader.frame.answer(text) for text in query.options]
        return self._prompt([("user", query.question)], max(map(len, options)) + 1), options

    def _prompt(self, chat: Chat, room: int) -> list[int]:
        """Token ids of a chat, which leaves room for so many more. Raises Refused."""
        try:
            ids = self.reader.chat(chat)
        except ValueError as error:
            raise Refused(422, str(error)) from None
        if (length := len(ids) + room) > self._context:
            takes = f"this model takes {self._context}"
            raise Refused(413, f"the image, the chat and its answer are {length} tokens; {takes}")
        return ids

    async def _features(self, face: Prepared, client: str) -> bytes:
        """What stands for a face in requests, as JSON; kept for those asked about last."""
        if (found := self._rendered.get(face.key)) is not None:
            self._rendered.move_to_end(face.key)
            return found
        body = await asyncio.to_thread(self._to_render, face.pixels, (("user", "?"),))
        made = await self._post(RENDER, lambda: json.dumps(body).encode(), client, self._features_of)
        if face.key not in self._rendered:
            self._rendered[face.key] = made
            self._held += len(made)
            while self._held > self._most:
                self._held -= len(self._rendered.popitem(last=False)[1])
        return made

    def _to_render(self, pixels: NDArray[np.uint8], chat: Chat) -> dict[str, Any]:
        """A chat about prepared pixels, which are sent without loss."""
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        messages: list[dict[str, Any]] = [
            {"role": role, "content": [{"type": "text", "text": text}]} for role, text in chat
        ]
        messages[0]["content"].insert(0, {"type": "image_url", "image_url": {"url": url}})
        return {"model": self._digest, "messages": messages, "max_tokens": 1, "temperature": 0}

    def _features_of(self, rendered: Any) -> bytes:
        """Of a rendered chat, which has to begin as ours do: then the picture stands there in every prompt. vLLM may
        count tokens around it to it, without saying which: its place becomes the run of its own tokens."""
        frame, features = self.reader.frame, rendered["features"]
        prefix = list(frame.prefix_ids)
        (place,) = features["mm_placeholders"]["image"]
        start, count = prefix.index(frame.image_token_id), prefix.count(frame.image_token_id)
        if rendered["token_ids"][: len(prefix)] != prefix or {*prefix[start : start + count]} != {frame.image_token_id}:
            raise ValueError("image tokens stand elsewhere")
        if not place["offset"] <= start < start + count <= place["offset"] + place["length"]:
            raise ValueError(f"{place['length']} image tokens")
        features["mm_placeholders"]["image"] = [{"offset": start, "length": count}]
        return json.dumps(features, separators=(",", ":")).encode()

    def _to_score(self, prompt: Sequence[int], answer: Sequence[int], features: bytes) -> bytes:
        return self._request([*prompt, *answer], features, {"prompt_logprobs": 0, "max_tokens": 1})

    def _to_write(self, prompt: Sequence[int], features: bytes, **more: Any) -> bytes:
        sampling = {"max_tokens": self._longest, "stop_token_ids": self._ends, **self._steered}
        return self._request(prompt, features, sampling, **more)

    def _request(self, ids: Sequence[int], features: bytes, sampling: dict[str, Any], **more: Any) -> bytes:
        """A request by token ids. The picture, which may be megabytes, is not made JSON again."""
        rest = {"model": self._digest, "sampling_params": {"temperature": 0, "detokenize": False, **sampling}, **more}
        head = json.dumps({**rest, "token_ids": list(ids)}, separators=(",", ":")).encode()
        return head[:-1] + b',"features":' + features + b"}"

    async def _score(self, prompt: Sequence[int], answer: Sequence[int], features: bytes, client: str) -> _Likelihood:
        return await self._post(
            GENERATE,
            lambda: self._to_score(prompt, answer, features),
            client,
            lambda found: _likelihood(found, answer),
        )

    async def _write(self, prompt: Sequence[int], features: bytes, client: str) -> str:
        return await self._post(
            GENERATE,
            lambda: self._to_write(prompt, features),
            client,
            lambda found: self.reader.text(found["choices"][0]["token_ids"]),
        )

    async def _say(self, prompt: Sequence[int], features: bytes, client: str, pieces: Pieces) -> None:
        """Write an answer, telling what is new but for the last word, which may still change."""
        written: list[int] = []
        said = ""
        body = self._to_write(prompt, features, stream=True)
        async with self._turns.turn(client), self._client.asked(GENERATE, body) as answer:
            async for line in answer.aiter_lines():
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:") or data == "[DONE]":
                    continue
                with readable():
                    event = json.loads(data)
                    if "error" in event:
                        raise refusal(500)
                    written += [token for choice in event["choices"] for token in choice["token_ids"] or ()]
                    text = settled(self.reader.text(written))
                if text.startswith(said) and text != said:
                    pieces.put_nowait(text[len(said) :])
                    said = text
        text = self.reader.text(written)
        if text[len(said) :]:
            pieces.put_nowait(text[len(said) :])

    async def _post(self, path: str, body: Callable[[], bytes], client: str, read: Callable[[Any], T]) -> T:
        """What `read` makes of the answer to a request, asked in its client's turn; until then it has no body, which
        may be megabytes. Raises Refused."""
        async with self._turns.turn(client), self._client.asked(path, body()) as answer:
            with readable():
                return read(json.loads(await answer.aread()))


_Likelihood = tuple[float, bool]
"""Summed log-likelihood of an answer's tokens, and whether greedy decoding would write each of them."""


def _likelihood(found: Any, answer: Sequence[int]) -> _Likelihood:
    """Of the last tokens of a prompt."""
    total, greedy = 0.0, True
    for token, known in zip(answer, found["prompt_logprobs"][-len(answer) :], strict=True):
        total += float(known[str(token)]["logprob"])
        greedy &= known[str(token)]["rank"] == 1
    return total, greedy


def _scored(options: Sequence[_Likelihood]) -> Scored:
    """What `Predictor.score` makes of the likelihoods of a question's options."""
    total = np.array([likelihood for likelihood, _ in options])
    relative = np.exp(total - total.max())
    written = [place for place, (_, greedy) in enumerate(options) if greedy]
    return Scored(tuple(float(p) for p in relative / relative.sum()), written[0] if written else None)


async def _all(*coroutines: Coroutine[Any, Any, Any]) -> list[Any]:
    """The results of all, at once; the first that fails ends the others."""
    running = [asyncio.create_task(one) for one in coroutines]
    try:
        return list(await asyncio.gather(*running))
    finally:
        for one in running:
            one.cancel()


async def _all_of(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    return await _all(*coroutines)
