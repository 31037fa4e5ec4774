"""Histograms of our own: what leaves is what the SDK would have sent."""

from __future__ import annotations

from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    InMemoryMetricReader,
    MetricExporter,
    MetricExportResult,
    MetricsData,
)

from loanmesh.runtime.histogram import SERIES_MAX, Exporting, Histogram
from loanmesh.runtime.measures import Measure

MEASURE = Measure("loanmesh.example.duration", "s", (0.1, 1.0, 10.0))
VALUES = (0.05, 0.1, 0.5, 1.0, 5.0, 100.0)


class Kept(MetricExporter):
    """Keeps what it is told to send."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[MetricsData] = []

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **more: Any) -> MetricExportResult:
        self.sent.append(metrics_data)
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        return True

    def shutdown(self, timeout_millis: float = 30_000, **more: Any) -> None:
        pass


def _points(data: MetricsData | None) -> dict[frozenset[Any], Any]:
    assert data
    return {
        frozenset((point.attributes or {}).items()): point
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == MEASURE.name
        for point in metric.data.data_points
    }


def test_what_leaves_is_what_the_sdk_would_have_sent() -> None:
    reader = InMemoryMetricReader()
    meter = MeterProvider([reader]).get_meter("loanmesh")
    theirs = meter.create_histogram(MEASURE.name, unit="s", explicit_bucket_boundaries_advisory=MEASURE.bounds)
    ours, exporter = Histogram(MEASURE, lambda: 7), Kept()
    for attributes in ({"rpc.method": "A"}, {"rpc.method": "B", "rpc.status_code": "OK"}):
        for value in VALUES:
            theirs.record(value, attributes)
            ours.record(value, attributes)
    collected = reader.get_metrics_data()
    assert collected
    empty = MetricsData([type(each)(each.resource, [], "") for each in collected.resource_metrics])
    assert Exporting(exporter, [ours]).export(empty) is MetricExportResult.SUCCESS
    expected, found = _points(collected), _points(exporter.sent[0])
    assert found.keys() == expected.keys()
    for key, point in found.items():
        for name in ("count", "sum", "min", "max", "explicit_bounds"):
            assert getattr(point, name) == getattr(expected[key], name), name
        assert list(point.bucket_counts) == list(expected[key].bucket_counts)


def test_attributes_without_end_do_not_fill_the_memory() -> None:
    histogram = Histogram(MEASURE, lambda: 7)
    for number in range(2 * SERIES_MAX):
        histogram.record(1.0, {"id": str(number)})
    points: list[Any] = list(histogram.metric().data.data_points)
    assert len(points) == SERIES_MAX + 1
    assert sum(point.count for point in points) == 2 * SERIES_MAX


def test_where_nothing_was_recorded_nothing_is_added() -> None:
    exporter = Kept()
    sent = MetricsData([])
    Exporting(exporter, [Histogram(MEASURE, lambda: 7)]).export(sent)
    assert exporter.sent == [sent]
