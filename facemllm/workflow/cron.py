"""Cron expressions as Kubeflow Pipelines reads them: six fields, seconds first, in UTC (robfig/cron, `cron.Parse`)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from facemllm.errors import UserError

_FULL = ("Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
_DAYS = {name[:3].lower(): number for number, name in enumerate(_FULL)}
_MONTH_NAMES = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTHS = {name: number for number, name in enumerate(_MONTH_NAMES, start=1)}
_LAST = {month: 29 if month == 2 else 30 if month in (4, 6, 9, 11) else 31 for month in range(1, 13)}
_EVERY = {"@hourly": "0 0 * * * *", "@daily": "0 0 0 * * *", "@midnight": "0 0 0 * * *", "@weekly": "0 0 0 * * 0"}
_EVERY |= {"@monthly": "0 0 0 1 * *", "@yearly": "0 0 0 1 1 *", "@annually": "0 0 0 1 1 *"}


@dataclass(frozen=True)
class Field:
    """One field of an expression: its name, its least and greatest value, and words that stand for numbers."""

    name: str
    least: int
    most: int
    words: dict[str, int]

    def values(self, text: str, expression: str) -> list[int]:
        """The numbers that a field allows, sorted. Raises UserError for anything else."""
        found: set[int] = set()
        for part in text.lower().split(","):
            span, slash, step = part.partition("/")
            low, dash, high = span.partition("-")
            if span in ("*", "?"):
                first, last = self.least, self.most
            else:
                first = self._number(low, part, expression)
                last = self._number(high, part, expression) if dash else self.most if slash else first
            if first > last or (slash and not re.fullmatch("[1-9][0-9]*", step)):
                raise self._refused(part, expression)
            found |= set(range(first, last + 1, int(step or 1)))
        return sorted(found)

    def _number(self, text: str, part: str, expression: str) -> int:
        number = self.words.get(text, int(text) if re.fullmatch("[0-9]{1,4}", text) else -1)
        if not self.least <= number <= self.most:
            raise self._refused(part, expression)
        return number

    def _refused(self, part: str, expression: str) -> UserError:
        named = f" or {next(iter(self.words))} to {list(self.words)[-1]}" if self.words else ""
        return UserError(
            f"--cron {expression!r}: {part!r} is no {self.name}; give {self.least} to {self.most}{named}, *, a-b, */n"
        )


FIELDS = (
    Field("second", 0, 59, {}),
    Field("minute", 0, 59, {}),
    Field("hour", 0, 23, {}),
    Field("day of the month", 1, 31, {}),
    Field("month", 1, 12, _MONTHS),
    Field("day of the week", 0, 6, _DAYS),
)


def described(expression: str) -> str:
    """What an expression means in words, such as "every day at 03:00 UTC".

    Raises UserError for an expression that Kubeflow Pipelines would refuse, for a day that never comes, and for one of
    five fields: it takes the first as seconds, so that `0 3 * * *` would not run at three.
    """
    fields = _EVERY.get(expression.strip().lower(), expression).split()
    if len(fields) == 5:
        six = " ".join(["0", *fields])
        raise UserError(f"--cron {expression!r} has five fields; Kubeflow reads seconds first: --cron {six!r}")
    if len(fields) != len(FIELDS):
        form = "second minute hour day month weekday, as in '0 0 3 * * *' for every day at 03:00 UTC"
        raise UserError(f"--cron {expression!r}: six fields are needed: {form}")
    second, minute, hour, day, month, weekday = (
        field.values(text, expression) for field, text in zip(FIELDS, fields, strict=True)
    )
    if len(weekday) == 7 and not any(one <= _LAST[of] for of in month for one in day):
        raise UserError(f"--cron {expression!r} never comes: no month of {fields[4]} has a day {fields[3]}")
    return f"{_days(day, month, weekday, fields)} {_clock(hour, minute, second, fields)} UTC"


def _clock(hour: list[int], minute: list[int], second: list[int], fields: list[str]) -> str:
    if len(minute) == len(second) == 1 and len(hour) <= 4:
        seconds = f":{second[0]:02d}" if second[0] else ""
        return "at " + " and ".join(f"{one:02d}:{minute[0]:02d}{seconds}" for one in hour)
    if len(hour) == 24 and len(minute) == len(second) == 1:
        return f"every hour at minute {minute[0]}" + (f", second {second[0]}" if second[0] else "")
    spoken = zip(("hour", "minute", "second"), (hour, minute, second), (24, 60, 60), (2, 1, 0), strict=True)
    parts = [f"every {name}" if len(one) == all_ else f"{name} {fields[place]}" for name, one, all_, place in spoken]
    return "at " + ", ".join(parts)


def _days(day: list[int], month: list[int], weekday: list[int], fields: list[str]) -> str:
    months = "" if len(month) == 12 else f" in month {fields[4]}"
    if len(day) == 31 and len(weekday) == 7:
        return f"every day{months}"
    named = "every " + " and ".join(_FULL[one] for one in weekday)
    dated = f"on day {fields[3]} of {'every month' if not months else 'month ' + fields[4]}"
    if len(weekday) == 7:
        return dated
    return named + months if len(day) == 31 else f"{dated} or {named}"  # either is enough where both are restricted
