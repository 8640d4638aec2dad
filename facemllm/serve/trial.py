"""A canary's trial: step by step more of production's requests, judged after each few, on and on or back.

Where nobody else asks, the release asks itself: held-out questions by turns to both models, each named in the request,
so that both get as many whatever their share of the others' requests is.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from typing import Any

import httpx

from facemllm.errors import UserError
from facemllm.serve.canary import PATIENCE, Judgement, Limits, Parity, judge
from facemllm.serve.probe import Probe, same_answer
from facemllm.serve.target import Split
from facemllm.settings.serve import Canary

log = logging.getLogger(__name__)

_ROUND = 5  # questions to each model between two looks
_EVEN = 50.0  # percent above which latency is not judged: the load is the canary's alone


class Trial:
    """One new model against the one that serves; `probes` are what is asked, with evaluation's answers of the new
    one."""

    def __init__(self, chosen: Canary, split: Split, probes: Sequence[Probe]):
        self._chosen, self._split, self._probes = chosen, split, list(probes)[: chosen.min_requests]
        self._turns = itertools.cycle(range(len(self._probes)))
        self._agrees: dict[int, bool] = {}
        self._limits = Limits(
            chosen.min_requests, chosen.max_error_rate_increase, chosen.max_p95_ratio, chosen.min_agreement
        )

    def run(self) -> None:
        """Take the new model to all requests. Raises UserError, with the reason, at the step where it fails."""
        try:
            for percent in self._chosen.steps:
                self._split.share(percent)
                judgement = self._step(percent)
                log.info("%g %% of the requests: %s; %s", percent, judgement.reason, dict(judgement.figures))
        finally:
            self._split.close()

    def _step(self, percent: float) -> Judgement:
        lasts_until = time.monotonic() + self._chosen.step_seconds
        for looks in itertools.count(1):
            judgement = self._judged(percent)
            if judgement.decision == "roll back":
                raise UserError(f"at {percent:g} % of the requests it was worse: {judgement.reason}")
            if judgement.decision == "wait":
                for _ in range(_ROUND):
                    self._ask()
            elif (left := lasts_until - time.monotonic()) > 0:
                time.sleep(min(left, 0.2))
            else:
                return judgement
            if judgement.decision == "wait" and looks * _ROUND > 2 * PATIENCE * self._limits.min_requests:
                break
        raise UserError(f"at {percent:g} % of the requests it could not be judged: {judgement.reason}")

    def _judged(self, percent: float) -> Judgement:
        stable, canary = self._split.sides(latency=percent <= _EVEN)
        parity = Parity(len(self._probes), len(self._agrees), sum(self._agrees.values()))
        return judge(stable, canary, parity, self._limits)

    def _ask(self) -> None:
        """One question to each, the one that is asked first by turns; the canary's answer is compared."""
        turn = next(self._turns)
        for canary in (False, True) if turn % 2 else (True, False):
            found = self._answer(canary, self._probes[turn])
            if canary and found is not None:
                self._agrees[turn] = same_answer(self._probes[turn], found) and self._agrees.get(turn, True)

    def _answer(self, canary: bool, probe: Probe) -> dict[str, Any] | None:
        """The answer of one model; None where it gave none, which has been counted."""
        try:
            reply = self._split.ask(canary, {"instances": [probe.instance]})
            if reply is None:
                return None
            if reply.status_code == 429:
                time.sleep(0.5)
            found = reply.json()["predictions"][0]
            return {name: found.get(name) for name in ("answer", "value", "kind")}
        except (httpx.HTTPError, ValueError, LookupError, TypeError):
            return None
