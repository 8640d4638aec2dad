"""Small pictures in lines of the page: intervals, earlier versions, what came from what. SVG without style or script.

Whatever they are given is escaped. Numbers are finite; a value beyond a scale is drawn at its end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from facemllm.report.web import plain

WIDTH, HEIGHT = 132, 20
_SPARK = 84
_BOX, _ROW, _GAP = 158, 44, 18


@dataclass(frozen=True)
class Node:
    """A box of a graph: its name, a line beneath it, and where it leads (an anchor of the page, or nothing). A node
    with `into` stands beside the node of that key."""

    key: str
    name: str
    note: str = ""
    link: str = ""
    into: str = ""


def interval(
    value: float | None,
    low: float | None,
    high: float | None,
    ends: tuple[float, float],
    marks: Mapping[str, float | None],
) -> Markup:
    """A value with its interval on a scale from `ends[0]` to `ends[1]`; `marks` (class of CSS: value) as lines."""
    if value is None:
        return Markup('<span class="quiet">no figure</span>')
    parts = [Markup('<line class="axis" x1="0" x2="{}" y1="10" y2="10"/>').format(WIDTH)]
    said = [f"{value:.3g}"]
    if low is not None and high is not None:
        left, right = sorted((_at(low, ends), _at(high, ends)))
        bar = '<rect class="interval" x="{}" y="5" width="{}" height="10" rx="3"/>'
        parts.append(Markup(bar).format(left, max(round(right - left, 1), 1.5)))
        said.append(f"95 % interval {low:.3g} to {high:.3g}")
    for name, mark in marks.items():
        if mark is not None:
            x = _at(mark, ends)
            parts.append(Markup('<line class="{0}" x1="{1}" x2="{1}" y1="2" y2="18"/>').format(name, x))
            if name != "zero":
                said.append(f"{name} {mark:.3g}")
    parts.append(Markup('<circle class="point" cx="{}" cy="10" r="3.5"/>').format(_at(value, ends)))
    return _svg("scale", WIDTH, HEIGHT, ", ".join(said), parts)


def legend(kind: str) -> Markup:
    """A mark alone (a class of CSS), for a legend beside words that say what it is."""
    parts = [Markup('<line class="{}" x1="13" x2="13" y1="2" y2="18"/>').format(kind)]
    if kind == "interval":
        parts = [Markup('<rect class="interval" x="3" y="5" width="20" height="10" rx="3"/>')]
        parts.append(Markup('<circle class="point" cx="13" cy="10" r="3.5"/>'))
    return _svg("scale", 26, HEIGHT, "", parts, role="presentation")


def scale(values: Sequence[float | None], zero: bool = False) -> tuple[float, float]:
    """The ends of a scale on which all values can be seen; with `zero`, zero lies on it, too."""
    known = [value for value in values if value is not None] + ([0.0] if zero else [])
    if not known:
        return 0.0, 1.0
    low, high = min(known), max(known)
    edge = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
    return low - edge, high + edge


def sparkline(values: Sequence[tuple[str, float]]) -> Markup:
    """A figure over versions, oldest first, the last one marked; nothing for fewer than two."""
    if len(values) < 2:
        return Markup("")
    ends = scale([value for _, value in values])
    step = (_SPARK - 8) / (len(values) - 1)
    points = [(round(4 + i * step, 1), round(20 - _at(value, ends, 16) - 2, 1)) for i, (_, value) in enumerate(values)]
    line = Markup('<polyline class="line" points="{}"/>').format(" ".join(f"{x},{y}" for x, y in points))
    dot = Markup('<circle class="point" cx="{}" cy="{}" r="2.5"/>').format(*points[-1])
    said = "by version: " + ", ".join(f"{name} {value:.3g}" for name, value in values)
    return _svg("spark", _SPARK, HEIGHT, said, [line, dot])


def graph(nodes: Sequence[Node], said: str) -> Markup:
    """Boxes beneath each other, each made from the one above and from those beside it."""
    trunk = [node for node in nodes if not node.into]
    parts: list[Markup] = []
    y, left = 2, _BOX + 34
    for index, node in enumerate(trunk):
        beside = [one for one in nodes if one.into == node.key]
        top = y
        for row, one in enumerate(beside):
            level = y + row * (_ROW + 8)
            parts.append(_box(one, 2, level))
            middle = level + _ROW // 2
            bend = "M{0} {1}H{2}V{3}H{4}" if row else "M{0} {1}H{4}"
            parts.append(
                Markup('<path class="edge" d="{}"/>').format(
                    bend.format(2 + _BOX, middle, left - 17, top + _ROW // 2, left - 5)
                )
            )
        if beside:
            parts.append(_arrow(left, top + _ROW // 2, down=False))
        parts.append(_box(node, left, top))
        tall = max(len(beside), 1) * (_ROW + 8) - 8
        y = top + tall + _GAP
        if index + 1 < len(trunk):
            x = left + _BOX // 2
            parts.append(Markup('<path class="edge" d="M{0} {1}V{2}"/>').format(x, top + _ROW, y - 5))
            parts.append(_arrow(x, y, down=True))
    return _svg("graph", left + _BOX + 2, y - _GAP + 4, said, parts, role="group")


def _box(node: Node, x: int, y: int) -> Markup:
    shape = Markup('<rect class="box" x="{}" y="{}" width="{}" height="{}" rx="6"/>').format(x, y, _BOX, _ROW)
    name = Markup('<text class="name" x="{}" y="{}">{}</text>').format(x + 9, y + 18, _cut(node.name, 17))
    note = Markup('<text class="note" x="{}" y="{}">{}</text>').format(x + 9, y + 34, _cut(node.note, 20))
    whole = Markup("<title>{} {}</title>").format(plain(node.name), plain(node.note))
    body = whole + shape + name + note
    return Markup('<a href="{}">{}</a>').format(node.link, body) if node.link else Markup("<g>{}</g>").format(body)


def _arrow(x: int, y: int, down: bool) -> Markup:
    tip = [(x - 4, y - 6), (x + 4, y - 6), (x, y)] if down else [(x - 6, y - 4), (x - 6, y + 4), (x, y)]
    return Markup('<polygon class="tip" points="{}"/>').format(" ".join(f"{a},{b}" for a, b in tip))


def _cut(text: str, most: int) -> str:
    return plain(text if len(text) <= most else text[: most - 1] + "…")


def _at(value: float, ends: tuple[float, float], width: int = WIDTH) -> float:
    span = ends[1] - ends[0]
    share = (value - ends[0]) / span if span > 0 else 0.5
    share = share if share == share else 0.5
    return round(4 + min(max(share, 0.0), 1.0) * (width - 8), 1)


def _svg(kind: str, width: int, height: int, said: str, parts: Sequence[Markup], role: str = "img") -> Markup:
    head = Markup('<svg class="{}" viewBox="0 0 {} {}" width="{}" height="{}" role="{}" aria-label="{}">')
    return (
        head.format(kind, width, height, width, height, role, plain(said)) + Markup("").join(parts) + Markup("</svg>")
    )
