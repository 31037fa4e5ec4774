"""What is deployed is checked before it is: every overlay passes, and each mistake that was planted is named."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lending.intake.v1.intake_service_pb2 import SubmitApplicationRequest

from lab.kube import agreement, check, rules
from lab.kube.overlay import OVERLAYS, CannotBuild, Object, Overlay, Problem, build, selects
from loanmesh.runtime.authorisation import Authorisation, table_of
from loanmesh.runtime.caller import Caller
from loanmesh.runtime.errors import NotAllowed

ROOT = OVERLAYS.parents[2]
Change = Callable[["Draft"], object]


class Draft:
    """A copy of an overlay, to plant something in."""

    def __init__(self, overlay: Overlay) -> None:
        self.objects: list[Any] = copy.deepcopy([found.data for found in overlay.objects])

    def get(self, kind: str, name: str) -> Any:
        return next(one for one in self.objects if one["kind"] == kind and one["metadata"]["name"] == name)

    def drop(self, kind: str, name: str) -> None:
        self.objects.remove(self.get(kind, name))

    def pod(self, name: str, kind: str = "Deployment") -> Any:
        return self.get(kind, name)["spec"]["template"]["spec"]

    def container(self, name: str, kind: str = "Deployment") -> Any:
        return self.pod(name, kind)["containers"][0]

    def env(self, name: str, variable: str, kind: str = "Deployment") -> Any:
        """The entry of a variable, made where it is missing."""
        entries = self.container(name, kind)["env"]
        found = next((entry for entry in entries if entry["name"] == variable), None)
        if found is None:
            found = {"name": variable, "value": ""}
            entries.append(found)
        return found

    def table(self) -> Any:
        """The ConfigMap with the table of clients, whose name ends with its hash."""
        return next(one for one in self.objects if one["metadata"]["name"].startswith("intake-access-"))["data"]

    def problems(self) -> list[Problem]:
        return list(check.problems(Overlay([Object(data) for data in self.objects])))


@pytest.fixture(scope="session")
def overlays() -> dict[str, Overlay]:
    return {name: build(OVERLAYS / name) for name in check.overlays()}


def test_every_overlay_builds_and_passes(overlays: dict[str, Overlay]) -> None:
    assert set(overlays) >= {"local", "production", "promotion"}
    found = {name: [str(problem) for problem in check.problems(overlay)] for name, overlay in overlays.items()}
    assert not any(found.values()), found


LOCAL: list[tuple[str, str, Change]] = [
    # --- Schema
    ("Deployment intake: spec.template.spec: schema", "misspelt field", lambda d: d.pod("intake").update(nodeSelectors={})),
    ("Deployment bureau: spec.minReadySeconds: schema", "text for a number", lambda d: d.get("Deployment", "bureau")["spec"].update(minReadySeconds="ten")),
    ("Service pricing: apiVersion: v7 Service is not known", "no such version", lambda d: d.get("Service", "pricing").update(apiVersion="v7")),
    # --- Pod Security
    ("Namespace loanmesh: metadata.labels.pod-security.kubernetes.io/enforce: must be restricted", "namespace enforces less", lambda d: d.get("Namespace", "loanmesh")["metadata"]["labels"].update({"pod-security.kubernetes.io/enforce": "baseline"})),
    ("Deployment intake: spec.template.spec.containers[0].securityContext.privileged", "privileged", lambda d: d.container("intake")["securityContext"].update(privileged=True)),
    ("Deployment scoring: spec.template.spec.containers[0].securityContext.allowPrivilegeEscalation: must be false", "may gain privileges", lambda d: d.container("scoring")["securityContext"].pop("allowPrivilegeEscalation")),
    ("Deployment pricing: spec.template.spec.containers[0].securityContext.capabilities.drop: must have ALL", "keeps capabilities", lambda d: d.container("pricing")["securityContext"].update(capabilities={"drop": ["NET_RAW"]})),
    ("Deployment pricing: spec.template.spec.containers[0].securityContext.capabilities.add", "adds a capability", lambda d: d.container("pricing")["securityContext"]["capabilities"].update(add=["SYS_PTRACE"])),
    ("Deployment bureau: spec.template.spec.containers[0].securityContext.runAsNonRoot: must be true", "may be root", lambda d: d.pod("bureau")["securityContext"].pop("runAsNonRoot")),
    ("Deployment bureau: spec.template.spec.containers[0].securityContext.runAsUser: must be a number above 0", "is root", lambda d: d.pod("bureau")["securityContext"].update(runAsUser=0)),
    ("Job intake-migrate: spec.template.spec.containers[0].securityContext.seccompProfile.type", "no seccomp", lambda d: d.pod("intake-migrate", "Job")["securityContext"].pop("seccompProfile")),
    ("Deployment intake: spec.template.spec.containers[0].securityContext.readOnlyRootFilesystem: must be true", "writes to its image", lambda d: d.container("intake")["securityContext"].update(readOnlyRootFilesystem=False)),
    ("Deployment scoring: spec.template.spec.volumes[2].hostPath", "mounts the node", lambda d: d.pod("scoring")["volumes"].append({"name": "node", "hostPath": {"path": "/"}})),
    ("Deployment scoring: spec.template.spec.hostNetwork", "uses the node's network", lambda d: d.pod("scoring").update(hostNetwork=True)),
    ("StatefulSet postgres: spec.template.spec.automountServiceAccountToken: must be false", "carries a token", lambda d: d.pod("postgres", "StatefulSet").pop("automountServiceAccountToken")),
    # --- Completeness
    ("overlay: NetworkPolicy: one must select all pods and deny both ways", "no default deny", lambda d: d.drop("NetworkPolicy", "default-deny")),
    ("Deployment bureau: PodDisruptionBudget: exactly one must select its pods, not 0", "no disruption budget", lambda d: d.drop("PodDisruptionBudget", "bureau")),
    ("PodDisruptionBudget bureau: spec.maxUnavailable: must be 1", "a budget that blocks every drain", lambda d: d.get("PodDisruptionBudget", "bureau")["spec"].update(maxUnavailable=0)),
    ("Deployment pricing: autoscaler: exactly one", "no autoscaler", lambda d: d.drop("HorizontalPodAutoscaler", "pricing")),
    ("Deployment pricing: autoscaler: exactly one", "two autoscalers that undo each other's work", lambda d: d.objects.append({"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": {"name": "pricing"}, "spec": {"scaleTargetRef": {"name": "pricing"}, "minReplicaCount": 2, "maxReplicaCount": 8, "triggers": [{"type": "cpu", "metricType": "Utilization", "metadata": {"value": "60"}}]}})),
    ("HorizontalPodAutoscaler bureau: spec.metrics[0].containerResource.target.averageUtilization: is 60 % of 100m, 0.06 cores; must be 0.4 to 0.8", "grows at a trickle", lambda d: d.get("HorizontalPodAutoscaler", "bureau")["spec"]["metrics"][0]["containerResource"]["target"].update(averageUtilization=60)),
    ("HorizontalPodAutoscaler intake: spec.minReplicas: is 1; at least 2", "one replica", lambda d: d.get("HorizontalPodAutoscaler", "intake")["spec"].update(minReplicas=1)),
    ("HorizontalPodAutoscaler intake: spec.maxReplicas: is 1, below the least", "bounds crossed", lambda d: d.get("HorizontalPodAutoscaler", "intake")["spec"].update(maxReplicas=1)),
    ("HorizontalPodAutoscaler intake: spec.behavior.scaleDown: must be set", "default behaviour", lambda d: d.get("HorizontalPodAutoscaler", "intake")["spec"]["behavior"].pop("scaleDown")),
    ("HorizontalPodAutoscaler intake: spec.metrics[0].containerResource.container: main is none of intake", "measures another container", lambda d: d.get("HorizontalPodAutoscaler", "intake")["spec"]["metrics"][0]["containerResource"].update(container="main")),
    ("Deployment intake: spec.replicas: is 40; its autoscaler allows 2 to 8", "replicas against the autoscaler", lambda d: d.get("Deployment", "intake")["spec"].update(replicas=40)),
    ("Service scoring: spec.clusterIP: must be None", "not headless", lambda d: d.get("Service", "scoring")["spec"].pop("clusterIP")),
    ("Deployment scoring: Service: none selects its pods", "no Service", lambda d: d.drop("Service", "scoring")),
    ("Deployment scoring: spec.template.spec.priorityClassName: 'loanmesh-scores' is no PriorityClass", "unknown priority", lambda d: d.pod("scoring").update(priorityClassName="loanmesh-scores")),
    ("Deployment bureau: spec.template.spec.serviceAccountName: default is no ServiceAccount", "default account", lambda d: d.pod("bureau").pop("serviceAccountName")),
    ("ServiceAccount bureau: automountServiceAccountToken: must be false", "account with token", lambda d: d.get("ServiceAccount", "bureau").pop("automountServiceAccountToken")),
    ("Deployment intake: spec.template.spec.containers[0].startupProbe.grpc: must be set", "no startup probe", lambda d: d.container("intake").pop("startupProbe")),
    ("Deployment intake: spec.template.spec.containers[0].readinessProbe.timeoutSeconds: is 1; at least 3 s", "busy is taken for away", lambda d: d.container("intake")["readinessProbe"].pop("timeoutSeconds")),
    ("Deployment intake: spec.template.spec.containers[0].livenessProbe.grpc.service: must be liveness", "liveness asks whether it is ready", lambda d: d.container("intake")["livenessProbe"]["grpc"].update(service="readiness")),
    ("Deployment intake: spec.template.spec.containers[0].readinessProbe.grpc.port: must be the health port, 8086", "probe on the port with TLS", lambda d: d.container("intake")["readinessProbe"]["grpc"].update(port=7401)),
    ("Deployment pricing: spec.template.spec.topologySpreadConstraints: none spreads over topology.kubernetes.io/zone", "all in one zone", lambda d: d.pod("pricing")["topologySpreadConstraints"].pop(0)),
    ("Deployment pricing: spec.template.spec.topologySpreadConstraints.labelSelector: does not select its own pods", "spreads others", lambda d: d.pod("pricing")["topologySpreadConstraints"][0]["labelSelector"].update(matchLabels={"app": "price"})),
    ("Deployment intake: spec.strategy.rollingUpdate.maxUnavailable: must be 0", "a release that takes away first", lambda d: d.get("Deployment", "intake")["spec"]["strategy"]["rollingUpdate"].update(maxUnavailable=1)),
    ("Deployment intake: spec.template.spec.enableServiceLinks: must be false", "service links", lambda d: d.pod("intake").pop("enableServiceLinks")),
    ("Deployment intake: spec.template.metadata.labels.app.kubernetes.io/component: is missing", "label missing", lambda d: d.get("Deployment", "intake")["spec"]["template"]["metadata"]["labels"].pop("app.kubernetes.io/component")),
    ("Deployment bureau: spec.template.spec.containers[0].resources.limits.memory: is missing", "no limit", lambda d: d.container("bureau")["resources"]["limits"].pop("memory")),
    ("Deployment bureau: spec.template.spec.containers[0].image: localhost/loanmesh:latest names no version", "image latest", lambda d: d.container("bureau").update(image="localhost/loanmesh:latest")),
    ("Job intake-migrate: spec.activeDeadlineSeconds: is 600; at least 1800 s", "cuts large tables off", lambda d: d.get("Job", "intake-migrate")["spec"].update(activeDeadlineSeconds=600)),
    ("overlay: Job bureau-migrate: bureau keeps tables", "no migration", lambda d: d.drop("Job", "bureau-migrate")),
    # --- Drain
    ("Deployment intake-worker: spec.template.spec.terminationGracePeriodSeconds: is 30; must be at least preStop 5 + leave 5 + batches 7 + commit 20 + drain 10 + close 5 = 52 s", "ends before its batches", lambda d: d.pod("intake-worker").update(terminationGracePeriodSeconds=30)),
    ("Deployment bureau: spec.template.spec.containers[0].lifecycle.preStop.sleep.seconds: must be set", "no preStop", lambda d: d.container("bureau").pop("lifecycle")),
    ("Deployment bureau: spec.template.spec.env BUREAU_SERVER__DRAIN_S: is 2 s; must be above the longest call, 3 s", "drain below the deadline", lambda d: d.env("bureau", "BUREAU_SERVER__DRAIN_S").update(value="2")),
    ("Deployment bureau: spec.template.spec.env BUREAU_SERVER__LEAVE_S: preStop 1 + leave 0 is below 5 s", "leaves at once", lambda d: (d.env("bureau", "BUREAU_SERVER__LEAVE_S").update(value="0"), d.container("bureau")["lifecycle"]["preStop"]["sleep"].update(seconds=1))),
    # --- Agreement with the code
    ("Deployment intake: spec.template.spec.env INTAKE_WORK__DECIDE: is no setting of intake", "misspelt setting", lambda d: d.env("intake", "INTAKE_WORK__DECIDES").update(name="INTAKE_WORK__DECIDE")),
    ("Deployment intake: spec.template.spec.env INTAKE_SERVER__LEAVE_S: is 'soon'; allowed:", "value that is none", lambda d: d.env("intake", "INTAKE_SERVER__LEAVE_S").update(value="soon")),
    ("Deployment bureau: spec.template.spec.env BUREAU_DATABASE_URL: is a secret and must come from a Secret", "secret in the open", lambda d: (d.env("bureau", "BUREAU_DATABASE_URL").pop("valueFrom"), d.env("bureau", "BUREAU_DATABASE_URL").update(value="postgresql://u:p@postgres/bureau"))),
    ("Deployment bureau: spec.template.spec.env BUREAU_TLS__KEY_FILE: is /etc/bureau.key, which is in no volume", "file of no volume", lambda d: d.env("bureau", "BUREAU_TLS__KEY_FILE").update(value="/etc/bureau.key")),
    ("Deployment bureau: spec.template.spec.containers[0].volumeMounts: tls is no volume of the pod", "mount of no volume", lambda d: d.pod("bureau").update(volumes=[v for v in d.pod("bureau")["volumes"] if v["name"] != "tls"])),
    ("Deployment intake: spec.template.spec.containers[0].args: must hold no address with a password", "password as an argument", lambda d: d.container("intake").update(command=["loanmesh", "--db=postgresql://u:p@db/x"])),
    ("Deployment scoring: spec.template.spec.containers[0].ports grpc: is 7403, but SCORING_SERVER__LISTEN is '0.0.0.0:7413'", "listens elsewhere", lambda d: d.env("scoring", "SCORING_SERVER__LISTEN").update(value="0.0.0.0:7413")),
    ("Deployment scoring: spec.template.spec.env SCORING_SERVER__LISTEN: is '127.0.0.1:7403': nobody outside", "listens on loopback", lambda d: d.env("scoring", "SCORING_SERVER__LISTEN").update(value="127.0.0.1:7403")),
    ("Deployment pricing: spec.template.spec.containers[0].image: localhost/loanmesh:old is not localhost/loanmesh:dev", "two releases at once", lambda d: d.container("pricing").update(image="localhost/loanmesh:old")),
    ("Deployment intake: spec.template.spec.volumes tls: Secret intake-cert is neither made here", "Secret of nobody", lambda d: next(v for v in d.pod("intake")["volumes"] if v["name"] == "tls")["secret"].update(secretName="intake-cert")),
    # --- Network
    ("Service bureau: spec.ports.targetPort: http is no port of Deployment bureau", "port that is not there", lambda d: d.get("Service", "bureau")["spec"]["ports"][0].update(targetPort="http")),
    ("Service bureau: spec.ports.port: is 80, but behind a headless Service pods themselves answer, on 7402", "port that headless cannot change", lambda d: d.get("Service", "bureau")["spec"]["ports"][0].update(port=80)),
    ("Service bureau: spec.selector: selects no pods", "label misspelt", lambda d: d.get("Service", "bureau")["spec"].update(selector={"app.kubernetes.io/name": "buro"})),
    ("Deployment intake: env INTAKE_BUREAU: dns:///buro:7402 is no Service and port of the overlay", "name that leads nowhere", lambda d: d.env("intake", "INTAKE_BUREAU").update(value="dns:///buro:7402")),
    ("Deployment intake: env INTAKE_BUREAU: dns:///bureau:7403 is no Service and port of the overlay", "port that leads nowhere", lambda d: d.env("intake", "INTAKE_BUREAU").update(value="dns:///bureau:7403")),
    ("Deployment bureau: NetworkPolicy ingress: no policy lets in Deployment intake-worker, port 7402", "workers shut out", lambda d: d.get("NetworkPolicy", "bureau")["spec"]["ingress"][0]["from"].pop()),
    ("Deployment intake: NetworkPolicy egress: no policy lets it out to Deployment pricing, port 7404", "shut in", lambda d: d.get("NetworkPolicy", "intake")["spec"]["egress"].pop()),
    ("Deployment bureau: NetworkPolicy egress: no policy lets it out to StatefulSet postgres, port 5432", "no way to its database", lambda d: d.drop("NetworkPolicy", "to-postgres")),
    ("overlay: NetworkPolicy: none lets all pods ask 169.254.20.10/32 for names, UDP port 53", "no names from the node's cache", lambda d: d.get("NetworkPolicy", "names")["spec"]["egress"][0]["to"].pop()),
    ("overlay: NetworkPolicy: none lets all pods ask kube-dns for names, TCP port 53", "no names over TCP", lambda d: d.get("NetworkPolicy", "names")["spec"]["egress"][0]["ports"].pop()),
    ("NetworkPolicy pricing: spec.podSelector: selects no pods", "policy for nobody", lambda d: d.get("NetworkPolicy", "pricing")["spec"].update(podSelector={"matchLabels": {"app": "pricing"}})),
    # --- Trust
    ("Deployment intake: spec.template.spec.env INTAKE_ACCESS__TABLE_FILE: must name a table", "trials that do not say so", lambda d: d.get("Namespace", "loanmesh")["metadata"]["annotations"].pop("loanmesh.dev/for-trials")),
    # --- Connections
    ("StatefulSet postgres: spec.template.spec.containers[0].args max_connections: is 100; at most replicas:", "too few connections", lambda d: d.container("postgres", "StatefulSet").update(args=["-c", "max_connections=100"])),
    ("StatefulSet postgres: spec.template.spec.containers[0].args max_connections: is 300; at most replicas:", "too many replicas", lambda d: d.get("HorizontalPodAutoscaler", "intake-worker")["spec"].update(maxReplicas=60)),
]  # fmt: skip

PRODUCTION: list[tuple[str, str, Change]] = [
    ("ScaledObject bureau: spec.minReplicaCount: schema of keda.sh/v1alpha1", "text for a number", lambda d: d.get("ScaledObject", "bureau")["spec"].update(minReplicaCount="2")),
    ("ScaledObject bureau: spec.triggers[0].metadata.service: must be bureau", "scales by another's load", lambda d: d.get("ScaledObject", "bureau")["spec"]["triggers"][0]["metadata"].update(service="pricing")),
    ("ScaledObject bureau: spec.fallback.behavior: must be currentReplicasIfHigher", "scales down when nobody answers", lambda d: d.get("ScaledObject", "bureau")["spec"]["fallback"].pop("behavior")),
    ("ScaledObject bureau: spec.triggers[1].metadata.value: is 95 % of 1, 0.95 cores; must be 0.4 to 0.8", "grows too late", lambda d: d.get("ScaledObject", "bureau")["spec"]["triggers"][1]["metadata"].update(value="95")),
    ("DaemonSet otel-agent: spec.template.spec.priorityClassName: '' is no PriorityClass", "blind when it grows", lambda d: d.pod("otel-agent", "DaemonSet").pop("priorityClassName")),
    ("ScaledObject bureau: spec.triggers[0].metadata.scalerAddress: intake-worker.loanmesh.svc:7499 is no Service", "asks nobody", lambda d: d.get("ScaledObject", "bureau")["spec"]["triggers"][0]["metadata"].update(scalerAddress="intake-worker.loanmesh.svc:7499")),
    ("Certificate bureau: spec.uris.0: schema of cert-manager.io/v1", "identity that is none", lambda d: d.get("Certificate", "bureau")["spec"].update(uris=["bureau"])),
    ("Deployment bureau: spec.template.spec.volumes tls: Secret bureau-tls is neither made here", "no certificate", lambda d: d.drop("Certificate", "bureau")),
    ("Cluster intake-db: spec.postgresql.parameters.max_connections: is 150; at most replicas:", "too few connections", lambda d: d.get("Cluster", "intake-db")["spec"]["postgresql"]["parameters"].update(max_connections="150")),
    ("PrometheusRule loanmesh: spec.groups.0.rules.0: schema of monitoring.coreos.com/v1", "rule that is none", lambda d: d.get("PrometheusRule", "loanmesh")["spec"]["groups"][0]["rules"][0].pop("expr")),
    ("PodMonitor otel-agent: spec: schema of monitoring.coreos.com/v1", "misspelt monitor", lambda d: d.get("PodMonitor", "otel-agent")["spec"].update(podMetricEndpoints=[])),
    ("Deployment pricing: env PRICING_TELEMETRY__OTLP_ENDPOINT: http://otel-agents:4317 is no Service", "tells nobody", lambda d: d.env("pricing", "PRICING_TELEMETRY__OTLP_ENDPOINT").update(value="http://otel-agents:4317")),
    ("DaemonSet otel-agent: spec.template.spec.automountServiceAccountToken: must be false", "token for nothing", lambda d: d.drop("RoleBinding", "otel-agent")),
    ("Deployment intake-worker: NetworkPolicy ingress: no policy lets in KEDA from another namespace, port 7401", "nobody may ask how many", lambda d: d.drop("NetworkPolicy", "from-keda")),
    ("DaemonSet otel-agent: NetworkPolicy ingress: no policy lets in Prometheus from another namespace, port 8889", "nobody may scrape", lambda d: d.drop("NetworkPolicy", "from-prometheus")),
    ("PodMonitor otel-agent: spec.podMetricsEndpoints.port: metric is no port of DaemonSet otel-agent", "scrapes nothing", lambda d: d.get("PodMonitor", "otel-agent")["spec"]["podMetricsEndpoints"][0].update(port="metric")),
    ("Deployment bureau: NetworkPolicy egress: no policy lets it out to sources.example, port 8443", "sources out of reach", lambda d: d.env("bureau", "BUREAU_SOURCES_URL").update(value="https://sources.example:8443")),
    ("Deployment otel-gateway: NetworkPolicy egress: no policy lets it out to namespace tracing, port 4317", "traces for nobody", lambda d: d.env("otel-gateway", "TRACES_ENDPOINT").update(value="jaeger.tracing.svc:4317")),
    ("Deployment otel-gateway: NetworkPolicy ingress: no policy lets in DaemonSet otel-agent, port 4317", "gateways shut", lambda d: d.get("NetworkPolicy", "otel-gateway")["spec"].update(ingress=[])),
    ("Issuer self: spec: schema of cert-manager.io/v1", "issuer that is none", lambda d: d.get("Issuer", "self").update(spec={})),
    ("Cluster intake-db: NetworkPolicy ingress: no policy lets in Deployment intake, port 5432", "database shut", lambda d: d.get("NetworkPolicy", "intake-db")["spec"]["ingress"].pop(0)),
    # --- Trust
    ("Deployment intake: spec.template.spec.env INTAKE_ACCESS__TABLE_FILE: must name a table of clients", "lets no client in", lambda d: d.container("intake")["env"].remove(d.env("intake", "INTAKE_ACCESS__TABLE_FILE"))),
    ("Deployment intake-worker: spec.template.spec.env INTAKE_ACCESS__TABLE_FILE: must name a table of clients", "one half lets no client in", lambda d: d.container("intake-worker")["env"].remove(d.env("intake-worker", "INTAKE_ACCESS__TABLE_FILE"))),
    ("Deployment intake: spec.template.spec.env INTAKE_ACCESS__TABLE_FILE: is /etc/loanmesh/access/clients.yaml, which is in no ConfigMap", "table that is not there", lambda d: d.env("intake", "INTAKE_ACCESS__TABLE_FILE").update(value="/etc/loanmesh/access/clients.yaml")),
    ("Deployment intake: spec.template.spec.env INTAKE_ACCESS__TABLE_FILE: /etc/loanmesh/access/access.yaml: client/local lets in client/local", "the client of trials", lambda d: d.table().update({"access.yaml": "lenders: {client/local: [lenders/demo]}"})),
    ("Deployment intake: spec.template.spec.env INTAKE_ACCESS__TABLE_FILE: /etc/loanmesh/access/access.yaml: client/local lets in client/local", "the shipped clients", lambda d: d.table().update({"access.yaml": "{}"})),
    ("Deployment intake: spec.template.spec.env INTAKE_ACCESS__TABLE_FILE: /etc/loanmesh/access/access.yaml: client/* lets in client/local", "every client", lambda d: d.table().update({"access.yaml": "lenders: {client/*: [lenders/a]}"})),
    ("Deployment intake: spec.template.spec.env INTAKE_ACCESS__TABLE_FILE: /etc/loanmesh/access/access.yaml lets no client act", "operators only", lambda d: d.table().update({"access.yaml": "lenders: {operator/*: [lenders/*]}"})),
    ("Deployment intake: spec.template.spec.env INTAKE_ACCESS__TABLE_FILE: /etc/loanmesh/access/access.yaml: lenders.client/a: a: must be lenders/NAME", "table that is none", lambda d: d.table().update({"access.yaml": "lenders: {client/a: [a]}"})),
    ("Deployment bureau: spec.template.spec.env PGSSLMODE: is 'require'; must be verify-full", "believes any database", lambda d: d.env("bureau", "PGSSLMODE").update(value="require")),
    ("Job intake-migrate: spec.template.spec.env PGSSLMODE: is ''; must be verify-full", "migrates any database", lambda d: d.env("intake-migrate", "PGSSLMODE", "Job").update(value="")),
    ("Deployment intake: spec.template.spec.env PGSSLROOTCERT: is '/var/run/loanmesh/database/ca.crt'; must be in a Secret that brings this file alone", "the CA's key in the pod", lambda d: next(v for v in d.pod("intake")["volumes"] if v["name"] == "database-ca")["secret"].pop("items")),
    ("Deployment intake: spec.template.spec.env PGSSLROOTCERT: is /etc/ssl/ca.crt, which", "CA of no volume", lambda d: d.env("intake", "PGSSLROOTCERT").update(value="/etc/ssl/ca.crt")),
]  # fmt: skip


def planted() -> Iterator[Any]:
    for overlay, cases in (("local", LOCAL), ("production", PRODUCTION)):
        for message, what, change in cases:
            yield pytest.param(overlay, message, change, id=f"{overlay}: {what}")


@pytest.mark.parametrize(("overlay", "message", "change"), planted())
def test_a_planted_mistake_is_named(overlays: dict[str, Overlay], overlay: str, message: str, change: Change) -> None:
    draft = Draft(overlays[overlay])
    change(draft)
    said = [str(problem) for problem in draft.problems()]
    assert any(line.startswith(message) for line in said), said


@pytest.mark.parametrize("overlay", ["production", "promotion"])
def test_in_production_a_client_acts_for_its_lenders_and_the_client_of_trials_for_none(
    overlays: dict[str, Overlay], overlay: str
) -> None:
    door = Authorisation(table_of(Draft(overlays[overlay]).table()["access.yaml"], "access.yaml"), "loanmesh")
    method = "lending.intake.v1.IntakeService/SubmitApplication"
    asked = SubmitApplicationRequest(parent="lenders/example")
    client = Caller("client/example", "certificate")
    door.check_method(client, method)
    door.check_lender(client, method, asked)
    door.check_lender(Caller("operator/ann", "certificate"), "lending.intake.v1.IntakeService/GetApplication", asked)
    for lender in ("lenders/example", "lenders/demo"):
        with pytest.raises(NotAllowed, match="may not act for"):
            door.check_lender(Caller("client/local", "certificate"), method, SubmitApplicationRequest(parent=lender))


def test_where_sources_want_a_token_one_component_brings_it(tmp_path: Path) -> None:
    production, component = OVERLAYS / "production", OVERLAYS.parent / "components" / "sources-token"
    (tmp_path / "kustomization.yaml").write_text(
        f"resources: [{os.path.relpath(production, tmp_path)}]\ncomponents: [{os.path.relpath(component, tmp_path)}]\n"
    )
    draft = Draft(build(tmp_path))
    at = "Deployment bureau: spec.template.spec.volumes sources"
    named = f"Secret bureau-sources is neither made here nor named in the Namespace's {agreement.BY_HAND}"
    assert [str(problem) for problem in draft.problems()] == [f"{at}: {named}"]
    draft.get("Namespace", "loanmesh")["metadata"]["annotations"][agreement.BY_HAND] += ", bureau-sources"
    assert not draft.problems()


def test_the_image_runs_as_whom_the_manifests_say(overlays: dict[str, Overlay]) -> None:
    user = re.search(r"^USER (\d+):(\d+)$", (ROOT / "deploy" / "Containerfile").read_text(), re.M)
    assert user
    for workload in overlays["production"].services():
        context = workload.pod["securityContext"]
        assert (str(context["runAsUser"]), str(context["runAsGroup"])) == user.groups()


def test_the_image_holds_what_was_tested_and_no_more() -> None:
    tested, runs = _pinned("dev.txt"), _pinned("runtime.txt")
    assert runs <= tested, "make lock pins both again"
    names = {name for name, _ in runs}
    assert names.isdisjoint({"pytest", "mypy", "ruff", "hypothesis", "polars", "matplotlib", "simpy", "trustme"})


def _pinned(file: str) -> set[tuple[str, str]]:
    text = (ROOT / "requirements" / file).read_text()
    return set(re.findall(r"^([a-z0-9][a-z0-9._-]*)(?:\[[a-z,]+\])?==([^ ;\\]+)", text, re.M))


def test_the_rules_of_prometheus_operator_are_those_that_are_tested() -> None:
    assert rules.OUT.read_text(encoding="utf-8") == rules.text(), "run: python -m lab.kube.rules"


def test_a_folder_that_cannot_be_built_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [missing.yaml]\n")
    with pytest.raises(CannotBuild, match=r"missing\.yaml"):
        build(tmp_path)
    assert check.main(["--overlay", str(tmp_path)]) == 1
    assert "missing.yaml" in capsys.readouterr().err


def test_the_command_prints_one_line_a_problem(
    overlays: dict[str, Overlay], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text("{apiVersion: v1, kind: Namespace, metadata: {name: x}}\n")
    (tmp_path / "kustomization.yaml").write_text("resources: [bad.yaml]\n")
    assert check.main(["--overlay", str(tmp_path), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["problems"][0] == {
        "object": "Namespace x",
        "field": "metadata.labels.pod-security.kubernetes.io/enforce",
        "rule": "must be restricted",
    }


@pytest.mark.parametrize(
    ("operator", "values", "takes"),
    [("In", ["a"], True), ("NotIn", ["a"], False), ("Exists", None, True), ("DoesNotExist", None, False)],
)
def test_selectors_select_as_the_api_does(operator: str, values: list[str] | None, takes: bool) -> None:
    rule = {"key": "app", "operator": operator, "values": values}
    assert selects({"matchExpressions": [rule]}, {"app": "a"}) is takes
    assert selects({}, {"app": "a"})
    assert not selects(None, {"app": "a"})
