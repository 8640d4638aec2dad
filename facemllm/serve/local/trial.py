"""A canary's trial: step by step more of production's requests, judged after each few, on and on or back.

Where nobody else asks, the release asks itself: held-out questions by turns to both models, through the proxy, each
named in the request, so that both get as many whatever their share of the others' requests is.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from facemllm.core.servers import Deployed, authorization
from facemllm.errors import UserError
from facemllm.serve.canary import PATIENCE, Judgement, Limits, Parity, Side, judge
from facemllm.serve.local import production
from facemllm.serve.probe import Probe, same_answer
from facemllm.settings import Settings

log = logging.getLogger(__name__)

_ROUND = 5  # questions to each model between two looks
_EVEN = 50.0  # percent above which latency is not judged: the load is the canary's alone
_ANSWER_S = 120.0


class Trial:
    """One new model against the one that serves; `probes` are what is asked, with evaluation's answers of the new
    one."""

    def __init__(self, settings: Settings, stable: Deployed, canary: Deployed, url: str, probes: Sequence[Probe]):
        self._settings, self._stable, self._canary = settings, stable, canary
        self._url, self._probes = url, list(probes)[: settings.serve.canary.min_requests]
        self._turns = itertools.cycle(range(len(self._probes)))
        self._agrees: dict[int, bool] = {}
        known = settings.serve.canary
        self._limits = Limits(
            known.min_requests, known.max_error_rate_increase, known.max_p95_ratio, known.min_agreement
        )

    def run(self) -> None:
        """Take the new model to all requests. Raises UserError, with the reason, at the step where it fails."""
        with httpx.Client(headers=authorization(), timeout=_ANSWER_S, trust_env=False) as client:
            for percent in self._settings.serve.canary.steps:
                production.share(self._settings, self._stable, self._canary, percent)
                judgement = self._step(client, percent)
                log.info("%g %% of the requests: %s; %s", percent, judgement.reason, dict(judgement.figures))

    def _step(self, client: httpx.Client, percent: float) -> Judgement:
        first = production.counts(self._settings)
        lasts_until = time.monotonic() + self._settings.serve.canary.step_seconds
        for looks in itertools.count(1):
            judgement = self._judged(first, percent)
            if judgement.decision == "roll back":
                raise UserError(f"at {percent:g} % of the requests it was worse: {judgement.reason}")
            if judgement.decision == "wait":
                for _ in range(_ROUND):
                    self._ask(client)
            elif (left := lasts_until - time.monotonic()) > 0:
                time.sleep(min(left, 0.2))
            else:
                return judgement
            if judgement.decision == "wait" and looks * _ROUND > 2 * PATIENCE * self._limits.min_requests:
                break
        raise UserError(f"at {percent:g} % of the requests it could not be judged: {judgement.reason}")

    def _judged(self, first: Mapping[str, Any], percent: float) -> Judgement:
        now = production.counts(self._settings)
        if now["started"] != first["started"]:
            raise UserError("production's proxy was restarted meanwhile, and what it had counted is lost")
        sides = [side(first, now, one.name, latency=percent <= _EVEN) for one in (self._stable, self._canary)]
        parity = Parity(len(self._probes), len(self._agrees), sum(self._agrees.values()))
        return judge(sides[0], sides[1], parity, self._limits)

    def _ask(self, client: httpx.Client) -> None:
        """One question to each, the one that is asked first by turns; the canary's answer is compared."""
        turn = next(self._turns)
        pair = [self._stable, self._canary]
        for one in pair if turn % 2 else reversed(pair):
            found = self._answer(client, one, self._probes[turn])
            if one is self._canary and found is not None:
                self._agrees[turn] = same_answer(self._probes[turn], found) and self._agrees.get(turn, True)

    def _answer(self, client: httpx.Client, backend: Deployed, probe: Probe) -> dict[str, Any] | None:
        """The answer of one server; None where it gave none, which the proxy has counted."""
        try:
            reply = client.post(self._url, json={"instances": [probe.instance]}, headers={"X-Backend": backend.name})
            if reply.status_code == 429:
                time.sleep(0.5)
            found = reply.json()["predictions"][0]
            return {name: found.get(name) for name in ("answer", "value", "kind")}
        except (httpx.HTTPError, ValueError, LookupError, TypeError):
            return None


def side(first: Mapping[str, Any], now: Mapping[str, Any], name: str, *, latency: bool) -> Side:
    """What a server did between two answers of `/proxy/status`."""
    before, after = first["backends"].get(name, {}), now["backends"].get(name, {})
    edges = Counter(after.get("latency", {}))
    edges.subtract(before.get("latency", {}))
    times = {float(edge): count for edge, count in edges.items() if count} if latency else {}
    requests, errors = (after.get(key, 0) - before.get(key, 0) for key in ("requests", "errors"))
    return Side(requests, errors, times)
