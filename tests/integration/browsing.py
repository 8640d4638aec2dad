"""Debian's chromium through Playwright, and what a page must not have: words that are faint, boxes that stick out."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium"))), None)
marks = [
    pytest.mark.integration,
    pytest.mark.skipif(BROWSER is None, reason="no browser: apt install chromium-headless-shell (or chromium)"),
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-sync", "--disable-dev-shm-usage"]
SHOWN = [(width, scheme) for width in (360, 1280) for scheme in ("light", "dark")]
"""Widths of a window and colour schemes in which a page must be readable."""


@contextmanager
def launched() -> Iterator[Any]:
    """A browser, for as long as the block lasts."""
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield made
        made.close()


BEYOND = """() => [...document.querySelectorAll("section table, section svg, aside > *")]
  .filter(one => !one.closest(".scroll") && one.getClientRects().length)
  .filter(one => one.getBoundingClientRect().right > one.closest("section, aside").getBoundingClientRect().right)
  .map(one => one.textContent.trim().slice(0, 40))"""
"""What sticks out of its box."""

FAINT = """() => {
  const parse = text => (text.match(/[\\d.]+/g) || []).map(Number)
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0)
  const ground = one => {
    for (let at = one; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor)
      if (colour.length < 4 || colour[3] > 0) return colour
    }
    return [255, 255, 255]
  }
  const faint = []
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  while (walk.nextNode()) {
    const one = walk.currentNode.parentElement
    if (!walk.currentNode.data.trim() || one.closest('svg') || !one.getClientRects().length) continue
    const pair = [light(parse(getComputedStyle(one).color)), light(ground(one))].sort((a, b) => b - a)
    const ratio = (pair[0] + .05) / (pair[1] + .05)
    if (ratio < 4.5) faint.push(`${walk.currentNode.data.trim().slice(0, 40)} ${ratio.toFixed(2)}`)
  }
  return faint
}"""


def as_shown(page: Any, width: int, scheme: str) -> None:
    """Give the page a window so wide, in pixels, and a colour scheme."""
    page.set_viewport_size({"width": width, "height": 780})
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")


def assert_readable(page: Any, shown: tuple[int, str]) -> None:
    """With all that folds open nothing is wider than the window, faint or out of its box, and controls have names."""
    for folded in page.locator("details").all():
        folded.evaluate("one => { one.open = true }")
    assert page.evaluate("document.documentElement.scrollWidth") <= shown[0], shown
    assert page.evaluate(FAINT) == [], shown
    assert page.evaluate(BEYOND) == [], shown
    for control in page.locator("input:not([type=hidden]), select, textarea, button").all():
        assert control.evaluate("one => one.labels?.length || one.innerText.length") > 0
