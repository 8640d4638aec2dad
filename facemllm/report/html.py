"""Small pieces of a page, as HTML text. Whatever comes from outside goes through `text`, which escapes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any


def page(title: str, sections: Iterable[str]) -> bytes:
    """A whole page of sections, with its style sheet inside; empty sections are left out."""
    style = Path(__file__).with_name("report.css").read_text("utf-8")
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · Face-MLLM</title><style>\n{style}</style></head>\n<body><main>\n"
    )
    return (head + "\n".join(section for section in sections if section) + "\n</main></body></html>\n").encode()


def text(value: Any) -> str:
    """Any value as escaped text; a float with four digits, nothing as a dash."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return escape(str(value))


def words(name: str) -> str:
    """A name as people read it, escaped."""
    return escape(name.replace("_", " "))


def seconds(value: Any) -> str:
    """A time as people read it."""
    if not isinstance(value, int | float):
        return "–"
    return f"{value:.1f} s" if value < 90 else f"{int(value // 60)} min {int(value % 60):02d} s"


def number(value: float | None, digits: int = 3) -> str:
    """A figure with a fixed number of digits."""
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A share in per cent."""
    return "–" if value is None else f"{value:.1%}"


def estimate(figure: Mapping[str, Any] | float | None, digits: int = 3) -> str:
    """A figure with its 95 % interval, where it has one: `0.810 [0.790, 0.830]`."""
    if not isinstance(figure, Mapping):
        return number(figure, digits)
    if figure.get("low") is None or figure.get("high") is None:
        return number(figure.get("value"), digits)
    between = f"[{number(figure['low'], digits)}, {number(figure['high'], digits)}]"
    return f"{number(figure['value'], digits)} <small>{between}</small>"


def share(figure: Mapping[str, Any] | float | None) -> str:
    """The same for a share, in per cent: `81.0 % [79.0, 83.0]`."""
    if not isinstance(figure, Mapping):
        return percent(figure)
    if figure.get("low") is None or figure.get("high") is None:
        return percent(figure.get("value"))
    return f"{percent(figure.get('value'))} <small>[{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]</small>"


def section(title: str, body: str) -> str:
    """A titled part of the page."""
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>"


def quiet(body: str) -> str:
    """A paragraph of explanation; the text is HTML already."""
    return f'<p class="quiet">{body}</p>'


def folded(title: str, body: str) -> str:
    """Content that a click shows and hides."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def table(head: Sequence[str], rows: Iterable[str], numeric: Iterable[int] = (), kind: str = "plain") -> str:
    """A table of rows that are HTML already (`row`); the columns `numeric` stand to the right."""
    right = set(numeric)
    classes = [' class="n"' if place in right else "" for place in range(len(head))]
    cells = "".join(f"<th{side}>{escape(name)}</th>" for side, name in zip(classes, head, strict=True))
    top = f"<thead><tr>{cells}</tr></thead>"
    return f'<div class="scroll"><table class="{kind}">{top}<tbody>{"".join(rows)}</tbody></table></div>'


def row(cells: Sequence[str], numeric: Iterable[int] = ()) -> str:
    """A row of cells that are HTML already."""
    right = set(numeric)
    opened = ['<td class="n">' if place in right else "<td>" for place in range(len(cells))]
    body = "".join(f"{start}{cell}</td>" for start, cell in zip(opened, cells, strict=True))
    return f"<tr>{body}</tr>"


def tag(word: str, kind: str) -> str:
    """A word in a coloured frame; `kind` is good, fair, bad or quiet."""
    return f'<span class="tag {kind}">{escape(word)}</span>'


def code(value: Any) -> str:
    """A name or digest."""
    return f"<code>{text(value)}</code>"


def definitions(facts: Mapping[str, Any]) -> str:
    """A mapping as a list of terms, nested mappings flattened into their names."""
    rows = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            rows += [(f"{name} {inner}", below) for inner, below in value.items()]
        else:
            rows.append((name, value))
    body = "".join(
        f"<dt>{words(name)}</dt><dd>{code(value) if 'digest' in name else text(value)}</dd>" for name, value in rows
    )
    return f"<dl>{body}</dl>"
