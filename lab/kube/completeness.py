"""Every service has all that one needs in production: who reaches it, who spares it, who scales it, who changes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lab.kube.code import PROBED, WITH_TABLES
from lab.kube.overlay import Object, Overlay, Problem, Workload, cores, selects

NAME = "app.kubernetes.io/name"
LABELS = (NAME, "app.kubernetes.io/component", "app.kubernetes.io/part-of")
SPREAD_OVER = ("topology.kubernetes.io/zone", "kubernetes.io/hostname")
REPLICAS_MIN = 2
"""Of each service, so that one may always be away."""
PROBE_S_MIN = 3
"""How long a probe waits at least: a loop that is busy answers late, and is taken for one that is away."""
GROWS_AT_CORES = (0.4, 0.8)
"""Between how many busy cores of a replica an autoscaler adds another: one event loop fills one."""
MIGRATION_S_MIN = 1800
"""What a migration may take at least: it is one transaction, and what is cut off begins again from nothing."""
KEEPS = "currentReplicasIfHigher"
"""KEDA's word for a fallback that is a floor."""


def check(overlay: Overlay) -> Iterator[Problem]:
    """All services, the migrations, and what is for all of them."""
    denies = [found for found in overlay.of("NetworkPolicy") if _denies_all(found)]
    if not denies:
        yield Problem("overlay", "NetworkPolicy", "one must select all pods and deny both ways")
    services = list(overlay.services())
    for workload in services:
        for rule in (_service, _disruption, _scaled, _policies, _account, _probes, _spread, _release):
            yield from rule(overlay, workload)
    for workload in overlay.workloads:
        yield from _every(workload)
        yield from _priority(overlay, workload)
        if workload.object.kind == "Job":
            yield from _migration(workload)
    for service in sorted({workload.service for workload in services} & set(WITH_TABLES)):
        if not any(w.object.kind == "Job" and w.words == ["migrate", service] for w in overlay.workloads):
            yield Problem("overlay", f"Job {service}-migrate", f"{service} keeps tables, so a Job must migrate them")


def _denies_all(policy: Object) -> bool:
    spec = policy.spec
    both = set(spec.get("policyTypes") or ()) == {"Ingress", "Egress"}
    return spec.get("podSelector") == {} and both and not spec.get("ingress") and not spec.get("egress")


def _service(overlay: Overlay, workload: Workload) -> Iterator[Problem]:
    own = [found for found in overlay.of("Service") if _equal(found.spec.get("selector"), workload)]
    if not own:
        yield workload.object.wrong("Service", "none selects its pods")
    for found in own:
        if found.spec.get("clusterIP") != "None":
            yield found.wrong("spec.clusterIP", "must be None: gRPC balances over the pods' own addresses")


def _equal(selector: Mapping[str, str] | None, workload: Workload) -> bool:
    return bool(selector) and selects({"matchLabels": selector}, workload.labels)


def _disruption(overlay: Overlay, workload: Workload) -> Iterator[Problem]:
    own = [found for found in overlay.of("PodDisruptionBudget") if selects(found.spec.get("selector"), workload.labels)]
    if len(own) != 1:
        yield workload.object.wrong("PodDisruptionBudget", f"exactly one must select its pods, not {len(own)}")
    for found in own:
        if found.spec.get("maxUnavailable") != 1:
            yield found.wrong("spec.maxUnavailable", "must be 1: nodes can be drained, and replicas leave one by one")


def _priority(overlay: Overlay, workload: Workload) -> Iterator[Problem]:
    name = workload.pod.get("priorityClassName", "")
    if not name or overlay.find("PriorityClass", name) is None:
        rule = f"{name!r} is no PriorityClass of the overlay: others would push it off its node"
        yield workload.wrong("priorityClassName", rule)


def _migration(workload: Workload) -> Iterator[Problem]:
    within_s = workload.object.spec.get("activeDeadlineSeconds", MIGRATION_S_MIN)
    if within_s < MIGRATION_S_MIN:
        rule = f"is {within_s}; at least {MIGRATION_S_MIN} s: what is cut off begins again from nothing"
        yield workload.object.wrong("spec.activeDeadlineSeconds", rule)


def scaler_of(overlay: Overlay, name: str) -> Object | None:
    """The autoscaler of a Deployment, where there is exactly one."""
    found = [
        scaler
        for kind in ("HorizontalPodAutoscaler", "ScaledObject")
        for scaler in overlay.of(kind)
        if (scaler.spec.get("scaleTargetRef") or {}).get("name") == name
    ]
    return found[0] if len(found) == 1 else None


def bounds(scaler: Object) -> tuple[int, int]:
    """Fewest and most replicas."""
    word = "Replicas" if scaler.kind == "HorizontalPodAutoscaler" else "ReplicaCount"
    return int(scaler.spec.get(f"min{word}", 1)), int(scaler.spec.get(f"max{word}", 100))


def _scaled(overlay: Overlay, workload: Workload) -> Iterator[Problem]:
    scaler = scaler_of(overlay, workload.name)
    if scaler is None:
        yield workload.object.wrong("autoscaler", "exactly one HorizontalPodAutoscaler or ScaledObject must scale it")
        return
    least, most = bounds(scaler)
    word = "Replicas" if scaler.kind == "HorizontalPodAutoscaler" else "ReplicaCount"
    if least < REPLICAS_MIN:
        yield scaler.wrong(f"spec.min{word}", f"is {least}; at least {REPLICAS_MIN}, so that one may be away")
    if most < least:
        yield scaler.wrong(f"spec.max{word}", f"is {most}, below the least, {least}")
    replicas = workload.object.spec.get("replicas")
    if replicas is not None and not least <= replicas <= most:
        yield workload.object.wrong("spec.replicas", f"is {replicas}; its autoscaler allows {least} to {most}")
    yield from _behaviour(scaler)
    yield from _signals(scaler, workload)


def _behaviour(scaler: Object) -> Iterator[Problem]:
    at, behaviour = "spec.behavior", scaler.spec.get("behavior")
    if scaler.kind == "ScaledObject":
        at = "spec.advanced.horizontalPodAutoscalerConfig.behavior"
        behaviour = ((scaler.spec.get("advanced") or {}).get("horizontalPodAutoscalerConfig") or {}).get("behavior")
    for way in ("scaleUp", "scaleDown"):
        if not (behaviour or {}).get(way):
            yield scaler.wrong(f"{at}.{way}", "must be set: the defaults are too slow up and too quick down")


def _signals(scaler: Object, workload: Workload) -> Iterator[Problem]:
    containers = {str(container["name"]) for container in workload.containers}
    for index, metric in enumerate(scaler.spec.get("metrics") or ()):
        measured = metric.get("containerResource")
        if measured and measured["container"] not in containers:
            yield scaler.wrong(
                f"spec.metrics[{index}].containerResource.container",
                f"{measured['container']} is none of {workload.name}",
            )
        elif measured and measured["name"] == "cpu":
            at = f"spec.metrics[{index}].containerResource.target.averageUtilization"
            yield from _grows(scaler, workload, at, measured["target"].get("averageUtilization"))
    for index, trigger in enumerate(scaler.spec.get("triggers") or ()):
        said = trigger.get("metadata") or {}
        if "containerName" in said and said["containerName"] not in containers:
            yield scaler.wrong(
                f"spec.triggers[{index}].metadata.containerName", f"{said['containerName']} is none of {workload.name}"
            )
        if trigger.get("type") == "cpu" and trigger.get("metricType") == "Utilization":
            yield from _grows(scaler, workload, f"spec.triggers[{index}].metadata.value", said.get("value"))
        if trigger.get("type") == "external" and said.get("service") != workload.name:
            yield scaler.wrong(f"spec.triggers[{index}].metadata.service", f"must be {workload.name}, which it scales")
    if not scaler.spec.get("metrics") and not scaler.spec.get("triggers"):
        yield scaler.wrong("spec", "has no signal to scale by")
    if scaler.kind == "ScaledObject" and (scaler.spec.get("fallback") or {}).get("behavior") != KEEPS:
        yield scaler.wrong("spec.fallback.behavior", f"must be {KEEPS}: else a scaler that is away takes replicas away")


def _grows(scaler: Object, workload: Workload, at: str, percent: Any) -> Iterator[Problem]:
    """Utilisation is of what the container asks for; what counts is how busy one loop then is."""
    asked = ((workload.main.get("resources") or {}).get("requests") or {}).get("cpu")
    if asked is None or percent is None:
        return  # Which is named elsewhere.
    busy, (least, most) = cores(asked) * float(percent) / 100, GROWS_AT_CORES
    if not least <= busy <= most:
        rule = f"is {percent} % of {asked}, {busy:.2f} cores; must be {least} to {most}: one loop fills one core"
        yield scaler.wrong(at, rule)


def _policies(overlay: Overlay, workload: Workload) -> Iterator[Problem]:
    own = [
        found
        for found in overlay.of("NetworkPolicy")
        if found.spec.get("podSelector") and selects(found.spec["podSelector"], workload.labels)
    ]
    for way in ("Ingress", "Egress"):
        if not any(way in (found.spec.get("policyTypes") or ()) for found in own):
            yield workload.object.wrong("NetworkPolicy", f"none of its own is about {way}")


def _account(overlay: Overlay, workload: Workload) -> Iterator[Problem]:
    name = workload.pod.get("serviceAccountName", "default")
    account = overlay.find("ServiceAccount", name)
    if account is None:
        yield workload.wrong("serviceAccountName", f"{name} is no ServiceAccount of the overlay")
    elif account.data.get("automountServiceAccountToken") is not False:
        yield account.wrong("automountServiceAccountToken", "must be false")


def _probes(overlay: Overlay, workload: Workload) -> Iterator[Problem]:
    health = workload.ports.get("health")
    if health is None or health == workload.ports.get("grpc"):
        yield workload.wrong("containers[0].ports", "must have a port `health`, apart from `grpc`, which asks for TLS")
    for probe, told in (("startupProbe", "readiness"), ("readinessProbe", "readiness"), ("livenessProbe", "liveness")):
        grpc = (workload.main.get(probe) or {}).get("grpc")
        at = f"containers[0].{probe}"
        if grpc is None:
            yield workload.wrong(f"{at}.grpc", "must be set")
            continue
        if grpc.get("port") != health:
            yield workload.wrong(f"{at}.grpc.port", f"must be the health port, {health}")
        if grpc.get("service") != told or told not in PROBED:
            yield workload.wrong(f"{at}.grpc.service", f"must be {told}")
        waits_s = workload.main[probe].get("timeoutSeconds", 1)
        if probe != "startupProbe" and waits_s < PROBE_S_MIN:
            rule = f"is {waits_s}; at least {PROBE_S_MIN} s: a replica that is busy answers late"
            yield workload.wrong(f"{at}.timeoutSeconds", rule)


def _spread(overlay: Overlay, workload: Workload) -> Iterator[Problem]:
    rules = workload.pod.get("topologySpreadConstraints") or []
    for key in SPREAD_OVER:
        of_key = [rule for rule in rules if rule["topologyKey"] == key]
        if not of_key:
            yield workload.wrong("topologySpreadConstraints", f"none spreads over {key}")
        for rule in of_key:
            if not selects(rule.get("labelSelector"), workload.labels):
                yield workload.wrong("topologySpreadConstraints.labelSelector", "does not select its own pods")
            narrow = {
                **(rule["labelSelector"].get("matchLabels") or {}),
                **dict.fromkeys(rule.get("matchLabelKeys") or ()),
            }
            if NAME not in narrow:
                yield workload.wrong("topologySpreadConstraints", f"must tell services apart by {NAME}")


def _release(overlay: Overlay, workload: Workload) -> Iterator[Problem]:
    rolling = (workload.object.spec.get("strategy") or {}).get("rollingUpdate") or {}
    if rolling.get("maxUnavailable") != 0:
        yield workload.object.wrong(
            "spec.strategy.rollingUpdate.maxUnavailable",
            "must be 0: a release takes no replica away before its successor serves",
        )
    if workload.pod.get("enableServiceLinks") is not False:
        yield workload.wrong(
            "enableServiceLinks", "must be false: a Service's variables would look like settings, and stop the start"
        )


def _every(workload: Workload) -> Iterator[Problem]:
    for label in LABELS:
        if label not in workload.labels:
            yield workload.object.wrong(f"spec.template.metadata.labels.{label}", "is missing")
    for index, container in enumerate(workload.containers):
        resources = container.get("resources") or {}
        for kind in ("requests", "limits"):
            for what in ("cpu", "memory"):
                if what not in (resources.get(kind) or {}):
                    yield workload.wrong(f"containers[{index}].resources.{kind}.{what}", "is missing")
        image = str(container.get("image", ""))
        tag = image.rsplit("/", 1)[-1].partition(":")[2]
        if "@sha256:" not in image and tag in ("", "latest"):
            yield workload.wrong(f"containers[{index}].image", f"{image} names no version; nobody could go back to it")
