"""Who must reach whom does: names lead to Services, Services to pods, and the policies of both ends let it pass."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import yaml

from lab.kube.connections import server_of
from lab.kube.overlay import Object, Overlay, Problem, Workload, selects

_NAMED = re.compile(r"(?:dns:///|https?://)?([a-z0-9-]+)(?:\.([a-z0-9-]+)(?:\.svc(?:\.cluster\.local)?)?)?:(\d+)")
"""A Service, its namespace where it is said, and the port."""
CLUSTER_LABEL = "cnpg.io/cluster"
"""What CloudNativePG labels the pods of a cluster with."""

NAMESPACE_LABEL = "kubernetes.io/metadata.name"
"""What the API server labels each namespace with."""

CLUSTER_DNS = "kube-dns"
"""The label k8s-app of CoreDNS and of whatever else answers for the cluster."""
NODE_LOCAL_DNS = "169.254.20.10/32"
"""Where NodeLocal DNSCache answers: on the network of each node, so that no selector finds it."""


def check(overlay: Overlay) -> Iterator[Problem]:
    """Services, policies, names, and every address in a setting."""
    yield from _names(overlay)
    for service in overlay.of("Service"):
        yield from _service(overlay, service)
    for policy in overlay.of("NetworkPolicy"):
        yield from _policy(overlay, policy)
    for workload in overlay.workloads:
        yield from _addresses(overlay, workload)
        yield from _database(overlay, workload)
        yield from _gateways(overlay, workload)
    for monitor in overlay.of("PodMonitor"):
        yield from _scraped(overlay, monitor)
    for scaled in overlay.of("ScaledObject"):
        yield from _scaler(overlay, scaled)


def _names(overlay: Overlay) -> Iterator[Problem]:
    """Everybody may ask for names, whoever answers in this cluster."""
    open_ = [
        (_who(peer), port.get("protocol", "TCP"))
        for policy in overlay.of("NetworkPolicy")
        if policy.spec.get("podSelector") == {}
        for rule in policy.spec.get("egress") or ()
        for peer in rule.get("to") or ()
        for port in rule.get("ports") or ()
        if port.get("port") == 53
    ]
    for whom in (CLUSTER_DNS, NODE_LOCAL_DNS):
        for protocol in ("UDP", "TCP"):
            if (whom, protocol) not in open_:
                yield Problem(
                    "overlay", "NetworkPolicy", f"none lets all pods ask {whom} for names, {protocol} port 53"
                )


def _who(peer: Mapping[str, Any]) -> str:
    return str(
        peer["ipBlock"]["cidr"]
        if "ipBlock" in peer
        else ((peer.get("podSelector") or {}).get("matchLabels") or {}).get("k8s-app", "")
    )


def _service(overlay: Overlay, service: Object) -> Iterator[Problem]:
    behind = [w for w in overlay.workloads if selects({"matchLabels": service.spec.get("selector")}, w.labels)]
    if not behind:
        yield service.wrong("spec.selector", "selects no pods of the overlay")
    for workload in behind:
        for port in service.spec.get("ports") or ():
            target = port.get("targetPort", port["port"])
            answered = workload.ports.get(target, target)
            if answered not in workload.ports.values():
                yield service.wrong("spec.ports.targetPort", f"{target} is no port of {workload.object}")
            elif service.spec.get("clusterIP") == "None" and answered != port["port"]:
                rule = f"is {port['port']}, but behind a headless Service pods themselves answer, on {answered}"
                yield service.wrong("spec.ports.port", rule)


def _labels(overlay: Overlay) -> Iterator[Mapping[str, str]]:
    """Of all pods that there will be."""
    yield from (workload.labels for workload in overlay.workloads)
    yield from ({CLUSTER_LABEL: found.name} for found in overlay.of("Cluster"))


def _policy(overlay: Overlay, policy: Object) -> Iterator[Problem]:
    selector = policy.spec.get("podSelector")
    if not any(selects(selector, labels) for labels in _labels(overlay)):
        yield policy.wrong("spec.podSelector", "selects no pods of the overlay")
    for way, word in (("ingress", "from"), ("egress", "to")):
        for rule in policy.spec.get(way) or ():
            for peer in rule.get(word) or ():
                own = "podSelector" in peer and "namespaceSelector" not in peer
                if own and not any(selects(peer["podSelector"], labels) for labels in _labels(overlay)):
                    yield policy.wrong(f"spec.{way}.{word}.podSelector", "selects no pods of the overlay")


def _addresses(overlay: Overlay, workload: Workload) -> Iterator[Problem]:
    """Each setting that names HOST:PORT in the cluster leads somewhere."""
    for name, entry in workload.env.items():
        value = str(entry.get("value", ""))
        named = _NAMED.fullmatch(value)
        if named is None or named[1][0].isdigit() or "LISTEN" in name:
            yield from _outside(overlay, workload, value)
        elif named[2] and overlay.find("Namespace", named[2]) is None:
            # A host of two words outside looks like a Service and its namespace; who means that says `svc`.
            if "://" in value and ".svc" not in value:
                yield from _outside(overlay, workload, value)
            else:
                yield from _abroad(overlay, workload, named[2], int(named[3]))
        else:
            yield from _leads(overlay, workload.object, f"env {name}", value, named, workload.labels)


def _outside(overlay: Overlay, workload: Workload, value: str) -> Iterator[Problem]:
    """An address outside the cluster: some policy lets the service out to addresses, at its port."""
    parts = urlsplit(value)
    if parts.scheme in ("http", "https") and parts.hostname:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        if not _lets(overlay, "egress", "to", workload.labels, port, lambda one: "ipBlock" in one):
            yield workload.object.wrong(
                "NetworkPolicy egress", f"no policy lets it out to {parts.hostname}, port {port}"
            )


def _abroad(overlay: Overlay, workload: Workload, namespace: str, port: int) -> Iterator[Problem]:
    """A name in somebody else's namespace."""
    labels = {NAMESPACE_LABEL: namespace}
    if not _lets(
        overlay, "egress", "to", workload.labels, port, lambda one: selects(one.get("namespaceSelector"), labels)
    ):
        rule = f"no policy lets it out to namespace {namespace}, port {port}"
        yield workload.object.wrong("NetworkPolicy egress", rule)


def _gateways(overlay: Overlay, workload: Workload) -> Iterator[Problem]:
    """Where a collector's configuration sends traces on to."""
    for volume in workload.pod.get("volumes") or ():
        found = overlay.find("ConfigMap", str((volume.get("configMap") or {}).get("name")))
        text = (found.data.get("data") or {}).get("config.yaml", "") if found else ""
        exporters = (yaml.safe_load(text) or {}).get("exporters") or {}
        dns = ((exporters.get("loadbalancing") or {}).get("resolver") or {}).get("dns")
        if dns:
            value = f"{dns['hostname']}:{dns['port']}"
            if named := _NAMED.fullmatch(value):
                yield from _leads(overlay, workload.object, "exporters.loadbalancing", value, named, workload.labels)


def _scraped(overlay: Overlay, monitor: Object) -> Iterator[Problem]:
    """Prometheus comes from another namespace, to every port that a monitor names."""
    for workload in overlay.workloads:
        if selects(monitor.spec.get("selector"), workload.labels):
            for endpoint in monitor.spec.get("podMetricsEndpoints") or ():
                port = workload.ports.get(str(endpoint.get("port")))
                if port is None:
                    rule = f"{endpoint.get('port')} is no port of {workload.object}"
                    yield monitor.wrong("spec.podMetricsEndpoints.port", rule)
                else:
                    yield from _let_in_from_abroad(overlay, workload, "Prometheus", port)


def _let_in_from_abroad(overlay: Overlay, workload: Workload, who: str, port: int) -> Iterator[Problem]:
    if not _lets(overlay, "ingress", "from", workload.labels, port, lambda one: "namespaceSelector" in one):
        rule = f"no policy lets in {who} from another namespace, port {port}"
        yield workload.object.wrong("NetworkPolicy ingress", rule)


def _scaler(overlay: Overlay, scaled: Object) -> Iterator[Problem]:
    for index, trigger in enumerate(scaled.spec.get("triggers") or ()):
        address = str((trigger.get("metadata") or {}).get("scalerAddress", ""))
        at = f"spec.triggers[{index}].metadata.scalerAddress"
        if trigger.get("type") == "external":
            named = _NAMED.fullmatch(address)
            if named is None:
                yield scaled.wrong(at, f"{address!r} is no Service of the overlay")
            else:
                yield from _leads(overlay, scaled, at, address, named, None)
                service = overlay.find("Service", named[1])
                for workload in overlay.workloads if service else ():
                    if service and selects({"matchLabels": service.spec["selector"]}, workload.labels):
                        yield from _let_in_from_abroad(overlay, workload, "KEDA", int(named[3]))


def _leads(
    overlay: Overlay, who: Object, at: str, value: str, named: re.Match[str], labels: Mapping[str, str] | None
) -> Iterator[Problem]:
    """labels  of the pods that ask; None for somebody in another namespace."""
    service, port = overlay.find("Service", named[1]), int(named[3])
    if service is None or port not in [one["port"] for one in service.spec.get("ports") or ()]:
        yield who.wrong(at, f"{value} is no Service and port of the overlay")
        return
    for target in overlay.workloads:
        if labels is not None and selects({"matchLabels": service.spec["selector"]}, target.labels):
            yield from _passes(overlay, who, labels, target.object, target.labels, port)


def _database(overlay: Overlay, workload: Workload) -> Iterator[Problem]:
    entry = workload.env.get(f"{workload.service.upper()}_DATABASE_URL") or {}
    reference = (entry.get("valueFrom") or {}).get("secretKeyRef")
    server = server_of(overlay, reference["name"], reference["key"]) if reference else None
    if server:
        pods = (
            {CLUSTER_LABEL: server.object.name} if server.object.kind == "Cluster" else Workload(server.object).labels
        )
        yield from _passes(overlay, workload.object, workload.labels, server.object, pods, 5432)


def _passes(
    overlay: Overlay, who: Object, labels: Mapping[str, str], whom: Object, pods: Mapping[str, str], port: int
) -> Iterator[Problem]:
    if not _lets(overlay, "egress", "to", labels, port, _are(pods)):
        yield who.wrong("NetworkPolicy egress", f"no policy lets it out to {whom}, port {port}")
    if not _lets(overlay, "ingress", "from", pods, port, _are(labels)):
        yield whom.wrong("NetworkPolicy ingress", f"no policy lets in {who}, port {port}")


Peer = Callable[[Mapping[str, Any]], bool]
"""Whether a peer of a policy is the one in question."""


def _lets(overlay: Overlay, way: str, word: str, selected: Mapping[str, str], port: int, is_peer: Peer) -> bool:
    about = [p for p in overlay.of("NetworkPolicy") if selects(p.spec.get("podSelector"), selected) and _is(p, way)]
    return not about or any(
        _port(rule, port) and _peer(rule.get(word), is_peer) for policy in about for rule in policy.spec.get(way) or ()
    )


def _is(policy: Object, way: str) -> bool:
    return way.capitalize() in (policy.spec.get("policyTypes") or ("Ingress",))


def _port(rule: Mapping[str, Any], port: int) -> bool:
    return not rule.get("ports") or any(one.get("port") == port for one in rule["ports"])


def _peer(peers: Sequence[Mapping[str, Any]] | None, is_peer: Peer) -> bool:
    return not peers or any(is_peer(one) for one in peers)


def _are(labels: Mapping[str, str]) -> Peer:
    """Pods of our own namespace with these labels."""
    return lambda one: "namespaceSelector" not in one and selects(one.get("podSelector"), labels)
