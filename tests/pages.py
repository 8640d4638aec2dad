"""Reads pages as a browser would: what is on them, that they are whole, and that they fetch and run nothing."""

import re
from html.parser import HTMLParser

HOSTILE = "<script>alert('x')</script>"


class Page(HTMLParser):
    """Tags, links, anchors and visible words of a page. Every opened tag must be closed in order, no script may run,
    and nothing may be fetched."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self._words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []
        assert html.startswith("<!doctype html>")
        assert "script" not in self.tags
        assert all(link.startswith(("data:image/", "#")) for link in self.links)
        assert not re.search(r"@import|url\(|<link", html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]
        self.ids += [value or "" for name, value in attributes if name == "id"]
        assert not [name for name, _ in attributes if name.startswith("on")]
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes another tag at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self._words.append(data)

    @property
    def text(self) -> str:
        """What a person reads, on one line."""
        return " ".join(" ".join(self._words).split())
