"""The configured OpenAI-compatible endpoint (`annotate.endpoint`): its address and key checked, and who asks it.

Who may be shown to it is the ledger's decision when the endpoint is a third party's.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from facemllm.asking.link import Asked, link
from facemllm.asking.refusals import JobStopped
from facemllm.asking.store import Reply
from facemllm.asking.wire import Spec, is_loopback
from facemllm.errors import UserError, one_line
from facemllm.settings import Settings
from facemllm.version import ledger

_REACH_S = 5.0


@dataclass(frozen=True)
class Carried:
    """Sends through the courier of the worker's process."""

    spec: Spec

    def send(self, asked: Sequence[Asked]) -> list[Reply | Exception]:
        """A stored reply to each request, in order; RowRefused in the place of one that is not given.

        Raises JobStopped when the endpoint fails, the budget is spent, or this machine does not have the key.
        """
        if not _has_key(self.spec.key_variable) and not is_loopback(self.spec.base_url):
            raise JobStopped(
                f"{self.spec.key_variable} is not set where Ray's workers run; start Ray with it in the environment "
                "(a local head: `facemllm services down`, then set it)"
            )
        return link(self.spec).ask(asked)


def parameters(settings: Settings) -> dict[str, Any]:
    """What shapes a model's replies beside the words: a part of their keys."""
    looks = settings.annotate.vision_language
    return {"max_tokens": looks.max_tokens, "temperature": looks.temperature, "image_side": looks.image_side}


def carried(
    settings: Settings, account: str, schema: Mapping[str, Any] | None = None, backoff_s: float = 1.0
) -> Carried:
    """A sender to the configured endpoint, which counts under `account`; replies are asked for in the form of `schema`.

    Raises UserError when its address or key cannot be used.
    """
    told, looks = settings.annotate.endpoint, settings.annotate.vision_language
    model, base_url = looks.model, told.base_url
    assert model is not None
    assert base_url is not None
    _check_address(base_url, told.third_party)
    if not _has_key(told.key_variable) and not is_loopback(base_url):
        raise UserError(
            f"the environment variable {told.key_variable} holds no key for {base_url}; set it, or name another one "
            "in annotate.endpoint.key_variable"
        )
    return Carried(
        Spec(
            home=str(settings.home),
            account=account,
            run=secrets.token_hex(8),
            base_url=base_url,
            key_variable=told.key_variable,
            model=model,
            schema=schema,
            max_tokens=looks.max_tokens,
            temperature=looks.temperature,
            image_side=looks.image_side,
            parallel=told.parallel,
            timeout_s=told.timeout_s,
            retries=told.retries,
            max_requests=told.max_requests,
            token_budget=told.max_tokens,
            input_price=told.input_price,
            output_price=told.output_price,
            backoff_s=backoff_s,
        )
    )


def reach(base_url: str) -> None:
    """Raises JobStopped when nobody is at the address, within seconds. Any answer will do; no key is shown."""
    try:
        httpx.get(base_url, timeout=_REACH_S, trust_env=not is_loopback(base_url), follow_redirects=False)
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
        raise JobStopped(
            f"nobody answers at {base_url} ({one_line(error, 200)}); start the endpoint, or mend its address "
            "(--base-url, annotate.endpoint.base_url)"
        ) from None
    except httpx.HTTPError:
        pass  # somebody is there, whatever is said


def forbidden(settings: Settings, sources: Iterable[str]) -> dict[str, str]:
    """The sources whose pictures must not be sent to a third party, with the ledger's reason.

    Raises UserError when that is all of them.
    """
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


def _check_address(base_url: str, third_party: bool) -> None:
    where = "annotate.endpoint.base_url"
    try:
        parts = urlsplit(base_url)
        host, user = parts.hostname, parts.username
        _ = parts.port
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise UserError(f"{where} is no address of an API; give it as in https://host/v1")
    if user is not None or parts.password is not None:
        raise UserError(f"{where} holds a user or password; put the key into the environment variable of key_variable")
    if third_party and parts.scheme == "http" and not is_loopback(base_url):
        raise UserError(
            f"{where}: pictures would go to {host} unencrypted; use https, or set annotate.endpoint.third_party: "
            "false if the endpoint is in your own network"
        )


def _has_key(variable: str) -> bool:
    return bool(os.environ.get(variable, "").strip())
