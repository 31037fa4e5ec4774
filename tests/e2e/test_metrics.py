"""What rules, dashboards and the reference say of metrics is what a running mesh emits, to the name and label."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from opentelemetry import metrics
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from lab.dashboards import DASHBOARDS, WIDTH, rendered
from loanmesh.cli.mesh import Mesh, free_ports
from loanmesh.client import Client
from loanmesh.runtime import measures, telemetry
from loanmesh.runtime.clock import SystemClock
from loanmesh.runtime.histogram import Exporting, Histogram
from loanmesh.runtime.vitals import Vitals
from tests.builders import an_application
from tests.e2e.conftest import set_fault
from tests.otlp import collecting
from tests.prometheus import Emitted, emitted, grouped_by, reads, recorded, series
from tests.unit.test_histogram import Kept

OBSERVABILITY = Path("deploy/observability")
REFERENCE = Path("docs/operating.md")
CLOCK = SystemClock()
SERVICES = ("intake", "bureau", "scoring", "pricing")
RARE = {"loanmesh.estimate.quotient", "loanmesh.applications.parked"}
"""What a short healthy run has no occasion for: recorded here by the code that the services record it with."""
SECURED = {
    "loanmesh.certificate.expiry": Emitted("loanmesh.certificate.expiry", "gauge", "s", frozenset({"role"})),
    "loanmesh.certificate.life_left": Emitted(
        "loanmesh.certificate.life_left", "gauge", "{share}", frozenset({"role"})
    ),
}
"""Emitted by a mesh with certificates only; `tests/e2e/test_secure_mesh.py` shows that they are."""


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Emitted]:
    """Every metric there is: those of a mesh that decides while a source is down, and the rare ones."""
    with pytest.MonkeyPatch.context() as patch:
        found = asyncio.run(_of_a_run(tmp_path_factory.mktemp("mesh"), patch))
    assert not RARE & set(found), "these are not so rare any more: take them off the list"
    found |= {name: metric for name, metric in _of_the_code().items() if name in RARE}
    return found | SECURED


async def _of_a_run(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Emitted]:
    async with collecting() as collected:
        for service in SERVICES:
            patch.setenv(f"{service.upper()}_TELEMETRY__OTLP_ENDPOINT", collected.endpoint)
        patch.setenv("BUREAU_QUERY_FEN", '{"central_bank": 200}')
        mesh = Mesh(folder / "state", None, free_ports(), CLOCK, print)
        try:
            await mesh.start()
            # Policy may approve without it, and then says so: a degradation. Who would be declined waits for it.
            await set_fault(mesh, "bank_flow", dead=True)
            async with Client(mesh.parts["intake"].address, patience_s=60) as client:
                wanted = [an_application(kind, n, CLOCK.now()) for kind in ("firm", "person") for n in range(8)]
                jobs = [asyncio.create_task(client.submit(one, wait_s=60)) for one in wanted]
                await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
                await set_fault(mesh, "bank_flow", dead=False)
                decided = await asyncio.gather(*jobs)
            assert any(application.decision.degradations for application in decided)
        finally:
            await mesh.stop()  # Services send what they hold when they end.
        assert set(collected.metrics) == set(SERVICES)
        return collected.all()


def _of_the_code() -> dict[str, Emitted]:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "get_meter", provider.get_meter)
        vitals = Vitals()
        vitals.parked["score"] += 1
        telemetry.observe(vitals)
        data = reader.get_metrics_data()
    provider.shutdown()
    assert data
    estimates, exporter = Histogram(measures.ESTIMATE, lambda: 1), Kept()
    estimates.record(1.0, {})
    Exporting(exporter, [estimates]).export(data)
    scopes = encode_metrics(exporter.sent[0]).resource_metrics[0].scope_metrics
    return {metric.name: emitted(metric) for scope in scopes for metric in scope.metrics}


def rules() -> list[dict[str, Any]]:
    """All groups of rules."""
    files = [OBSERVABILITY / "prometheus" / name for name in ("recording.yaml", "alerts.yaml")]
    return [group for file in files for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]]


def expressions() -> Iterator[tuple[str, str]]:
    """Where each expression stands, and the expression."""
    for group in rules():
        for rule in group["rules"]:
            yield rule.get("alert") or rule["record"], rule["expr"]
    for file in sorted((OBSERVABILITY / "grafana").glob("*.json")):
        dashboard = json.loads(file.read_text(encoding="utf-8"))
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                yield f"{file.name}: {panel['title']}", target["expr"].replace("$__rate_interval", "5m")
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                yield f"{file.name}: variable", variable["query"]["query"].replace(", job)", ")")


def test_every_metric_and_label_that_is_read_is_emitted(known: Mapping[str, Emitted]) -> None:
    there = {name: labels for metric in known.values() for name, labels in series(metric).items()}
    there |= recorded(rules())
    wrong = []
    for where, expression in expressions():
        found = list(reads(expression))
        assert found, f"{where} reads nothing"
        for read in found:
            if read.metric not in there:
                wrong.append(f"{where}: nobody emits {read.metric}")
            elif strange := read.labels - there[read.metric]:
                wrong.append(f"{where}: {read.metric} has no label {', '.join(sorted(strange))}")
        all_labels = frozenset[str]().union(*(there.get(read.metric, frozenset()) for read in found))
        if strange := grouped_by(expression) - all_labels:
            wrong.append(f"{where}: groups by {', '.join(sorted(strange))}, which none of its metrics has")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("expression", ["sum(rate(a[5m])", 'a{b="c"', "summ(a)", "sum(a))"])
def test_what_cannot_be_an_expression_is_noticed(expression: str) -> None:
    with pytest.raises(ValueError, match=r"brackets|no function"):
        list(reads(expression))


def test_a_planted_metric_and_label_would_be_noticed() -> None:
    assert [(r.metric, r.labels) for r in reads('sum by (x) (rate(a_total{b="c{", d!~"e"}[5m])) / on (x) f')] == [
        ("a_total", frozenset({"b", "d"})), ("f", frozenset()),
    ]  # fmt: skip
    assert grouped_by("sum by (x, y) (a) / on (z) b") == {"x", "y", "z"}


def test_every_alert_says_how_bad_it_is_and_where_to_read_on() -> None:
    for group in rules():
        for rule in group["rules"]:
            if "alert" in rule:
                assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]
                assert rule["annotations"]["summary"], rule["alert"]
                page = Path(rule["annotations"]["runbook_url"])
                assert page.is_file(), f"{rule['alert']}: there is no {page}"
                assert rule["alert"] in page.read_text(encoding="utf-8"), f"{page} does not speak of {rule['alert']}"


def test_labels_in_the_words_of_an_alert_are_left_by_its_expression() -> None:
    names = recorded(rules())
    for group in rules():
        for rule in group["rules"]:
            words = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule.get("annotations", {}))))
            left = grouped_by(rule["expr"]).union(*(names.get(read.metric, set()) for read in reads(rule["expr"])))
            assert words <= left, rule.get("alert")


def test_every_alert_has_a_rule_test() -> None:
    tested = (OBSERVABILITY / "prometheus" / "rules.test.yaml").read_text(encoding="utf-8")
    alerts = {rule["alert"] for group in rules() for rule in group["rules"] if "alert" in rule}
    fired = {
        case["alertname"]
        for test in yaml.safe_load(tested)["tests"]
        for case in test.get("alert_rule_test", ())
        if case["exp_alerts"]
    }
    assert alerts == fired


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def test_dashboards_are_as_written_and_fit_on_their_page(dashboard: Any) -> None:
    file = OBSERVABILITY / "grafana" / f"{dashboard.uid}.json"
    assert file.read_text(encoding="utf-8") == rendered(dashboard), "python -m lab.dashboards writes it again"
    model = json.loads(file.read_text(encoding="utf-8"))
    ids = [panel["id"] for panel in model["panels"]]
    assert len(ids) == len(set(ids))
    assert model["templating"]["list"][0]["type"] == "datasource"
    taken: set[tuple[int, int]] = set()
    for panel in model["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["type"] in ("timeseries", "stat")
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= WIDTH
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert cells
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
        letters = [target["refId"] for target in panel["targets"]]
        assert len(letters) == len(set(letters))
    files = yaml.safe_load((file.parent / "kustomization.yaml").read_text())["configMapGenerator"][0]["files"]
    assert file.name in files


def test_the_reference_lists_what_is_emitted_and_nothing_else(known: Mapping[str, Emitted]) -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (\w+) \| (\S*) \| ([^|]*) \|", REFERENCE.read_text(encoding="utf-8"), re.M)
    listed = {name: Emitted(name, kind, unit, frozenset(re.findall(r"[\w.]+", by))) for name, kind, unit, by in rows}
    assert listed == dict(known)
