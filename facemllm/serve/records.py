"""What the server writes down of requests: digests and counts in the log; answers only where a retention rule says so.

With `serve.retention: {answers: true, days: N}` each answer becomes a line of `answers-YYYY-MM-DD.jsonl` (UTC), with
the picture's digest, task, item, kind and probability; a day's file is deleted when it is more than N days old.
Pictures and the texts of questions are never kept. `facemllm forget` deletes every day that names a forgotten picture.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from facemllm.core.files import private
from facemllm.serve.language import Answers, Ask

log = logging.getLogger("facemllm.serve")


def _now() -> datetime:
    return datetime.now(UTC)


class Records:
    """The log of requests, and the answers of the last `days` days in a folder, if one is given."""

    def __init__(
        self, model: str, folder: Path | None = None, days: int = 0, clock: Callable[[], datetime] = _now
    ) -> None:
        self._model, self._folder, self._days, self._clock = model, folder, days, clock
        self._lock, self._day = threading.Lock(), ""
        if folder is not None:
            self._clean(self._clock())

    def answered(self, asks: Sequence[Ask], answers: Sequence[Answers], seconds: float) -> None:
        """Note one request. A disk that is full or gone is said in the log and fails no request."""
        kinds = Counter(answer.kind for found in answers for answer in found.answers)
        rules = sorted({answer.rule for found in answers for answer in found.answers if answer.rule})
        summary = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        images = " ".join(sorted({ask.image.digest[:12] for ask in asks}))
        by = f" ({' '.join(rules)})" if rules else ""
        log.info("answered %d questions about %s in %.0f ms: %s%s", kinds.total(), images, 1000 * seconds, summary, by)
        if self._folder is not None:
            try:
                self._keep(self._folder, asks, answers)
            except OSError as error:
                log.error("answers are not kept: %s", error.strerror)

    def _keep(self, folder: Path, asks: Sequence[Ask], answers: Sequence[Answers]) -> None:
        now = self._clock()
        lines = []
        for ask, found in zip(asks, answers, strict=True):
            shown = {"time": now.isoformat(timespec="seconds"), "model": self._model, "image": ask.image.digest}
            for one in found.answers:
                said = {"task": one.task, "item": one.item, "kind": one.kind, "answer": one.text, "rule": one.rule}
                lines.append(json.dumps({**shown, **said, "probability": one.probability}, ensure_ascii=False))
        with self._lock:
            if (day := now.date().isoformat()) != self._day:
                self._clean(now)
                self._day = day
            with open(folder / f"answers-{day}.jsonl", "a", encoding="utf-8", opener=private) as file:
                file.write("".join(f"{line}\n" for line in lines))

    def _clean(self, now: datetime) -> None:
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        oldest = (now.date() - timedelta(days=self._days)).isoformat()
        for file in self._folder.glob("answers-????-??-??.jsonl"):
            if file.stem.removeprefix("answers-") < oldest:
                file.unlink(missing_ok=True)
