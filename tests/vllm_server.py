"""A stand-in for the doors of a vLLM server that the engine uses, backed by a real small model through transformers.

`GET /v1/models`, `POST /v1/chat/completions/render` and `POST /inference/v1/generate`, answering in vLLM 0.32's shapes
with real numbers. Like vLLM it makes special tokens of a chat's text that spells them, takes token ids as they are, and
drops the work of a client that hangs up.
"""

import base64
import hashlib
import io
import json
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image

from facemllm.model.pretrained import load_model
from tests.answering import Answering, Loopback


class VllmServer(Loopback):
    """What it serves, what it was asked, and what it is to do wrong.

    `faults` are answers (status, headers, body) to the next requests for tokens; while `held` is clear, these wait.
    `reach` is how many tokens before and behind a picture's own are counted to it, as vLLM does of some families.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        super().__init__(_Handler)
        self.model, self.processor = load_model(folder)
        self.model.eval()
        self.digest = digest
        self.max_model_len = 512
        self.scale_out, self.reach = True, (0, 0)
        self.rendered: list[dict[str, Any]] = []
        self.asked: list[dict[str, Any]] = []
        self.faults: list[tuple[int, dict[str, str], bytes]] = []
        self.held = threading.Event()
        self.held.set()
        self.running = self.most = self.hung_up = 0
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""

    def values(self, features: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What the model takes of a picture."""
        (data,) = features["kwargs_data"]["image"]
        return safetensors.torch.load(base64.b64decode(data))

    def render(self, body: dict[str, Any]) -> dict[str, Any]:
        (image,) = [part for turn in body["messages"] for part in turn["content"] if part["type"] == "image_url"]
        png = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))
        chat = [
            {**turn, "content": [p if p["type"] == "text" else {"type": "image"} for p in turn["content"]]}
            for turn in body["messages"]
        ]
        text = self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        picture = Image.open(io.BytesIO(png))
        made = self.processor(images=picture, text=text, add_special_tokens=False, return_tensors="pt")
        ids = made["input_ids"][0].tolist()
        places = [place for place, token in enumerate(ids) if token == self.model.config.image_token_id]
        before, behind = self.reach
        values = {name: made[name].contiguous() for name in made if name.startswith(("pixel_", "image_"))}
        features = {
            "mm_hashes": {"image": [hashlib.sha256(png).hexdigest()]},
            "mm_placeholders": {"image": [{"offset": places[0] - before, "length": before + len(places) + behind}]},
            "kwargs_data": {"image": [base64.b64encode(safetensors.torch.save(values)).decode()]},
            "mm_metadata": None,
        }
        return {"token_ids": ids, "features": features, "model": body["model"]}

    def beside(self, ids: torch.Tensor, body: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The picture, and which tokens are its, where the model wants to know."""
        values = self.values(body["features"])
        if "image_grid_thw" in values:
            values["mm_token_type_ids"] = (ids == self.model.config.image_token_id).int()
        return values

    @torch.inference_mode()
    def likelihoods(self, body: dict[str, Any]) -> list[Any]:
        """`prompt_logprobs`: of each token but the first its log-probability and rank."""
        ids = torch.tensor([body["token_ids"]])
        logits = self.model(input_ids=ids, **self.beside(ids, body)).logits[0, :-1]
        found: list[Any] = [None]
        for row, token in zip(logits.float().log_softmax(-1), body["token_ids"][1:], strict=True):
            rank = int((row > row[token]).sum()) + 1
            found.append({str(token): {"logprob": float(row[token]), "rank": rank, "decoded_token": None}})
        return found

    @torch.inference_mode()
    def written(self, body: dict[str, Any]) -> list[int]:
        ids, sampling = torch.tensor([body["token_ids"]]), body["sampling_params"]
        assert sampling["temperature"] == 0
        found = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **self.beside(ids, body),
            max_new_tokens=sampling["max_tokens"],
            eos_token_id=sampling.get("stop_token_ids"),
            repetition_penalty=sampling.get("repetition_penalty", 1.0),
            pad_token_id=0,
            do_sample=False,
        )
        return [int(token) for token in found[0, ids.shape[1] :]]


class _Handler(Answering):
    server: VllmServer

    def do_GET(self) -> None:
        server = self.server
        self._json({"data": [{"id": server.digest, "root": "/m", "max_model_len": server.max_model_len}]})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Content-Type"] != "application/json":
            self._json({"error": {"message": "Unsupported Media Type"}}, 415)
        elif not server.scale_out:
            self._json({"error": {"message": "Scale-out endpoints are disabled."}}, 403)
        elif body["model"] != server.digest:
            self._json({"error": {"message": "no such model"}}, 404)
        elif self.path == "/v1/chat/completions/render":
            server.rendered.append(body)
            self._json(server.render(body))
        elif self.path == "/inference/v1/generate":
            self._generate(body)
        else:
            self._json({"error": {"message": "Not Found"}}, 404)

    def _generate(self, body: dict[str, Any]) -> None:
        server = self.server
        with server.lock:
            server.asked.append(body)
            server.running += 1
            server.most = max(server.most, server.running)
            fault = server.faults.pop(0) if server.faults else None
        try:
            while not server.held.wait(0.01):
                if self._hung_up():
                    with server.lock:
                        server.hung_up += 1
                    self.close_connection = True
                    return
            if fault is not None:
                status, headers, text = fault
                self._send(status, text, headers=headers)
                return
            with server.lock:  # one model, one thread
                found = server.likelihoods(body) if "prompt_logprobs" in body["sampling_params"] else None
                tokens = server.written(body)
            if body.get("stream"):
                self._events(tokens)
            else:
                choices = [{"index": 0, "token_ids": tokens, "finish_reason": "stop"}]
                self._json({"prompt_logprobs": found, "choices": choices})
        finally:
            with server.lock:
                server.running -= 1

    def _events(self, tokens: list[int]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        for place, token in enumerate(tokens):
            if place == 1:
                while not self.server.held.is_set() and not self._hung_up():
                    time.sleep(0.01)
            event = {"choices": [{"index": 0, "token_ids": [token], "finish_reason": None}]}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")

    def _hung_up(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode())


@contextmanager
def serving(folder: Path, digest: str) -> Iterator[VllmServer]:
    """A stand-in that serves a model directory."""
    with VllmServer(folder, digest) as server:
        try:
            yield server
        finally:
            server.held.set()
