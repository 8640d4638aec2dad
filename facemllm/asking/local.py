"""A vision-language model on this machine, asked as an endpoint is.

Any checkpoint that `model.base` may be, from a folder or the hub: opened, and refused, by the same loader. It is shown
whole pictures, as its own processor takes them. It is loaded once a process, on a GPU (bfloat16) where there is one,
else in float32, and answers a few rows at a time. Batches are padded, which can move the last bits of its numbers: a
row's words may, rarely, depend on the rows it is answered with. What it said is kept, though, and read from the store
ever after. With a temperature rows are answered one by one, each from its own seed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

from facemllm.asking.requests import JobStopped, MakeRequest, Reply, Request, TooLong, too_long
from facemllm.asking.store import Kept, Opening
from facemllm.core import digests
from facemllm.core.files import fetched
from facemllm.errors import UserError, one_line

BATCH = 8


@dataclass(frozen=True)
class Generated:
    """Answers with the model of a folder, in the worker's own process."""

    folder: Path
    opening: Opening
    digest: str
    max_tokens: int
    temperature: float

    @cached_property
    def one_picture(self) -> str:
        """Why the model takes one picture only; empty where it takes several. Raises JobStopped if it cannot load."""
        return refusal_of_several(*_loaded(self.folder))

    def send(self, requests: Sequence[MakeRequest]) -> list[Reply | Exception]:
        """A stored reply to each request, in order; in the place of one whose picture cannot be used RowRefused, of one
        that is more than the model reads TooLong."""
        answers: list[Reply | Exception] = []
        size = 1 if self.temperature else BATCH
        with closing(self.opening()) as store:
            for start in range(0, len(requests), size):
                made = [_made(make) for make in requests[start : start + size]]
                replies = iter(self._replies(store, [one for one in made if isinstance(one, Request)]))
                answers += [next(replies) if isinstance(one, Request) else one for one in made]
        return answers

    def _replies(self, store: Kept, requests: list[Request]) -> list[Reply | TooLong]:
        if not requests:
            return []
        started = time.monotonic()
        replies: list[Reply | TooLong] = []
        for request, said in zip(requests, generate(self, requests), strict=True):
            if isinstance(said, TooLong):
                replies.append(said)
                continue
            text, prompt, completion = said
            seconds = (time.monotonic() - started) / len(requests)
            finish = "length" if completion >= self.max_tokens else "stop"
            counts = {"prompt_tokens": prompt, "completion_tokens": completion}
            reply = Reply.now(request, self.digest, seconds, text=text, finish=finish, **counts)
            store.write(reply)
            replies.append(reply)
        return replies


def folder_of(model: str, setting: str = "annotate.vision_language.model") -> Path:
    """The folder of a model: itself, relative to the project, or what the hub's cache holds under its id. Raises
    UserError when there is none, or when its weights are no safetensors; `setting` is where it was named."""
    folder = fetched(model, setting)
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{setting}: {folder} holds no *.safetensors; nothing else is loaded")
    return folder


def digest_of(folder: Path) -> str:
    """SHA-256 of the names and bytes of all files in the folder. Read once a process while they are unchanged."""
    files = sorted((p.relative_to(folder).as_posix(), p.stat()) for p in folder.rglob("*") if p.is_file())
    return _digest(folder, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in files))


@lru_cache(maxsize=4)
def _digest(folder: Path, files: tuple[tuple[str, int, int], ...]) -> str:
    return digests.of_tree(folder)


def _made(make: MakeRequest) -> Request | Exception:
    try:
        return make()
    except Exception as error:
        return error


def generate(model: Generated, requests: Sequence[Request]) -> list[tuple[str, int, int] | TooLong]:
    """Of each request the model's text, and how many tokens its prompt and its answer have; or that it is too long."""
    import torch
    from PIL import Image

    network, processor = _loaded(model.folder)
    chats = [_chat(request) for request in requests]
    pictures = [[Image.open(BytesIO(one)).convert("RGB") for one in request.pictures] for request in requests]
    options: dict[str, Any] = {"do_sample": False}
    if model.temperature:
        torch.manual_seed(int(requests[0].key[:15], 16))
        options = {"do_sample": True, "temperature": model.temperature}
    try:
        return [*written(network, processor, chats, pictures, max_new_tokens=model.max_tokens, **options)]
    except TooLong as error:
        return [error] if len(requests) == 1 else [said for one in requests for said in generate(model, [one])]


def written(
    network: Any, processor: Any, chats: Sequence[Any], pictures: Sequence[Sequence[Any]], **options: Any
) -> list[tuple[str, int, int]]:
    """What a model of transformers writes to chats about pictures (PIL, RGB), by its processor and chat template; and
    how many tokens prompt and answer have. Several chats need a processor that pads on the left. Raises TooLong when
    one is more than the model reads."""
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    import torch

    shown = [list(own) for own in pictures]
    # a template that writes the start token itself gets no second one, as in transformers
    start = processor.tokenizer.bos_token
    plain = {"add_special_tokens": False} if start is not None and texts[0].startswith(start) else {}
    inputs = processor(text=texts, images=shown, padding=True, return_tensors="pt", **plain)
    longest = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and int(inputs["attention_mask"].sum(1).max()) > longest:
        raise too_long(longest)
    inputs = inputs.to(network.device, network.dtype)
    length = inputs["input_ids"].shape[1]
    with torch.inference_mode():
        output = network.generate(**inputs, **options)
    said = []
    ends = {processor.tokenizer.pad_token_id, processor.tokenizer.eos_token_id}
    for mask, tokens in zip(inputs["attention_mask"], output[:, length:], strict=True):
        text = processor.tokenizer.decode(tokens, skip_special_tokens=True)
        completion = sum(1 for token in tokens.tolist() if token not in ends)
        said.append((text, int(mask.sum()), completion))
    return said


def refusal_of_several(network: Any, processor: Any) -> str:
    """Why a model takes no second picture; empty where it takes several: its template has a place for each, its
    processor makes tokens of each, and it writes a token after them."""
    from PIL import Image

    blank = Image.new("RGB", (64, 64))
    try:
        requests = [(chat_about(count, "Which?"), [blank] * count) for count in (1, 2)]
        options = {"do_sample": False, "max_new_tokens": 1}
        one, two = (written(network, processor, [chat], [own], **options)[0][1] for chat, own in requests)
    except Exception as error:  # of a processor, a template or a model, of any family
        return one_line(error)
    return "" if two > one else "its chat template has a place for one"


def chat_about(pictures: int, text: str) -> list[dict[str, Any]]:
    """A question about so many pictures, as chat templates of transformers take it."""
    return [{"role": "user", "content": [*[{"type": "image"}] * pictures, {"type": "text", "text": text}]}]


def _chat(request: Request) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [
        {"role": message["role"], "content": [{"type": "text", "text": message["text"]}]}
        for message in request.messages
    ]
    first = next(message for message in messages if message["role"] == "user")
    first["content"][:0] = [{"type": "image"}] * len(request.pictures)
    return messages


@lru_cache(maxsize=1)
def _loaded(folder: Path) -> tuple[Any, Any]:
    import torch

    from facemllm.model.pretrained import load_model

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    try:
        network, processor = load_model(folder, device=device, dtype=dtype)
    except UserError as error:
        raise JobStopped(str(error)) from error
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return network.eval(), processor
