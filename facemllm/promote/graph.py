"""A graph of what was made from what: nodes, and edges from a material to a product."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from facemllm.version.tombstones import plain_line

Step = tuple[str, str]
"""A role (`conversations`, `model`, `approved`, ...) and the id of the node in it."""


@dataclass
class Node:
    """A thing in the graph. `name` is what it goes by, `at` when it came about (ISO 8601, UTC), `text` a line on it."""

    id: str
    kind: str
    name: str
    at: str | None = None
    text: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Edge:
    """`material` went into `product` in this role."""

    material: str
    product: str
    role: str


@dataclass
class Graph:
    """Nodes by id, edges, the nodes that were asked about, which way was walked, and lines on what is missing."""

    roots: list[str]
    direction: str
    nodes: dict[str, Node] = field(default_factory=dict)
    edges: dict[Edge, None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Ready for JSON: `roots`, `direction`, `nodes`, `edges` (`material` went into `product`), `notes`."""
        nodes, edges = [asdict(node) for node in self.nodes.values()], [asdict(edge) for edge in self.edges]
        for node in nodes:  # some of it others wrote, as names in MLflow: nothing of that may steer a terminal
            node |= {name: plain_line(node[name]) for name in ("kind", "name", "text")}
        notes = [plain_line(note) for note in self.notes]
        return {"roots": self.roots, "direction": self.direction, "nodes": nodes, "edges": edges, "notes": notes}


def walk(
    graph: Graph,
    start: Iterable[str],
    describe: Callable[[str], Node],
    next_of: Callable[[str], Iterable[Step]],
    up: bool,
) -> None:
    """Add to a graph all that is reached from `start`, by `next_of`: materials if `up`, else products.

    An edge that would close a loop is left out, with a note: nothing is made from itself.
    """
    open_path: set[str] = set()
    done: set[str] = set()
    for first in start:
        stack: list[tuple[str, Iterator[Step]]] = []

        def enter(id: str, stack: list[tuple[str, Iterator[Step]]] = stack) -> None:
            graph.nodes.setdefault(id, describe(id))
            open_path.add(id)
            stack.append((id, iter(next_of(id))))

        if first not in done:
            enter(first)
        while stack:
            here, rest = stack[-1]
            step = next(rest, None)
            if step is None:
                stack.pop()
                open_path.discard(here)
                done.add(here)
                continue
            role, there = step
            if there in open_path:
                graph.notes.append(f"loop: {here[:12]} and {there[:12]} would be made from each other; cut there")
                continue
            graph.edges.setdefault(Edge(there, here, role) if up else Edge(here, there, role))
            if there not in done:
                enter(there)


def time(at: datetime | float | None) -> str | None:
    """A time as nodes have it."""
    if isinstance(at, int | float):
        at = datetime.fromtimestamp(at, UTC)
    return None if at is None else at.astimezone(UTC).isoformat(timespec="seconds")
