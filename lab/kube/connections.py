"""All replicas that there may ever be at once find a connection to their database."""

from __future__ import annotations

import base64
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from lab.kube.code import POOL_MAX
from lab.kube.completeness import bounds, scaler_of
from lab.kube.overlay import Object, Overlay, Problem, Workload, selects

BY_HAND = 5
"""Kept free for people and for monitoring, connections of a server."""


@dataclass(frozen=True)
class Server:
    """A PostgreSQL of the overlay."""

    object: Object
    field: str
    connections_max: int
    reserved: int


def check(overlay: Overlay) -> Iterator[Problem]:
    """Connections at the most replicas, during a release, against max_connections."""
    needed: dict[str, list[tuple[str, int]]] = defaultdict(list)
    servers: dict[str, Server] = {}
    for workload in overlay.workloads:
        variable = f"{workload.service.upper()}_DATABASE_URL"
        reference = ((workload.env.get(variable) or {}).get("valueFrom") or {}).get("secretKeyRef")
        if not reference:
            continue
        server = server_of(overlay, reference["name"], reference["key"])
        if server is None:
            yield workload.wrong(f"env {variable}", f"Secret {reference['name']} leads to no PostgreSQL of the overlay")
            continue
        servers[str(server.object)] = server
        needed[str(server.object)].append((workload.name, _at_most(overlay, workload)))
    for name, server in servers.items():
        total = sum(count for _, count in needed[name]) + BY_HAND + server.reserved
        if total > server.connections_max:
            parts = " + ".join(f"{who} {count}" for who, count in needed[name])
            sum_ = f"{parts} + by hand {BY_HAND} + reserved {server.reserved} = {total}"
            yield server.object.wrong(server.field, f"is {server.connections_max}; at most replicas: {sum_}")


def _at_most(overlay: Overlay, workload: Workload) -> int:
    if workload.object.kind == "Job":
        return 1
    scaler = scaler_of(overlay, workload.name)
    most = bounds(scaler)[1] if scaler else int(workload.object.spec.get("replicas", 1))
    spec = workload.object.spec
    surge = _surge((spec.get("strategy") or {}).get("rollingUpdate", {}).get("maxSurge", "25%"), most)
    # While a release rolls out, those that leave keep their connections to the end of their grace.
    apart_s = float(spec.get("minReadySeconds", 0)) or 1.0
    leaving = min(most, surge * math.ceil(float(workload.pod.get("terminationGracePeriodSeconds", 30)) / apart_s))
    return (most + surge + leaving) * POOL_MAX


def _surge(value: int | str, replicas: int) -> int:
    return math.ceil(replicas * float(value.rstrip("%")) / 100) if isinstance(value, str) else value


def server_of(overlay: Overlay, secret: str, key: str) -> Server | None:
    """Where a Secret's address leads: a CloudNativePG cluster, or a StatefulSet behind a Service; None for neither."""
    # CloudNativePG writes the owner's address into CLUSTER-app.
    cluster = overlay.find("Cluster", secret.removesuffix("-app")) if secret.endswith("-app") else None
    if cluster is not None:
        parameters = (cluster.spec.get("postgresql") or {}).get("parameters") or {}
        return Server(
            cluster,
            "spec.postgresql.parameters.max_connections",
            int(parameters.get("max_connections", 100)),
            int(parameters.get("superuser_reserved_connections", 3)),
        )
    found = overlay.find("Secret", secret)
    service = overlay.find("Service", _host(found, key)) if found else None
    for workload in overlay.workloads:
        if service and selects({"matchLabels": service.spec.get("selector")}, workload.labels):
            words = " ".join(workload.words)
            return Server(
                workload.object,
                "spec.template.spec.containers[0].args max_connections",
                _argument(words, "max_connections", 100),
                _argument(words, "superuser_reserved_connections", 3),
            )
    return None


def _argument(words: str, name: str, default: int) -> int:
    said = re.search(rf"\b{name}=(\d+)", words)
    return int(said[1]) if said else default


def _host(secret: Object, key: str) -> str:
    text = (secret.data.get("stringData") or {}).get(key, "")
    if not text:
        text = base64.b64decode((secret.data.get("data") or {}).get(key, "")).decode()
    return (urlsplit(text).hostname or "").split(".")[0]
