"""Putting a model into service on this machine: staging, then production, each proved by one question.

A server counts as deployed only when it answers, over HTTP, one question about one held-out face as evaluation answered
it. Only then is it noted in `<home>/services/<stage>.model`, from where `services up` can start it again.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from facemllm.core import servers, services
from facemllm.errors import UserError
from facemllm.serve.probe import Probe, same_answer
from facemllm.settings import Settings

_ANSWER_SECONDS = 120.0


@dataclass(frozen=True)
class Endpoint:
    """A model in service. `adopted` is true when the same model served already."""

    stage: str
    url: str
    model: str
    digest: str
    pid: int
    adopted: bool

    @property
    def predict_url(self) -> str:
        """Where questions are posted (KServe's V1 protocol)."""
        return f"{self.url}/v1/models/{self.model}:predict"


def deploy(settings: Settings, model_dir: Path, model_digest: str, version: str, probe: Probe) -> Endpoint:
    """Serve a model as staging and prove it.

    Raises UserError when it does not start, or answers otherwise than evaluation; it is not running then.
    """
    endpoint = _serve(settings, "staging", model_dir, model_digest, version)
    _prove(settings, endpoint, probe)
    servers.note_deployed(settings, "staging", servers.Deployed(model_dir.absolute(), model_digest, version))
    return endpoint


def release(
    settings: Settings,
    model_dir: Path,
    model_digest: str,
    version: str,
    probe: Probe,
    *,
    put_back: Callable[[], object] | None,
) -> Endpoint:
    """Serve a model as production and prove it; if that fails, what served before is put back, if it still may serve.

    The server itself refuses a model that is not approved. `put_back` is called before the former model is started
    again, to record it, and may raise UserError to forbid it; None: production then serves nothing. Raises UserError as
    `deploy` does, saying what serves now.
    """
    running = {row.name for row in services.status(settings) if row.state not in ("down", "orphaned")}
    before = servers.deployed(settings, "production") if "production" in running else None
    try:
        endpoint = _serve(settings, "production", model_dir, model_digest, version)
        _prove(settings, endpoint, probe)
    except UserError as error:
        if before is None or before.digest == model_digest or put_back is None:
            raise UserError(f"{error}\nproduction serves nothing now") from None
        try:
            put_back()
            _serve(settings, "production", before.model, before.digest, before.version)
        except UserError as second:
            raise UserError(f"{error}\nand version {before.version} could not be put back: {second}") from None
        raise UserError(f"{error}\nproduction serves version {before.version} again") from None
    servers.note_deployed(settings, "production", servers.Deployed(model_dir.absolute(), model_digest, version))
    return endpoint


def ask(url: str, model: str, instance: Mapping[str, Any]) -> dict[str, Any]:
    """Ask a server one thing: an instance of its `:predict`. Raises UserError with the server's own line."""
    target = f"{url}/v1/models/{model}:predict"
    try:
        answer = httpx.post(target, json={"instances": [instance]}, timeout=_ANSWER_SECONDS, trust_env=False)
        if answer.is_error:
            raise UserError(f"{target} refused: {answer.text[:1000]}")
        found: dict[str, Any] = answer.json()["predictions"][0]
        return found
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{target} did not answer: {error}") from None


def curl_example(predict_url: str, question: str = "Is the person wearing a hat?", picture: str = "FACE.jpg") -> str:
    """A command to paste: it sends the file `picture` and a question, the picture through standard input."""
    body = json.dumps({"instances": [{"image": {"b64": "%s"}, "question": question.replace("%", "%%")}]})
    quoted = body.replace("\\", "\\\\").replace("'", "'\\''")  # printf reads backslashes, the shell single quotes
    return (
        f"""printf '{quoted}' "$(base64 < {picture} | tr -d '\\n')" | curl -sS -H 'Content-Type: application/json' """
        f"--data-binary @- {predict_url}"
    )


def _serve(settings: Settings, stage: str, model_dir: Path, digest: str, version: str) -> Endpoint:
    service = servers.model_server(settings, stage, model_dir, digest, version)
    running = services.up(settings, stage, service)
    return Endpoint(stage, running.url, settings.promote.model_name, digest, running.pid, running.adopted)


def _prove(settings: Settings, endpoint: Endpoint, probe: Probe) -> None:
    instance = {"image": {"b64": base64.b64encode(probe.image).decode()}, "question": probe.question}
    if probe.segmentation is not None:
        instance["segmentation"] = {"b64": base64.b64encode(probe.segmentation).decode()}
    try:
        found = ask(endpoint.url, endpoint.model, instance)
        if not same_answer(probe, found):
            said = f"'{found['answer']}' (value {found['value']})"
            raise UserError(
                f"{endpoint.stage} answers otherwise than evaluation to '{probe.question}': {said} instead of "
                f"'{probe.answer}' (value {probe.value}); it was stopped"
            )
    except UserError:
        services.down(settings, [endpoint.stage])
        raise
