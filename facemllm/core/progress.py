"""Progress of long work: a bar in a terminal, or lines for the live table of a pipeline run.

`with bar("rendering", total) as progress: progress.update(done, note)`. When the environment names an events file
(`FACEMLLM_EVENTS`), updates go there as JSON lines, from any process; otherwise a bar is drawn on standard error, or,
where that is no terminal, a line is printed there now and then.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EVENTS = "FACEMLLM_EVENTS"
STEP = "FACEMLLM_STEP"
_INTERVAL_S = 0.25
_LINE_S = 30.0


def event(**fields: Any) -> None:
    """Append one event to the events file, or print its `note` on standard error where there is none.

    Short appended lines from several processes stay whole.
    """
    path = os.environ.get(EVENTS)
    if path:
        line = json.dumps({"time": time.time(), "step": os.environ.get(STEP, ""), **fields}) + "\n"
        with open(path, "ab", buffering=0) as file:
            file.write(line.encode())
    elif "note" in fields:
        print(fields["note"], file=sys.stderr)


class Progress:
    """One long piece of work. `update` may be called as often as wanted; it is thinned out."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, total
        self._last = 0.0
        self._line = time.monotonic() + _LINE_S
        self._bar: Any = None

    def update(self, done: int, note: str = "") -> None:
        """State that `done` of `total` units are ready, with a few telling words."""
        now = time.monotonic()
        if now - self._last < _INTERVAL_S and done < self.total:
            return
        self._last = now
        if os.environ.get(EVENTS):
            event(progress=done, total=self.total, note=note or self.name)
        elif sys.stderr.isatty():
            self._draw(done, note)
        elif now >= self._line:
            self._line = now + _LINE_S
            of = f"/{self.total}" if self.total else ""
            print(f"{self.name} {done}{of} {note}".rstrip(), file=sys.stderr, flush=True)

    def _draw(self, done: int, note: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            note_column, screen = TextColumn("{task.fields[note]}"), Console(stderr=True)
            self._bar = RichProgress(*columns, note_column, console=screen, transient=True)
            self._task = self._bar.add_task(self.name, total=self.total, note="")
            self._bar.start()
        self._bar.update(self._task, completed=done, note=note)


@contextmanager
def bar(name: str, total: int) -> Iterator[Progress]:
    """A progress bar named `name` over `total` units, gone from the terminal afterwards."""
    progress = Progress(name, total)
    try:
        yield progress
    finally:
        if progress._bar is not None:
            progress._bar.stop()
