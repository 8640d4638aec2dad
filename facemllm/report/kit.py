"""The kit that every page is made with: Jinja2 templates that escape all data, and how figures are written.

Templates lie in `templates/`. In pages (`*.html.jinja`) whatever is put in is escaped as HTML; in Markdown
(`*.md.jinja`) as Markdown: plain words of one line that form no mark-up and no cell of a table. Plain text
(`*.txt.jinja`) takes it as it is.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

Figure = Mapping[str, Any]
"""A figure with its interval: `value`, `low` and `high`, as metrics.json has them."""


def render(template: str, **data: Any) -> str:
    """A page of plain data: `template` is a file of `templates/`, `data` what it names."""
    return _environment(template.split(".")[-2]).get_template(template).render(data)


@lru_cache(maxsize=3)
def _environment(kind: str) -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=kind != "txt",
        finalize=plain_markdown if kind == "md" else None,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    figures = (number, percent, estimate, share, brief, p_value, detectable, decimals, at, largest_first)
    made.filters |= {one.__name__: one for one in (*figures, text, words, seconds, table, code)}
    made.globals["top_of"] = top_of
    return made


def plain_markdown(value: Any) -> Any:
    """A value from outside as plain words of one line of Markdown; what is Markdown already stays."""
    if isinstance(value, Markup):
        return value
    return Markup(re.sub(r"([\\`*\[\]<>#|])", r"\\\1", re.sub(r"\s+", " ", str(value))))


def code(value: Any) -> Markup:
    """A name in Markdown's type of code, which has no escapes but for the bars of tables."""
    return Markup("`" + " ".join(str(value).split()).replace("`", "'").replace("|", r"\|") + "`")


def table(rows: Iterable[Sequence[Any]]) -> Markup:
    """A table of Markdown, its first row the head."""
    head, *body = ([plain_markdown(cell) for cell in row] for row in rows)
    return Markup("\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)))


def text(value: Any) -> str:
    """Any value; a float with four digits, nothing as a dash."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)


def words(name: Any) -> str:
    """A name as people read it."""
    return text(name).replace("_", " ")


def seconds(value: Any) -> str:
    """A time as people read it."""
    if not isinstance(value, int | float):
        return "–"
    return f"{value:.1f} s" if value < 90 else f"{int(value // 60)} min {int(value % 60):02d} s"


def number(value: float | None, digits: int = 3) -> str:
    """A figure with a fixed number of digits."""
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share in per cent."""
    return "–" if value is None else f"{value:.{digits}%}"


def decimals(figure: Figure, most: int) -> int:
    """How many decimals of a figure its 95 % interval supports: up to two significant digits of the interval's
    half-width, and no more than `most`. All of them where there is no interval, or one of no width."""
    low, high = figure.get("low"), figure.get("high")
    if low is None or high is None or high <= low:
        return most
    magnitude = int(f"{(high - low) / 2:.1e}".partition("e")[2])
    return min(most, max(0, 1 - magnitude))


def percent_decimals(figure: Figure) -> int:
    """The same of a share in per cent, one at most."""
    return max(0, decimals(figure, 3) - 2)


def estimate(figure: Figure | float | None, digits: int = 3) -> Markup:
    """A figure with its 95 % interval, where it has one, rounded to what that supports: `0.810 [0.790, 0.830]`."""
    kept = decimals(figure, digits) if isinstance(figure, Mapping) else digits
    return _with_interval(figure, lambda value: number(value, kept), lambda end: number(end, kept))


def share(figure: Figure | float | None) -> Markup:
    """The same for a share, in per cent: `81.0 % [79.0, 83.0]`."""
    kept = percent_decimals(figure) if isinstance(figure, Mapping) else 1
    return _with_interval(figure, lambda value: percent(value, kept), lambda end: f"{100 * end:.{kept}f}")


def _with_interval(
    figure: Figure | float | None, said: Callable[[float | None], str], end: Callable[[float], str]
) -> Markup:
    if not isinstance(figure, Mapping):
        return Markup(said(figure))
    value, low, high = (figure.get(name) for name in ("value", "low", "high"))
    between = "" if low is None or high is None else f' <small class="ci">[{end(low)}, {end(high)}]</small>'
    return Markup(said(value) + between)


def brief(figure: Figure | float | None) -> str:
    """A figure in three digits, with its interval where it has one, rounded to what that supports: `0.14 (0.09–0.19)`;
    nothing for None."""
    if not isinstance(figure, Mapping):
        return f"{figure:.3g}" if isinstance(figure, int | float) else ""
    if figure.get("value") is None or figure.get("low") is None:
        return brief(figure.get("value"))
    kept = decimals(figure, 6)
    value, low, high = (f"{round(figure[end], kept) + 0.0:.3g}" for end in ("value", "low", "high"))
    return f"{value} ({low}–{high})"


def detectable(sizes: Mapping[str, Mapping[str, float]]) -> str:
    """Minimum detectable differences by task, of the best known pair of groups to the least: `age 3.4–8.6`."""
    return ", ".join(f"{task} {brief(size['low'])}–{brief(size['high'])}" for task, size in sizes.items())


def p_value(value: float | None) -> str:
    """A probability, never as a bare zero: `< .001`."""
    return "–" if value is None else "< .001" if value < 0.001 else f"{value:.3f}"


def at(value: float, top: float) -> float:
    """Where a value lies between zero and `top`, in per cent, kept within."""
    return round(100 * min(max(value / top, 0.0), 1.0), 2) if top > 0 else 0.0


def top_of(figures: Iterable[Figure], higher_is_better: bool) -> float:
    """Where a scale ends: one for shares, a little beyond the worst of the figures for errors."""
    ends = [figure[end] for figure in figures for end in ("value", "high") if figure.get(end) is not None]
    return 1.0 if higher_is_better else max(ends, default=1.0) * 1.06 or 1.0


def largest_first(gaps: Iterable[Figure]) -> list[Figure]:
    """Differences by their size, whatever their sign."""
    return sorted(gaps, key=lambda gap: -abs(gap.get("value") or 0.0))


def embedded(data: bytes, kind: str) -> str:
    """A picture as an address that holds it; `kind` is its type, as `image/jpeg`."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
