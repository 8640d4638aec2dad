"""A worker's line to its courier: starts it, hands requests over, and collects the answers.

One courier serves a worker process for a whole job, from batch to batch; it ends when the worker does. When a courier
is killed, another one is started and given what is not answered yet: the store and the notes see to it that nothing
that was answered is asked again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any

import facemllm
from facemllm.asking.courier import HEAD
from facemllm.asking.refusals import Filtered, JobStopped, RowRefused
from facemllm.asking.store import Reply
from facemllm.asking.wire import Request, Spec
from facemllm.core.processes import TOKEN

_STARTS = 3
_WORDS = tuple(field.name for field in fields(Request) if field.name != "picture")

Asked = Callable[[], Request]
"""Makes a request when there is room for it, so that pictures do not wait in memory. It may raise RowRefused."""


class Link:
    """A courier of this process."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, asked: Sequence[Asked]) -> list[Reply | Exception]:
        """The replies in order; `RowRefused` in the place of one that the endpoint does not give.

        Raises JobStopped when the courier cannot go on; what is on its way then is still waited for.
        """
        answers: dict[int, Reply | Exception] = {}
        fruitless = 0
        while len(answers) < len(asked):
            known, stop = len(answers), self._round(asked, answers)
            if stop:
                raise JobStopped(stop)
            if len(answers) < len(asked):
                self.close()
                fruitless = 0 if len(answers) > known else fruitless + 1
            if fruitless == _STARTS:
                raise JobStopped("the process that sends requests ends again and again; is memory short?")
        return [answers[number] for number in range(len(asked))]

    def close(self) -> None:
        """Let the courier go: it finishes what is on its way."""
        process, self._process = self._process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        process.wait()  # it ended when the courier had a session of its own

    def _round(self, asked: Sequence[Asked], answers: dict[int, Reply | Exception]) -> str:
        """Hand over what is not answered, and read answers until all are there or the courier is gone. Why it stops."""
        todo = [number for number in range(len(asked)) if number not in answers]
        process = self._process = self._process or _started(self.spec)
        assert process.stdin is not None
        assert process.stdout is not None
        unmade: dict[int, Exception] = {}
        feeder = threading.Thread(target=_feed, args=(process.stdin, asked, todo, unmade), daemon=True)
        feeder.start()
        stop = ""
        for _ in todo:
            line = process.stdout.readline()
            if not line.endswith(b"\n"):
                break
            answer = json.loads(line)
            number = answer["number"]
            if "stop" in answer:
                stop = stop or answer["stop"]
            elif "refused" in answer:
                kind = Filtered if answer.get("filtered") else RowRefused
                answers[number] = unmade.get(number) or kind(answer["refused"])
            else:
                answers[number] = Reply(**answer["reply"])
        feeder.join()
        return stop


def _feed(pipe: IO[bytes], asked: Sequence[Asked], todo: Sequence[int], unmade: dict[int, Exception]) -> None:
    """Requests into the pipe, which is full while the courier has enough to do. One that cannot be made is sent as an
    empty message, which comes back: so there is an answer to wait for whatever happens."""
    for number in todo:
        words, picture = {"number": number}, b""
        try:
            request = asked[number]()
            words, picture = words | {name: getattr(request, name) for name in _WORDS}, request.picture
        except Exception as error:
            unmade[number] = error
        try:
            _write(pipe, words, picture)
        except (OSError, ValueError):  # gone: the reader sees it, too
            return


_LINKS: dict[str, Link] = {}


def link(spec: Spec) -> Link:
    """The link of this process for a job; that of another job is let go."""
    for run in [run for run in _LINKS if run != spec.run]:
        _LINKS.pop(run).close()
    return _LINKS.setdefault(spec.run, Link(spec))


def _started(spec: Spec) -> subprocess.Popen[bytes]:
    package = str(Path(facemllm.__file__).parents[1])
    path = os.pathsep.join(part for part in (package, os.environ.get("PYTHONPATH", "")) if part)
    environment = {name: value for name, value in os.environ.items() if name != TOKEN} | {"PYTHONPATH": path}
    process = subprocess.Popen(
        [sys.executable, "-m", "facemllm.asking.courier"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        cwd="/",
    )
    assert process.stdin is not None
    with suppress(OSError):
        _write(process.stdin, asdict(spec), b"")
    return process


def _write(pipe: IO[bytes], words: Mapping[str, Any], picture: bytes) -> None:
    text = json.dumps(words).encode()
    pipe.write(HEAD.pack(len(text), len(picture)) + text + picture)
    pipe.flush()
