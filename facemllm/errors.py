"""The one exception a user is meant to read: what is wrong, where, and how to mend it, in one line."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType


class UserError(Exception):
    """Something a user can put right. The command line prints its message as one line and exits with 1. `check` is, of
    a refusal, the one check that failed."""

    check: str | None = None


_ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?)")  # colours, titles, links

EXPECTED = (UserError, OSError, KeyboardInterrupt)
"""What ends a command with one line of `message_of` instead of a traceback."""


def message_of(error: BaseException) -> str:
    """What a command line says of an exception, behind `error:`; of a refusal with the check that failed."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; run the same command again to go on"
    if isinstance(error, OSError):
        where = f" {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{where}; check the place and your rights there"
    check = error.check if isinstance(error, UserError) else None
    return f"refused: [{check}] {error}" if check else str(error)


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """A message, or an exception's, as one line of at most `limit` characters that a terminal takes for text alone; the
    type's name when there is none."""
    plain = "".join(one for one in _ESCAPES.sub("", str(error)) if one.isprintable() or one.isspace())
    text = " ".join(plain.split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Raise UserError, `what` and the reason in one line, for whatever the block raises, be it no Exception, as a panic
    of tokenizers is; a UserError stays as it is, and what ends a program."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise UserError(f"{what}: {one_line(error)}") from error


def interrupted_in_one_line() -> None:
    """Have an interruption that nothing catches, as one while modules are still loading, printed as one line."""
    usual = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print(f"error: {message_of(error)}", file=sys.stderr)
        else:
            usual(kind, error, trace)

    sys.excepthook = hook


def guarded(command: Callable[[], object]) -> None:
    """Run a command line: what a user can mend becomes one line on standard error and exit code 1."""
    for variable in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "DVC_NO_ANALYTICS", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(variable, "true")
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        command()
    except EXPECTED as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        raise SystemExit(1) from None
