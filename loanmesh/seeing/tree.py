"""The spans of a trace as a tree, in the order in which one reads it. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from loanmesh.seeing.spans import Log, Span


@dataclass
class Node:
    """A span, what happened within it, and the lines its process logged meanwhile."""

    span: Span
    depth: int = 0
    children: list[Node] = field(default_factory=list)
    logs: list[Log] = field(default_factory=list)


def plant(spans: Sequence[Span]) -> list[Node]:
    """The roots, by time. A span whose parent nobody told is a root; so is one in a ring, which no tree has."""
    nodes = {(span.trace_id, span.span_id): Node(span) for span in spans}
    roots: list[Node] = []
    for (trace_id, span_id), node in nodes.items():
        parent = nodes.get((trace_id, node.span.parent_id))
        if parent is None or node.span.parent_id == span_id or _is_above(node, parent, nodes):
            roots.append(node)
        else:
            parent.children.append(node)
    for node in nodes.values():
        node.children.sort(key=_by_time)
    return sorted(roots, key=_by_time)


def walk(roots: Sequence[Node], depth: int = 0) -> Iterator[Node]:
    """Every node, parents first, each with its depth."""
    for node in roots:
        node.depth = depth
        yield node
        yield from walk(node.children, depth + 1)


def hang_logs(roots: Sequence[Node], logs: Sequence[Log]) -> list[Log]:
    """Put each line under the innermost span of its process at that time; the lines that fit nowhere."""
    by_instance: dict[str, list[Node]] = defaultdict(list)
    for node in walk(roots):
        by_instance[node.span.instance].append(node)
    beside = []
    for line in logs:
        fitting = [n for n in by_instance[line.instance] if n.span.began - 0.01 <= line.at <= n.span.ended + 0.01]
        if fitting:
            max(fitting, key=lambda node: node.depth).logs.append(line)
        else:
            beside.append(line)
    return beside


def _is_above(node: Node, parent: Node, nodes: dict[tuple[str, str], Node]) -> bool:
    seen: set[str] = set()
    at: Node | None = parent
    while at is not None and at.span.span_id not in seen:
        if at is node:
            return True
        seen.add(at.span.span_id)
        at = nodes.get((at.span.trace_id, at.span.parent_id))
    return False


def _by_time(node: Node) -> tuple[float, float]:
    return (node.span.began, -node.span.ended)
