"""A lineage for reading: a tree for the terminal, and which of its nodes a person asks for when there are many.

A graph is what `facemllm lineage --json` prints: `roots`, `direction`, `nodes`, `edges` (`material` went into
`product`), `notes`. Every node stands once, below the last of what it went into (up) or of what went into it (down).
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.text import Text

Node = Mapping[str, Any]
SHOWN = 30
"""Lines of a tree before the rest is folded."""
_NOTES = 3
_FIRST = ("release", "rollback", "reject", "revoke", "refused", "request", "gate")
_PROMINENT = ("version", "release", "rollback", "approve", "reject", "revoke", "source")
_STYLES = {"version": "bold", "release": "green", "rollback": "yellow", "approve": "green", "reject": "red"}
_STYLES |= {"revoke": "red", "refused": "red", "source": "magenta"}


@dataclass
class Branch:
    """A spanning tree of a graph: children by node, in reading order; `folded` counts by kind what was left out."""

    roots: list[str]
    nodes: dict[str, Node]
    children: dict[str, list[str]] = field(default_factory=dict)
    folded: dict[str, Counter[str]] = field(default_factory=dict)

    def below(self, start: Iterable[str]) -> Iterator[str]:
        """Nodes and all below them, in reading order."""
        todo = list(start)[::-1]
        while todo:
            here = todo.pop()
            yield here
            todo += self.children.get(here, [])[::-1]


def branches(graph: Mapping[str, Any], most: int | None = SHOWN) -> dict[str, Branch]:
    """The spanning trees that a graph is read as: `up`, `down` or both; of more than `most` nodes the telling ones."""
    ways = ("up", "down") if graph["direction"] == "both" else (graph["direction"],)
    return {way: _folded(_spanning(graph, way == "up"), most) for way in ways}


def lines(graph: Mapping[str, Any], width: int, everything: bool = False) -> list[Text]:
    """The tree in lines of at most `width` columns, times in UTC."""
    found: list[Text] = []
    trees = branches(graph, None if everything else SHOWN)
    for way, tree in trees.items():
        if len(trees) > 1:
            found.append(Text({"up": "made from", "down": "made into"}[way], "underline"))
        rows = list(_rows(tree, "← " if way == "up" else "→ "))
        nodes = [(lead, tree.nodes[row]) for lead, _, row in rows if isinstance(row, str)]
        columns = [max(len(lead) + len(node["kind"]) for lead, node in nodes)]
        columns += [min(24, max(len(node["name"]) for _, node in nodes))]
        for lead, rest, row in rows:
            if isinstance(row, str):
                found += _line(tree.nodes[row], lead, rest, width, columns)
            else:
                found.append(Text(f"{lead}{folded_words(row)}", "dim"))
        found += _commits(graph, tree, width, columns, everything)
    notes = graph["notes"] if everything else graph["notes"][:_NOTES]
    found += [Text(line, "dim") for note in notes for line in textwrap.wrap(note, width, subsequent_indent="  ")]
    if more := len(graph["notes"]) - len(notes):
        found.append(Text(f"+ {more:,} more such lines, --all", "dim"))
    return found


def day(node: Node) -> str:
    """When a node came about, to the minute."""
    return (node["at"] or "")[:16].replace("T", " ")


def _at(node: Node) -> str:
    return str(node["at"] or "")


def _spanning(graph: Mapping[str, Any], up: bool) -> Branch:
    nodes = {node["id"]: node for node in graph["nodes"]}
    after: dict[str, list[str]] = {}
    for edge in graph["edges"]:
        here, there = edge["product"], edge["material"]
        if up and nodes[here]["kind"] in ("release", "rollback") and graph["direction"] == "up":
            here, there = there, here  # what is asked about was released: shown with what it was made from
        elif not up:
            here, there = there, here
        if nodes[there]["kind"] != "commit":
            after.setdefault(here, []).append(there)
    order = _ordered(graph["roots"], after)
    rank: dict[str, tuple[int, bool, str]] = dict.fromkeys(graph["roots"], (0, True, ""))
    parent: dict[str, str] = {}
    for here in order:
        offered = (rank[here][0] + 1, nodes[here]["kind"] not in _FIRST, _at(nodes[here]))
        for there in after.get(here, ()):
            if there not in rank or offered > rank[there]:
                rank[there], parent[there] = offered, here
    tree = Branch(list(graph["roots"]), nodes)
    for there, here in parent.items():
        if there not in graph["roots"]:
            tree.children.setdefault(here, []).append(there)
    below = _heights(order, tree.children)
    for children in tree.children.values():
        children.sort(key=lambda id: _at(nodes[id]), reverse=True)
        children.sort(key=lambda id: (nodes[id]["kind"] not in _FIRST, below[id]))
    return tree


def _ordered(roots: Sequence[str], after: Mapping[str, list[str]]) -> list[str]:
    """All that is reached, everything before what comes after it."""
    done: dict[str, None] = {}
    seen: set[str] = set()
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        here, left = stack.pop()
        if left:
            done[here] = None
        elif here not in seen:
            seen.add(here)
            stack.append((here, True))
            stack += [(there, False) for there in after.get(here, ()) if there not in seen]
    return list(done)[::-1]


def _heights(order: Sequence[str], children: Mapping[str, list[str]]) -> dict[str, int]:
    heights: dict[str, int] = {}
    for here in reversed(order):
        heights[here] = 1 + max((heights[child] for child in children.get(here, ())), default=0)
    return heights


def _folded(tree: Branch, most: int | None) -> Branch:
    """The tree with the paths to what a person asks for, newest first, until there are `most` nodes."""
    everything = list(tree.below(tree.roots))
    if most is None or len(everything) <= most:
        return tree
    parent = {child: here for here, children in tree.children.items() for child in children}

    def weight(id: str) -> tuple[bool, bool, bool, str]:
        node = tree.nodes[id]
        facts = node["facts"]
        prominent = node["kind"] in _PROMINENT
        return bool(facts.get("serves")), facts.get("state") == "approved", prominent, _at(node)

    kept = dict.fromkeys(tree.roots)
    for id in sorted(everything, key=weight, reverse=True):
        room = most - len(kept)
        if room <= 0:
            break
        if tree.nodes[id]["kind"] in _PROMINENT or not tree.children.get(id):
            path = [id]
            while path[-1] not in kept:
                path.append(parent[path[-1]])
            if len(path) > room:  # of a long chain both ends
                path = [*path[: room // 2], *path[len(path) - (room - room // 2) :]]
            kept |= dict.fromkeys(path)
    found, nearest = Branch(tree.roots, tree.nodes), {root: root for root in tree.roots}
    for id in everything:
        above = nearest.get(parent.get(id, id), id)
        nearest[id] = id if id in kept else above
        if id not in kept:
            found.folded.setdefault(above, Counter())[tree.nodes[id]["kind"]] += 1
        elif id not in tree.roots:
            found.children.setdefault(above, []).append(id)
    return found


def folded_words(kinds: Counter[str]) -> str:
    """What was folded, in words."""
    counted = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(4)) + (", …" if len(kinds) > 4 else "")
    return f"+ {kinds.total():,} more ({counted}), --all"


def _rows(tree: Branch, arrow: str) -> Iterator[tuple[str, str, str | Counter[str]]]:
    """Nodes, and what was folded, with what leads to them and what leads on; single children keep their column."""
    for root in tree.roots:
        stack = [(root, "", "")]
        while stack:
            id, lead, rest = stack.pop()
            children, more = tree.children.get(id, []), tree.folded.get(id)
            yield lead, rest, id
            if more:
                yield f"{rest}{'├─ ' if children else '└─ '}", rest, more
            if len(children) == 1 and not more:
                stack.append((children[0], f"{rest}{arrow}", rest))
                continue
            for number, child in reversed(list(enumerate(children, start=1))):
                last = number == len(children)
                stack.append((child, f"{rest}{'└─ ' if last else '├─ '}", f"{rest}{'   ' if last else '│  '}"))


def _line(node: Node, lead: str, rest: str, width: int, columns: Sequence[int]) -> Iterator[Text]:
    kind = f"{node['kind']:<{columns[0] - len(lead)}}  "
    name, at = f"{node['name']:<{columns[1]}}  ", f"{day(node):<16}"
    start = len(lead + kind + name + at) + 2
    beside = width - start >= 20
    indent = rest + " " * (start - len(rest)) if beside else f"{rest}    "
    wrapped = textwrap.wrap(node["text"], max(20, width - len(indent)), max_lines=3, placeholder=" …")
    line = Text.assemble((lead, "dim"), (kind, _STYLES.get(node["kind"], "bold")), (name, "cyan"), (at, "dim"))
    if wrapped and beside:
        line.append(f"  {wrapped.pop(0)}")
    line.rstrip()
    yield line
    yield from (Text(indent + one) for one in wrapped)


def _commits(
    graph: Mapping[str, Any], tree: Branch, width: int, columns: Sequence[int], everything: bool
) -> Iterator[Text]:
    """A line a commit: which of the results its code made."""
    made: dict[str, dict[str, None]] = {}
    for edge in graph["edges"]:
        if edge["role"] == "code":
            made.setdefault(edge["material"], {})[tree.nodes[edge["product"]]["kind"]] = None
    for number, (id, kinds) in enumerate(made.items()):
        if number == _NOTES and not everything:
            yield Text(f"+ {len(made) - number:,} more commits, --all", "dim")
            return
        node = {**tree.nodes[id], "text": f"the code of {', '.join(kinds)}"}
        yield from _line(node, "", "", width, columns)
