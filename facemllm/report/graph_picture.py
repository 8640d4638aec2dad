"""A lineage as a drawing (SVG) and as a page: materials above, what was made from them below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from facemllm.report.kit import render
from facemllm.report.lineage import branches, day, folded_words

WIDTH, HEIGHT, ACROSS, DOWN = 188, 50, 208, 84
"""A box, and the distance of boxes, in pixels."""
DRAWN = 60
_LETTERS = 25


def page(graph: Mapping[str, Any]) -> str:
    """A self-contained page about a graph: the drawing of what a person asks for, and a table of everything."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    behind: dict[str, list[tuple[str, str]]] = {}
    for edge in graph["edges"]:
        behind.setdefault(edge["product"], []).append((edge["role"], nodes[edge["material"]]["name"]))
    trees = branches(graph, DRAWN)
    folded = [folded_words(kinds).removesuffix(", --all") for tree in trees.values() for kinds in tree.folded.values()]
    roots = [nodes[id] for id in graph["roots"]]
    ways = {"up": "What it was made from", "down": "What was made from it", "both": "What it was made from, and into"}
    return render(
        "lineage.html.jinja",
        roots=roots,
        way=ways[graph["direction"]],
        drawing=drawing(graph, {id for tree in trees.values() for id in tree.below(tree.roots)}),
        folded=folded,
        nodes=[{**node, "day": day(node), "from": behind.get(node["id"], [])} for node in graph["nodes"]],
        notes=graph["notes"],
    )


def drawing(graph: Mapping[str, Any], shown: set[str] | None = None) -> Markup:
    """A graph as SVG, all of it or the nodes that are shown. Its colours are those of the page around it."""
    nodes = [node for node in graph["nodes"] if (shown is None or node["id"] in shown) and node["kind"] != "commit"]
    ids = {node["id"] for node in nodes}
    edges = [edge for edge in graph["edges"] if edge["material"] in ids and edge["product"] in ids]
    rows = _rows([node["id"] for node in nodes], edges)
    place = {id: (column, row) for row, members in enumerate(rows) for column, id in enumerate(members)}
    widest = max((len(row) for row in rows), default=0)
    at = {id: (_left(column, len(rows[row]), widest), 8 + row * DOWN) for id, (column, row) in place.items()}
    spans = [place[edge["product"]][1] - place[edge["material"]][1] for edge in edges]
    bow = 26 + 9 * max(spans, default=1)
    lines = [
        {"path": _path(at[edge["material"]], at[edge["product"]], span), "role": edge["role"], "far": span > 1}
        for edge, span in zip(edges, spans, strict=True)
    ]
    boxes = [
        {"node": node, "x": at[node["id"]][0], "y": at[node["id"]][1], "asked": node["id"] in graph["roots"]}
        for node in nodes
    ]
    size = (16 + widest * ACROSS + bow, 16 + len(rows) * DOWN)
    return Markup(
        render("graph.html.jinja", boxes=boxes, lines=lines, size=size, box=(WIDTH, HEIGHT), cut=_cut, day=day)
    )


def _rows(ids: Sequence[str], edges: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Nodes by the longest way from what has no material; in each row near those they were made from."""
    before: dict[str, list[str]] = {id: [] for id in ids}
    for edge in edges:
        before[edge["product"]].append(edge["material"])
    depth: dict[str, int] = {}
    todo = list(ids)[::-1]
    while todo:
        here = todo[-1]
        waiting = [there for there in before[here] if there not in depth]
        if waiting and here not in depth:
            todo += waiting
        else:
            depth.setdefault(here, 1 + max((depth[there] for there in before[here]), default=-1))
            todo.pop()
    after: dict[str, list[int]] = {}
    for edge in edges:
        after.setdefault(edge["material"], []).append(depth[edge["product"]])
    rows: list[list[str]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for id in ids:  # what has no material stands right above the first that it went into
        level = depth[id] if before[id] or id not in after else min(after[id]) - 1
        rows[level].append(id)
    where: dict[str, float] = {}
    for row in rows:
        row.sort(key=lambda id: sum(where.get(one, 0.0) for one in before[id]) / max(1, len(before[id])))
        where |= {id: column - (len(row) - 1) / 2 for column, id in enumerate(row)}
    return rows


def _left(column: int, count: int, widest: int) -> float:
    return 8 + (column + (widest - count) / 2) * ACROSS


def _path(start: tuple[float, float], end: tuple[float, float], span: int) -> str:
    """An arrow from a material to a product; past boxes in between it bows out on the right."""
    if span > 1:
        (x, y), (u, v) = start, end
        x, u, y, v = x + WIDTH, u + WIDTH, y + HEIGHT / 2, v + HEIGHT / 2
        out = max(x, u) + 16 + 9 * span
        return f"M{x:g} {y:g}C{out:g} {y:g} {out:g} {v:g} {u + 2:g} {v:g}m6 -4l-6 4l6 4"
    x, y, u, v = start[0] + WIDTH / 2, start[1] + HEIGHT, end[0] + WIDTH / 2, end[1] - 2
    half = (y + v) / 2
    return f"M{x:g} {y:g}C{x:g} {half:g} {u:g} {half:g} {u:g} {v:g}m-4 -6l4 6l4 -6"


def _cut(text: str, letters: int = _LETTERS) -> str:
    return text if len(text) <= letters else f"{text[: letters - 1]}…"
