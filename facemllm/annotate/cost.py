"""What annotation costs: an estimate before, the bill after.

Estimates come from the account's own figures once it has any; before, from the length of the words, a token for 28 x 28
pixels, and the longest reply allowed. The bill (`annotations/<account>/bill.json`) states what this run and what all
runs of the account asked for and used. In the table the cost of a row is its tokens at the configured prices, once for
each row, so it is the same however the job went; what was really paid stands in the bill.
"""

from __future__ import annotations

import json
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from facemllm.annotate import prompt
from facemllm.annotate.describer import Describer, endpoint
from facemllm.asking.endpoint import EndpointSender
from facemllm.asking.store import Account, Counters, Replies, folder, price
from facemllm.core import progress
from facemllm.core.files import atomic_write
from facemllm.settings import Settings
from facemllm.tables import FACES, open_table

_CHARACTERS = 3.5  # of English and JSON in a token
_EVERY_S = 0.5
_PATCH = 28  # pixels a side


def estimate(settings: Settings, faces: Path) -> dict[str, Any]:
    """What annotating the table would ask for: `rows`, of which `stored` are answered already and `ledger_refused` must
    not be sent; `requests` left, without repairs; `prompt_tokens` and `completion_tokens` they may use; `price`, None
    without prices; `measured`, whether the tokens are the account's own averages.

    Raises UserError as `annotate` would: no sound table, no source that may be sent, no key.
    """
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
        before = Account(replies, model.sender.account).read()
    metered = before.answered - before.unmetered
    if metered > 0:
        prompts = round(requests * before.prompt_tokens / metered)
        completions = round(requests * before.completion_tokens / metered)
    else:
        picture = (chosen.vision_language.image_side / _PATCH) ** 2
        prompts = round(characters / _CHARACTERS + requests * picture)
        completions = requests * chosen.vision_language.max_tokens
    return {
        **found,
        "model": model.model,
        "stored": stored,
        "ledger_refused": refused,
        "requests": requests,
        "prompt_tokens": prompts,
        "completion_tokens": completions,
        "price": price(prompts, completions, model.input_price, model.output_price),
        "measured": metered > 0,
    }


class Bill:
    """Keeps the bill of a run: `with Bill(describer, rows) as bill`, and it is written however the run ends.

    A model that is not paid has none.
    """

    def __init__(self, model: Describer, rows: int) -> None:
        self._model, self._rows = model, rows
        self._prices = model.input_price, model.output_price
        self._account: Account | None = None
        self._line, self._next = "", 0.0

    def __enter__(self) -> Bill:
        if isinstance(self._model.sender, EndpointSender):
            self._account = Account(Replies(self._model.home), self._model.sender.account)
            self._before = self._account.read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._account is not None:
            now = self._account.read()
            bill = {
                "model": self._model.model,
                "rows": self._rows,
                "this_run": self._figures(now.less(self._before)),
                "all_runs": self._figures(now),
                "prices": {"input": self._model.input_price, "output": self._model.output_price},
            }
            path = folder(self._model.home) / self._account.name / "bill.json"
            atomic_write(path, json.dumps(bill, indent=2).encode() + b"\n")
            self._next = 0.0
            progress.event(note=self.line())
            self._account.replies.close()

    def line(self) -> str:
        """The bill of this run so far in a few words."""
        if self._account is None or time.monotonic() < self._next:
            return self._line
        run = self._account.read().less(self._before)
        cost = price(run.prompt_tokens, run.completion_tokens, *self._prices)
        parts = [f"{run.requests:,} requests", f"{run.prompt_tokens + run.completion_tokens:,} tokens"]
        parts += [] if cost is None else [f"cost {cost:.2f}"]
        parts += [f"{run.in_doubt} asked without an answer, perhaps paid"] if run.in_doubt else []
        self._line, self._next = ", ".join(parts), time.monotonic() + _EVERY_S
        return self._line

    def _figures(self, counters: Counters) -> dict[str, Any]:
        figures = {name: count for name, count in asdict(counters).items() if name not in ("held", "largest")}
        return {**figures, "price": price(counters.prompt_tokens, counters.completion_tokens, *self._prices)}
