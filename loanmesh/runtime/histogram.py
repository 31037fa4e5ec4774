"""Histograms that cost a microsecond a value, and leave with the SDK's own metrics.

The SDK's cost five alone and three times that in a busy process, since each value passes through views, filters and
locks; a decision is measured five times on its way. Here a value is a list's element counted up; what an exporter
sends is made when it sends it. For values recorded on one thread; another one may read at any time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    HistogramDataPoint,
    Metric,
    MetricExporter,
    MetricExportResult,
    MetricsData,
    ScopeMetrics,
)
from opentelemetry.sdk.metrics.export import Histogram as HistogramData
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from loanmesh.runtime.measures import Measure

SERIES_MAX = 500
"""Combinations of attributes of one histogram; beyond, values count as `other`: a bug must not fill the memory."""
_OTHER = (("otel.metric.overflow", "true"),)


@dataclass(slots=True)
class _Series:
    """Values of one combination of attributes."""

    counts: list[int]
    total: float = 0.0
    least: float = float("inf")
    most: float = float("-inf")


class Histogram:
    """How values of a measure are distributed, by attributes. `now_ns` tells the time of day, nanoseconds."""

    def __init__(self, measure: Measure, now_ns: Callable[[], int]) -> None:
        self._measure = measure
        self._now_ns = now_ns
        self._began_ns = now_ns()
        self._series: dict[tuple[tuple[str, str], ...], _Series] = {}

    def record(self, value: float, attributes: Mapping[str, str]) -> None:
        """Count a value. The order of attributes is part of what tells series apart."""
        key = tuple(attributes.items())
        series = self._series.get(key)
        if series is None:
            key = key if len(self._series) < SERIES_MAX else _OTHER
            series = self._series.setdefault(key, _Series([0] * (len(self._measure.bounds) + 1)))
        series.counts[bisect_left(self._measure.bounds, value)] += 1
        series.total += value
        if value < series.least:
            series.least = value
        if value > series.most:
            series.most = value

    def counted(self) -> list[tuple[dict[str, str], list[int]]]:
        """Attributes and counts by bucket of each series, as they stand."""
        return [(dict(key), list(series.counts)) for key, series in list(self._series.items())]

    def metric(self) -> Metric:
        """As it stands, in the SDK's words."""
        now_ns = self._now_ns()
        points = []
        for key, series in list(self._series.items()):
            counts = list(series.counts)
            points.append(
                HistogramDataPoint(
                    dict(key), self._began_ns, now_ns, sum(counts), series.total, counts, self._measure.bounds,
                    series.least, series.most,
                )
            )  # fmt: skip
        data = HistogramData(points, AggregationTemporality.CUMULATIVE)
        return Metric(self._measure.name, "", self._measure.unit, data)


class Exporting(MetricExporter):
    """An exporter that sends our histograms beside what the SDK collected."""

    def __init__(self, inner: MetricExporter, histograms: Collection[Histogram]) -> None:
        super().__init__(inner._preferred_temporality, inner._preferred_aggregation)
        self._inner = inner
        self._histograms = histograms

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **more: Any) -> MetricExportResult:
        """Send both."""
        ours = [metric for each in self._histograms if (metric := each.metric()).data.data_points]
        if ours and metrics_data.resource_metrics:
            first, *rest = metrics_data.resource_metrics
            # A scope of their own: the encoder keeps one of two that are equal.
            added = ScopeMetrics(InstrumentationScope("loanmesh.histogram"), ours, "")
            metrics_data = MetricsData([replace(first, scope_metrics=[*first.scope_metrics, added]), *rest])
        return self._inner.export(metrics_data, timeout_millis, **more)

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        """As the inner one."""
        return self._inner.force_flush(timeout_millis)

    def shutdown(self, timeout_millis: float = 30_000, **more: Any) -> None:
        """As the inner one."""
        self._inner.shutdown(timeout_millis, **more)
