"""Small pieces of the report page, as HTML text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table of cells that are HTML already; columns of numbers stand to the right."""

    def cell(text: str) -> str:
        return f"<td class=n>{text}</td>" if text.replace(",", "").isdigit() else f"<td>{text}</td>"

    cells = [[cell(text) for text in row] for row in rows]
    kinds = [
        " class=n" if cells and all(row[n].startswith("<td class=n>") for row in cells) else ""
        for n in range(len(header))
    ]
    head = "".join(f"<th{kind}>{name}</th>" for name, kind in zip(header, kinds, strict=True))
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    return f"<div class=scroll><table>\n<tr>{head}</tr>\n{body}\n</table></div>"


def bar(share: float) -> str:
    """A share of 0 to 1 as a bar and in per cent."""
    return (
        '<span class=share><svg class=bar viewBox="0 0 100 8" preserveAspectRatio=none aria-hidden=true>'
        f'<rect class=back width="100" height="8"/><rect width="{100 * share:.1f}" height="8"/></svg>'
        f" {100 * share:.1f} %</span>"
    )


def folded(title: str, content: Sequence[str], *, opened: bool = False) -> list[str]:
    """Content that a click shows and hides."""
    return [f"<details{' open' if opened else ''}><summary>{title}</summary>", *content, "</details>"]


def code(text: str) -> str:
    """A name or digest."""
    return f"<code>{escape(text)}</code>"


def quiet(text: str) -> str:
    """A paragraph of explanation; the text is HTML already."""
    return f"<p class=quiet>{text}</p>"


def mark(word: str, kind: str) -> str:
    """A coloured word; `kind` is good, warn or bad."""
    return f"<span class={kind}>{escape(word)}</span>"
