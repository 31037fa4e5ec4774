"""Writes the Grafana dashboards: `python -m lab.dashboards [FOLDER]`. Their JSON is long; what they show is not.

A dashboard is a list of rows of panels, side by side. A panel is a title, a unit, and expressions with their legends.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path("deploy/observability/grafana")
WIDTH = 24
HEIGHT = 8
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Panel:
    """One panel. `shows` are pairs of expression and legend; `bad_from` paints what is above it red."""

    title: str
    unit: str
    shows: Sequence[tuple[str, str]]
    about: str = ""
    stat: bool = False
    stack: bool = False
    bad_from: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Dashboard:
    """One dashboard; `uid` is also the name of its file."""

    uid: str
    title: str
    rows: Sequence[Sequence[Panel]]


_JOB = '{job=~"$job"}'


def _quantile(share: float, bucket: str, by: str, where: str = "") -> str:
    return f"histogram_quantile({share}, sum by ({by}, le) (rate({bucket}{where}[$__rate_interval])))"


def _rate(counter: str, by: str) -> str:
    return f"sum by ({by}) (rate({counter}[$__rate_interval]))"


DASHBOARDS = (
    Dashboard(
        "overview",
        "loanmesh: overview",
        [
            [
                Panel(
                    "Decided within 15 s, interactive, last hour",
                    "percentunit",
                    [("1 - loanmesh:decided_late:ratio_rate1h", "")],
                    "What is promised: 99 %.",
                    stat=True,
                ),
                Panel(
                    "Backlog",
                    "short",
                    [("max(loanmesh_backlog)", "")],
                    "Accepted, could be worked on, not decided.",
                    stat=True,
                ),
                Panel("First in line waits", "s", [("max(loanmesh_backlog_age_seconds)", "")], stat=True, bad_from=60),
                Panel(
                    "Without an owner",
                    "short",
                    [("max(loanmesh_applications_unowned)", "")],
                    "Due, and their owner's lease has ended: another replica takes them within a poll.",
                    stat=True,
                    bad_from=1,
                ),
            ],
            [
                Panel(
                    "Offered, accepted, decided",
                    "reqps",
                    [
                        ("sum(loanmesh:offered:rate5m)", "offered"),
                        ("sum(loanmesh:accepted:rate5m)", "accepted"),
                        ("sum(loanmesh:decided:rate5m)", "decided"),
                    ],
                    "Applications a second. What is offered again after a refusal is offered twice.",
                ),
                Panel(
                    "Time to a decision",
                    "s",
                    [
                        ("loanmesh:decision_seconds:p50_5m", "p50 {{loanmesh_priority}}"),
                        ("loanmesh:decision_seconds:p99_5m", "p99 {{loanmesh_priority}}"),
                    ],
                    bad_from=15,
                ),
            ],
            [
                Panel(
                    "Time to a receipt, p99",
                    "s",
                    [("loanmesh:acknowledgement_seconds:p99_5m", "{{loanmesh_priority}}")],
                    "From the arrival of a call to its applications being on disk.",
                    bad_from=1,
                ),
                Panel(
                    "Estimates within a quarter of the truth",
                    "percentunit",
                    [("loanmesh:estimates_right:ratio_rate30m", "")],
                    "Of decisions that were estimated to take longer than a second.",
                    most=1,
                ),
                Panel(
                    "Outcomes",
                    "reqps",
                    [
                        (
                            "sum by (loanmesh_outcome) (rate(loanmesh_decisions_total[$__rate_interval]))",
                            "{{loanmesh_outcome}}",
                        )
                    ],
                    stack=True,
                ),
            ],
        ],
    ),
    Dashboard(
        "hops",
        "loanmesh: rate, errors, duration of each hop",
        [
            [
                Panel(
                    "Calls a second, as the caller counts",
                    "reqps",
                    [
                        (
                            _rate(f"rpc_client_call_duration_seconds_count{_JOB}", "job, rpc_method"),
                            "{{job}} {{rpc_method}}",
                        ),
                    ],
                ),
                Panel(
                    "Failed, as the caller sees it",
                    "percentunit",
                    [(f"loanmesh:hop_errors:ratio_rate5m{_JOB}", "{{job}} {{rpc_method}}")],
                    bad_from=0.05,
                    most=1,
                ),
                Panel(
                    "Duration, p50 and p99, as the caller sees it",
                    "s",
                    [
                        (
                            _quantile(0.5, "rpc_client_call_duration_seconds_bucket", "job, rpc_method", _JOB),
                            "p50 {{rpc_method}}",
                        ),
                        (
                            _quantile(0.99, "rpc_client_call_duration_seconds_bucket", "job, rpc_method", _JOB),
                            "p99 {{rpc_method}}",
                        ),
                    ],
                ),
            ],
            [
                Panel(
                    "Calls a second, as the server counts",
                    "reqps",
                    [
                        (
                            _rate(f"rpc_server_call_duration_seconds_count{_JOB}", "job, rpc_method"),
                            "{{job}} {{rpc_method}}",
                        ),
                    ],
                ),
                Panel(
                    "By status, but OK",
                    "reqps",
                    [
                        (
                            "sum by (job, rpc_status_code) (rate(rpc_server_call_duration_seconds_count"
                            '{job=~"$job", rpc_status_code!="OK"}[$__rate_interval]))',
                            "{{job}} {{rpc_status_code}}",
                        ),
                    ],
                    stack=True,
                ),
                Panel(
                    "Duration, p99, as the server sees it",
                    "s",
                    [
                        (
                            _quantile(0.99, "rpc_server_call_duration_seconds_bucket", "job, rpc_method", _JOB),
                            "{{rpc_method}}",
                        ),
                    ],
                    "Submits that wait for their decision count until then; receipts stand in the overview.",
                ),
            ],
            [
                Panel(
                    "Event loop late, p99",
                    "s",
                    [(_quantile(0.99, "loanmesh_loop_lag_seconds_bucket", "job, instance", _JOB), "{{instance}}")],
                    bad_from=0.25,
                ),
            ],
        ],
    ),
    Dashboard(
        "backlog",
        "loanmesh: backlog and its age",
        [
            [
                Panel("Backlog", "short", [("max(loanmesh_backlog)", "could be worked on")]),
                Panel(
                    "Age",
                    "s",
                    [
                        ("max(loanmesh_backlog_age_seconds)", "first in line, since its turn could come"),
                        ("max(loanmesh_pending_age_seconds)", "oldest that waits for us alone, since its receipt"),
                    ],
                    bad_from=60,
                ),
            ],
            [
                Panel(
                    "In and out",
                    "reqps",
                    [
                        ("sum(rate(loanmesh_applications_accepted_total[$__rate_interval]))", "accepted"),
                        ("sum(rate(loanmesh_decisions_total[$__rate_interval]))", "decided"),
                    ],
                    "The backlog grows by the difference.",
                ),
                Panel(
                    "Held in memory, by replica",
                    "short",
                    [('loanmesh_queue_length{loanmesh_queue="work"}', "{{instance}}")],
                ),
            ],
            [
                Panel(
                    "Without an owner",
                    "short",
                    [("max(loanmesh_applications_unowned)", "due, lease ended")],
                    bad_from=1,
                ),
                Panel(
                    "Set aside",
                    "short",
                    [("max(loanmesh_parked)", "parked")],
                    "Broke a stage at each attempt; a person looks at them: loanmesh parked.",
                    bad_from=1,
                ),
                Panel(
                    "Degradation steps in force",
                    "short",
                    [
                        (
                            "sum by (loanmesh_step, loanmesh_subject) (loanmesh_degradation_in_force)",
                            "{{loanmesh_step}} {{loanmesh_subject}}",
                        ),
                    ],
                    "Replicas in which each is.",
                ),
            ],
        ],
    ),
    Dashboard(
        "dependencies",
        "loanmesh: breakers and bulkheads",
        [
            [
                Panel(
                    "Replicas whose breaker is not closed",
                    "short",
                    [
                        (
                            "sum by (job, loanmesh_dependency, loanmesh_breaker_state) (loanmesh_breaker_state"
                            '{loanmesh_breaker_state!="closed"}) > 0',
                            "{{job}} {{loanmesh_dependency}} {{loanmesh_breaker_state}}",
                        ),
                    ],
                ),
                Panel(
                    "Openings",
                    "short",
                    [
                        (
                            "sum by (job, loanmesh_dependency) (increase(loanmesh_breaker_changes_total"
                            '{loanmesh_breaker_state="open"}[$__rate_interval]))',
                            "{{job}} {{loanmesh_dependency}}",
                        ),
                    ],
                ),
            ],
            [
                Panel(
                    "Calls by how they ended",
                    "reqps",
                    [
                        (
                            "sum by (loanmesh_dependency, loanmesh_outcome) (rate(loanmesh_dependency_calls_total"
                            "[$__rate_interval]))",
                            "{{loanmesh_dependency}} {{loanmesh_outcome}}",
                        ),
                    ],
                    "Refused: not made, because the breaker was open or the bulkhead full.",
                ),
                Panel(
                    "Bulkheads: under way and waiting",
                    "short",
                    [
                        (
                            "sum by (loanmesh_dependency) (loanmesh_bulkhead_in_use)",
                            "{{loanmesh_dependency}} under way",
                        ),
                        ("sum by (loanmesh_dependency) (loanmesh_bulkhead_waiting)", "{{loanmesh_dependency}} waiting"),
                    ],
                ),
            ],
        ],
    ),
    Dashboard(
        "sources",
        "loanmesh: sources, their freshness and what they cost",
        [
            [
                Panel(
                    "Age of the newest evidence used",
                    "s",
                    [("loanmesh:evidence_age:seconds", "{{loanmesh_source}}")],
                    "By the source's own word for when it was true. Flat is well; rising means nothing new comes.",
                    bad_from=86400,
                ),
                Panel(
                    "Profiles without fresh evidence",
                    "percentunit",
                    [("loanmesh:reports_without_fresh_evidence:ratio_rate5m", "{{loanmesh_source}}")],
                    bad_from=0.1,
                    most=1,
                ),
            ],
            [
                Panel(
                    "Reports by state",
                    "reqps",
                    [
                        (
                            "sum by (loanmesh_source, loanmesh_report_state) (rate(loanmesh_source_reports_total"
                            "[$__rate_interval]))",
                            "{{loanmesh_source}} {{loanmesh_report_state}}",
                        ),
                    ],
                    stack=True,
                ),
                Panel(
                    "Spent on queries, yuan an hour",
                    "currencyCNY",
                    [
                        (
                            "sum by (loanmesh_source) (rate(loanmesh_source_spend_total[$__rate_interval])) * 36",
                            "{{loanmesh_source}}",
                        ),
                    ],
                    "Answered queries at the prices in BUREAU_QUERY_FEN; what is not priced there costs nothing here.",
                    stack=True,
                ),
                Panel(
                    "Spent today, yuan",
                    "currencyCNY",
                    [("sum(increase(loanmesh_source_spend_total[1d])) / 100", "")],
                    stat=True,
                ),
            ],
        ],
    ),
    Dashboard(
        "credit",
        "loanmesh: approval rate by segment",
        [
            [
                Panel(
                    "Offers over decisions, by product, last hour",
                    "percentunit",
                    [("loanmesh:approvals:ratio_rate1h", "{{loanmesh_product}}")],
                    most=1,
                ),
                Panel(
                    "The same a day before",
                    "percentunit",
                    [("loanmesh:approvals:ratio_rate1h offset 1d", "{{loanmesh_product}}")],
                    most=1,
                ),
            ],
            [
                Panel(
                    "Offers over decisions, by product and grade, last hour",
                    "percentunit",
                    [
                        (
                            "sum by (loanmesh_product, loanmesh_grade) (loanmesh:decisions:rate1h"
                            '{loanmesh_outcome=~"approved|counter_offer"}) / '
                            "sum by (loanmesh_product, loanmesh_grade) (loanmesh:decisions:rate1h)",
                            "{{loanmesh_product}} {{loanmesh_grade}}",
                        ),
                    ],
                    most=1,
                ),
                Panel(
                    "Decisions by grade",
                    "reqps",
                    [
                        (
                            "sum by (loanmesh_grade) (rate(loanmesh_decisions_total[$__rate_interval]))",
                            "{{loanmesh_grade}}",
                        ),
                    ],
                    "A shift between grades with the same applicants is the model's doing.",
                    stack=True,
                ),
                Panel(
                    "Decisions shaped by a degradation step",
                    "reqps",
                    [
                        (
                            "sum by (loanmesh_step) (rate(loanmesh_degradations_total[$__rate_interval]))",
                            "{{loanmesh_step}}",
                        ),
                    ],
                ),
            ],
        ],
    ),
)


def rendered(dashboard: Dashboard) -> str:
    """The dashboard as Grafana imports it."""
    job = {
        "name": "job", "label": "service", "type": "query", "datasource": SOURCE, "refresh": 2, "includeAll": True,
        "multi": True, "allValue": "loanmesh/.*", "current": {"text": "All", "value": "$__all"},
        "query": {"query": "label_values(rpc_server_call_duration_seconds_count, job)", "refId": "job"},
    }  # fmt: skip
    variables: list[dict[str, Any]] = [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    ]
    panels = list(_panels(dashboard))
    if "$job" in json.dumps(panels):
        variables.append(job)
    model = {
        "uid": f"loanmesh-{dashboard.uid}",
        "title": dashboard.title,
        "tags": ["loanmesh"],
        "schemaVersion": 39,
        "editable": True,
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "links": [{"type": "dashboards", "tags": ["loanmesh"], "title": "loanmesh", "asDropdown": True}],
        "templating": {"list": variables},
        "panels": panels,
    }
    return json.dumps(model, indent=2, ensure_ascii=False) + "\n"


def _panels(dashboard: Dashboard) -> Iterator[dict[str, Any]]:
    number, top = 0, 0
    for row in dashboard.rows:
        height = HEIGHT // 2 if all(panel.stat for panel in row) else HEIGHT
        for place, panel in enumerate(row):
            left, right = WIDTH * place // len(row), WIDTH * (place + 1) // len(row)
            number += 1
            yield _panel(panel, number, {"x": left, "y": top, "w": right - left, "h": height})
        top += height


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.bad_from is not None:
        steps.append({"color": "red", "value": panel.bad_from})
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.most is not None:
        defaults["max"] = panel.most
    if not panel.stat:
        defaults["custom"] = {
            "drawStyle": "line",
            "fillOpacity": 20 if panel.stack else 0,
            "stacking": {"mode": "normal" if panel.stack else "none", "group": "A"},
            "thresholdsStyle": {"mode": "line" if panel.bad_from is not None else "off"},
        }
    return {
        "id": number,
        "type": "stat" if panel.stat else "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {} if panel.stat else {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": SOURCE,
                "expr": expression,
                "legendFormat": legend or "__auto",
            }
            for index, (expression, legend) in enumerate(panel.shows)
        ],
    }


def main(folder: Path = FOLDER) -> None:
    """Write them all."""
    for dashboard in DASHBOARDS:
        (folder / f"{dashboard.uid}.json").write_text(rendered(dashboard), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
