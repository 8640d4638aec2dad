"""Putting a model into service: staging, then production, each proved by held-out faces.

A server counts as deployed only when it answers, over HTTP, questions about held-out faces as evaluation answered
them. In production it takes over from the one before it step by step. Where that is, `facemllm.serve.target` says: on
this machine (`facemllm.serve.local`), or in KServe (`facemllm.serve.kserve`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from facemllm.core import servers
from facemllm.core.servers import Deployed
from facemllm.core.store import Store
from facemllm.errors import UserError, one_line
from facemllm.serve.approval import TIME_ALONE
from facemllm.serve.engine import parity as gate
from facemllm.serve.probe import Probe, same_answer
from facemllm.serve.target import Endpoint, Superseded, Target
from facemllm.serve.targets import target_of
from facemllm.serve.trial import Trial
from facemllm.settings import Settings
from facemllm.signing.canonical import Refused

__all__ = ["Endpoint"]

_ANSWER_SECONDS = 120.0


def deploy(
    settings: Settings,
    model_dir: Path,
    model_digest: str,
    version: str,
    probe: Probe,
    parity: Callable[[str], object] | None = None,
) -> Endpoint:
    """Serve a model as staging and prove it, by `probe` and by `parity`, which is given its address.

    Raises UserError when it does not start, or answers otherwise than evaluation; it is not running then.
    """
    target, model = target_of(settings), Deployed(model_dir.absolute(), model_digest, version)
    endpoint = target.stage(model)
    try:
        _prove(endpoint, probe)
        if parity is not None:
            parity(endpoint.url)
    except UserError:
        target.unstage()
        raise
    target.staged(model)
    return endpoint


def release(
    settings: Settings,
    model_dir: Path,
    model_digest: str,
    version: str,
    probe: Probe,
    *,
    put_back: Callable[[str], object] | None,
    questions: Sequence[Probe] = (),
    parity: Callable[[str], object] | None = None,
    target: Target | None = None,
) -> Endpoint:
    """Serve a model as production, in place of the one before it, which serves until the new one has proved itself.

    The new one starts beside it (the server itself refuses a model that is not approved), answers `probe`, passes
    `parity` (given its address; raises UserError where it fails) and a trial with a growing share of production's
    requests, in which `questions` are asked of both. Then the former one answers what it has begun, and stops.

    If anything of that fails the former model keeps every request. `put_back` records that, given the reason; where it
    raises Refused, or there is none, the former model may not serve, and production serves nothing. Raises UserError
    as `deploy` does, saying what serves now; Superseded, with nothing put back, once another release has the lock that
    the caller holds.
    """
    target = target or target_of(settings)
    before = target.serving()
    adopted = False
    try:
        endpoint = target.put(Deployed(model_dir.absolute(), model_digest, version), before)
        adopted = endpoint.adopted
        _prove(endpoint, probe)
        if parity is not None:
            parity(endpoint.url)
        if before is not None and not adopted:
            Trial(settings.serve.canary, target.split(), questions or [probe]).run()
        url = target.keep()
    except Superseded:
        raise
    except UserError as error:
        if before is not None and adopted and target.keeps_adopted:
            raise UserError(f"{error}\nproduction serves version {before.version} as before") from None
        raise _put_back(target, None if adopted else before, model_digest, put_back, error) from None
    except BaseException:  # interrupted
        target.back() if before is not None else target.down()
        raise
    return replace(endpoint, url=url)


def _put_back(
    target: Target,
    before: Deployed | None,
    digest: str,
    put_back: Callable[[str], object] | None,
    error: UserError,
) -> UserError:
    """Have the former model serve alone, and what to say then; where it may not, nothing serves."""
    if before is None or put_back is None:
        target.down()
        return UserError(f"{error}\nproduction serves nothing now")
    try:
        target.back()
        again = f"{error}\nproduction serves version {before.version}"
    except Superseded:
        raise
    except UserError as second:
        again = f"{error}\nrequests go to version {before.version}, but it was not put back whole: {one_line(second)}"
    if before.digest == digest:
        return UserError(f"{again} as before")
    try:
        put_back(one_line(error, 200))
    except Refused as second:
        if second.check not in TIME_ALONE:
            target.down()
            return UserError(f"{error}\nand version {before.version} could not be put back: {second}")
        return UserError(f"{again} as before, but this could not be recorded: {second}")
    except UserError as second:
        return UserError(f"{again} as before, but this could not be recorded: {second}")
    return UserError(f"{again} again")


def parity_of(settings: Settings, store: Store, evaluation: str) -> Callable[[str], object]:
    """What compares the server at an address with an evaluation (`engine.parity`); it raises UserError where they
    differ."""

    def compare(url: str) -> object:
        folder = store.path(evaluation)
        conversations = json.loads((folder / "metrics.json").read_text("utf-8"))["conversations_digest"]
        name, count = settings.promote.model_name, settings.serve.parity_faces
        return gate.parity(settings, url, name, folder / "predictions", store.path(conversations), count)

    return compare


def ask(url: str, model: str, instance: Mapping[str, Any]) -> dict[str, Any]:
    """Ask a server one thing: an instance of its `:predict`. Raises UserError with the server's own line."""
    target = f"{url}/v1/models/{model}:predict"
    try:
        body, headers = {"instances": [instance]}, servers.authorization()
        answer = httpx.post(target, json=body, headers=headers, timeout=_ANSWER_SECONDS, trust_env=False)
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


def _prove(endpoint: Endpoint, probe: Probe) -> None:
    """Raises UserError where a server does not answer as evaluation did, unless its policy refuses the question."""
    found = ask(endpoint.url, endpoint.model, probe.instance)
    if not same_answer(probe, found):
        said = f"'{found['answer']}' (value {found['value']})"
        raise UserError(
            f"{endpoint.stage} answers otherwise than evaluation to '{probe.question}': {said} instead of "
            f"'{probe.answer}' (value {probe.value}); it was stopped"
        )
