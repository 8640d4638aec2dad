"""What pages that are served share: headers that forbid what they do not need, templates of data from strangers, and
the first part of their style sheets (`web.css`)."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

LONGEST = 2000
"""Characters of a text that are shown."""


def headers(**allowed: str) -> dict[str, str]:
    """Headers of every answer: nothing from other sites, no frames, no caches, nothing inline; styles, pictures and
    forms of the page's own. `allowed` adds to the Content-Security-Policy, as in `script_src="'self'"`."""
    policy = {"default-src": "'none'", "style-src": "'self'", "img-src": "'self'", "form-action": "'self'"}
    policy |= {"base-uri": "'none'", "frame-ancestors": "'none'"}
    policy |= {name.replace("_", "-"): value for name, value in allowed.items()}
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        # not no-referrer: with that, browsers send "Origin: null" with our own forms; no other site is told either way
        "Referrer-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
        "Cache-Control": "no-store",
    }


def environment(folder: Path, filters: Mapping[str, Callable[..., Any]]) -> Environment:
    """Templates of a folder: they escape all data, spell out characters that hide, and know no missing name."""
    made = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= filters
    return made


def style(own: Path) -> str:
    """A page's style sheet: what all share, then its own."""
    return Path(__file__).with_name("web.css").read_text("utf-8") + "\n" + own.read_text("utf-8")


def plain(value: object, most: int = LONGEST) -> str:
    """A text as what is read: characters that hide, reorder or cannot be written are spelt out, long ones cut."""
    text = value if isinstance(value, str) else str(value)
    cut = text[:most] + "…" if len(text) > most else text
    return "".join(one if _displayable(one) else f"\\u{{{ord(one):x}}}" for one in cut)


def _displayable(one: str) -> bool:
    return one in "\n\t" or unicodedata.category(one) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


def _visible(value: Any) -> Any:
    shown = isinstance(value, Markup) or not isinstance(value, str) or value.isprintable()
    return value if shown else plain(value)
