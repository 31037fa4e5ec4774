"""Metrics as Prometheus will have them, and what an expression reads: enough to tell whether the two fit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality, Metric

UNITS = {"s": "seconds", "By": "bytes", "ms": "milliseconds"}
RESOURCE_LABELS = frozenset({"job", "instance"})
"""What the collector's exporter makes of service.namespace, service.name and service.instance.id."""
FUNCTIONS = frozenset({
    "abs", "absent", "avg", "count", "histogram_quantile", "increase", "label_values", "max", "max_over_time", "min",
    "rate", "round", "sum", "time", "vector",
})  # fmt: skip
WORDS = frozenset(["and", "or", "unless", "on", "ignoring", "group_left", "by", "without", "offset", "bool"])


@dataclass(frozen=True)
class Emitted:
    """A metric as the code emits it."""

    name: str
    kind: str
    """counter, gauge or histogram, as Prometheus has it."""
    unit: str
    attributes: frozenset[str]


def emitted(metric: Metric) -> Emitted:
    """What an exported metric is."""
    which = metric.WhichOneof("data")
    assert which is not None
    data = getattr(metric, which)
    attributes = frozenset(a.key for point in data.data_points for a in point.attributes)
    kind: str = which
    if which == "sum":
        assert data.aggregation_temporality == AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
        kind = "counter" if data.is_monotonic else "gauge"
    return Emitted(metric.name, kind, metric.unit, attributes)


def series(metric: Emitted) -> dict[str, frozenset[str]]:
    """Names of the series that Prometheus makes of it, with their labels."""
    name = label(metric.name)
    if metric.unit in UNITS:
        name += f"_{UNITS[metric.unit]}"
    labels = frozenset(map(label, metric.attributes)) | RESOURCE_LABELS
    if metric.kind == "histogram":
        return {f"{name}_bucket": labels | {"le"}, f"{name}_count": labels, f"{name}_sum": labels}
    return {f"{name}_total" if metric.kind == "counter" else name: labels}


def label(name: str) -> str:
    """An OpenTelemetry name in Prometheus' letters."""
    return re.sub(r"\W", "_", name)


@dataclass(frozen=True)
class Read:
    """One metric that an expression reads, and by which labels it picks."""

    metric: str
    labels: frozenset[str]


def reads(expression: str) -> Iterator[Read]:
    """The metrics of an expression with the labels in their matchers. Raises ValueError where it cannot be one."""
    bare = _balanced(re.sub(r'"(?:[^"\\]|\\.)*"', '""', expression))
    bare = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", " ", bare)
    bare = re.sub(r"\[[^\]]*\]", " ", bare)
    bare = re.sub(r"\boffset\s+\w+", " ", bare)
    for found in re.finditer(r"([A-Za-z_:][\w:]*)\s*(\(|\{([^}]*)\})?", bare):
        name, after, matchers = found[1], found[2] or "", found[3] or ""
        if name in WORDS:
            continue
        if after == "(":
            if name not in FUNCTIONS:
                raise ValueError(f"{name} is no function that is known here, in {expression}")
            continue
        yield Read(name, frozenset(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)))


def grouped_by(expression: str) -> frozenset[str]:
    """All labels that an expression groups by."""
    groups = re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression)
    return frozenset(name for group in groups for name in re.findall(r"\w+", group))


def _balanced(text: str) -> str:
    open_, pairs = list[str](), {")": "(", "]": "[", "}": "{"}
    for letter in text:
        if letter in "([{":
            open_.append(letter)
        elif letter in pairs and (not open_ or open_.pop() != pairs[letter]):
            raise ValueError(f"brackets do not fit in {text}")
    if open_:
        raise ValueError(f"brackets stay open in {text}")
    return text


def recorded(groups: Sequence[Mapping[str, Any]]) -> dict[str, frozenset[str]]:
    """What recording rules make: names, with the labels that are left of what they read."""
    return {
        rule["record"]: grouped_by(rule["expr"]) - {"le"}
        for group in groups
        for rule in group["rules"]
        if "record" in rule
    }
