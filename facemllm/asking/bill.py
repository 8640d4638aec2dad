"""What asking a model costs: expected before, from the account's own figures once it has any, else from the length of
the words, a token for 28 x 28 pixels, and the longest reply allowed; and stated after, in the `Bill`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from typing import Any

from facemllm.asking.endpoint import EndpointSender
from facemllm.asking.requests import Sender
from facemllm.asking.store import Account, Counters, Replies, folder, price
from facemllm.core import progress
from facemllm.core.files import atomic_write

_CHARACTERS = 3.5  # of English and JSON in a token
_EVERY_S = 0.5
_PATCH = 28  # pixels a side


def expected(sender: EndpointSender, requests: int, characters: int) -> dict[str, Any]:
    """What so many requests with so many characters of words would use: `prompt_tokens`, `completion_tokens`, `price`,
    None without prices; `measured`, whether the tokens are the account's own averages."""
    with closing(Replies(sender.home)) as replies:
        before = Account(replies, sender.account).read()
    metered = before.answered - before.unmetered
    if metered > 0:
        prompts = round(requests * before.prompt_tokens / metered)
        completions = round(requests * before.completion_tokens / metered)
    else:
        prompts = round(characters / _CHARACTERS + requests * (sender.model.image_side / _PATCH) ** 2)
        completions = requests * sender.model.max_tokens
    cost = price(prompts, completions, *_prices(sender))
    return {"prompt_tokens": prompts, "completion_tokens": completions, "price": cost, "measured": metered > 0}


def announcement(sender: EndpointSender, rows: int, requests: int, characters: int) -> str:
    """What is about to be asked of an endpoint, in one line: requests, tokens, price, and whether the budget allows
    them."""
    found = expected(sender, requests, characters)
    with closing(Replies(sender.home)) as replies:
        used = Account(replies, sender.account).read()
    tokens = found["prompt_tokens"] + found["completion_tokens"]
    cost = "unknown (set annotate.endpoint.input_price, output_price)"
    if found["price"] is not None:
        cost = f"{found['price']:.2f}"
    parts = [
        f"to ask: {requests:,} requests ({rows - requests:,} of {rows:,} are answered already), about {tokens:,} tokens"
        f"{'' if found['measured'] else ' at most'}, price {cost}"
    ]
    limits = (sender.endpoint.max_requests, used.requests, requests), (sender.endpoint.max_tokens, used.tokens, tokens)
    for name, (limit, spent, needed) in zip(("max_requests", "max_tokens"), limits, strict=True):
        if limit is not None:
            enough = "enough" if limit - spent >= needed else "too few: it will stop there, and go on when it is raised"
            parts.append(f"annotate.endpoint.{name} leaves {max(limit - spent, 0):,}: {enough}")
    return "; ".join(parts if len(parts) > 1 else [*parts, "no budget is set (annotate.endpoint.max_requests)"])


class Bill:
    """Keeps the bill of a run: `with Bill(sender, model, rows) as bill`, and it is written however the run ends, beside
    the replies. `outcomes` counts what became of rows, by name. A model that is not paid has outcomes alone."""

    def __init__(self, sender: Sender, model: str, rows: int, outcomes: Mapping[str, int] | None = None) -> None:
        self._sender = sender if isinstance(sender, EndpointSender) else None
        self._model, self._rows, self._outcomes = model, rows, outcomes
        self._account: Account | None = None
        self._line, self._next = "", 0.0

    def __enter__(self) -> Bill:
        if self._sender is not None:
            self._account = Account(Replies(self._sender.home), self._sender.account)
            self._before = self._account.read()
        return self

    def __exit__(self, *error: object) -> None:
        self._next = 0.0
        parts = [f"{count:,} {name.replace('_', ' ')}" for name, count in self.outcomes().items()]
        counted = [f"{self._rows:,} questions: {', '.join(parts)}"] if parts else []
        if self._account is not None:
            path = folder(self._account.replies.path.parent.parent) / self._account.name / "bill.json"
            atomic_write(path, self.encoded())
            counted.append(self.line())
            self._account.replies.close()
        if counted:
            progress.event(note="; ".join(counted))

    def outcomes(self) -> dict[str, int]:
        """What became of all rows: those counted, and `not_asked` for the others."""
        if self._outcomes is None:
            return {}
        return {**self._outcomes, "not_asked": self._rows - sum(self._outcomes.values())}

    def encoded(self) -> bytes:
        """The bill so far, as JSON."""
        bill: dict[str, Any] = {"model": self._model, "rows": self._rows}
        if self._outcomes is not None:
            bill["outcomes"] = self.outcomes()
        if self._account is not None and self._sender is not None:
            now = self._account.read()
            bill |= {"this_run": self._figures(now.less(self._before)), "all_runs": self._figures(now)}
            bill["prices"] = dict(zip(("input", "output"), _prices(self._sender), strict=True))
        return json.dumps(bill, indent=2).encode() + b"\n"

    def line(self) -> str:
        """The bill of this run so far in a few words."""
        if self._account is None or self._sender is None or time.monotonic() < self._next:
            return self._line
        run = self._account.read().less(self._before)
        cost = price(run.prompt_tokens, run.completion_tokens, *_prices(self._sender))
        parts = [f"{run.requests:,} requests", f"{run.prompt_tokens + run.completion_tokens:,} tokens"]
        parts += [] if cost is None else [f"cost {cost:.2f}"]
        parts += [f"{run.in_doubt} asked without an answer, perhaps paid"] if run.in_doubt else []
        self._line, self._next = ", ".join(parts), time.monotonic() + _EVERY_S
        return self._line

    def _figures(self, counters: Counters) -> dict[str, Any]:
        assert self._sender is not None
        figures = {name: count for name, count in asdict(counters).items() if name not in ("held", "largest")}
        return {**figures, "price": price(counters.prompt_tokens, counters.completion_tokens, *_prices(self._sender))}


def _prices(sender: EndpointSender) -> tuple[float | None, float | None]:
    return sender.endpoint.input_price, sender.endpoint.output_price
