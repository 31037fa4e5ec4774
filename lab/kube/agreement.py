"""Names and values in the manifests are those of the code: settings, ports, images, Secrets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lab.kube.code import default_of, refused, settings_of
from lab.kube.overlay import Overlay, Problem, Workload

BY_HAND = "loanmesh.dev/secrets-by-hand"
"""Annotation of the Namespace: Secrets that somebody makes outside the overlay, with commas."""
OURS = ("POD_NAME", "NODE_NAME", "LOANMESH_", "OTEL_", "PGSSLMODE", "PGSSLROOTCERT")
"""Other variables that a service of ours knows, or the driver of its database."""


def check(overlay: Overlay) -> Iterator[Problem]:
    """Settings and ports of our services, and Secrets of everybody."""
    known = set(_secrets(overlay))
    images: dict[str, Workload] = {}
    for workload in overlay.workloads:
        if workload.service:
            images.setdefault(str(workload.main.get("image")), workload)
            yield from _settings(workload)
            yield from _files(workload)
        if workload.serves:
            yield from _ports(workload)
        for at, name in _uses(workload):
            if name not in known:
                yield workload.wrong(at, f"Secret {name} is neither made here nor named in the Namespace's {BY_HAND}")
    for image, workload in list(images.items())[1:]:
        yield workload.wrong("containers[0].image", f"{image} is not {next(iter(images))}: all services are one image")


def _settings(workload: Workload) -> Iterator[Problem]:
    if workload.service not in ("intake", "bureau", "scoring", "pricing"):
        yield workload.wrong("containers[0].args", f"{workload.service} is no service")
        return
    known = settings_of(workload.service)
    for name, entry in workload.env.items():
        if name.startswith(OURS):
            continue
        if name not in known:
            yield workload.wrong(f"env {name}", f"is no setting of {workload.service}; `loanmesh settings` prints them")
            continue
        hidden = known[name].secret
        if hidden and "value" in entry:
            yield workload.wrong(f"env {name}", "is a secret and must come from a Secret (secretKeyRef)")
        elif "value" in entry and (allowed := refused(workload.service, name, str(entry["value"]))):
            yield workload.wrong(f"env {name}", f"is {entry['value']!r}; allowed: {allowed}")
    for word in (*workload.words, *(str(word) for word in workload.main.get("command") or ())):
        if "://" in word and "@" in word:
            yield workload.wrong(
                "containers[0].args", "must hold no address with a password: arguments are seen by all"
            )


def _files(workload: Workload) -> Iterator[Problem]:
    """A setting that names a file names one that some volume brings."""
    mounts = [str(mount["mountPath"]).rstrip("/") + "/" for mount in workload.main.get("volumeMounts") or ()]
    for name, entry in workload.env.items():
        value = str(entry.get("value", ""))
        if name.endswith(("_FILE", "ROOTCERT")) and value and not any(value.startswith(mount) for mount in mounts):
            yield workload.wrong(f"env {name}", f"is {value}, which is in no volume of the container")
    known = {str(volume["name"]) for volume in workload.pod.get("volumes") or ()}
    for mount in workload.main.get("volumeMounts") or ():
        if mount["name"] not in known:
            yield workload.wrong("containers[0].volumeMounts", f"{mount['name']} is no volume of the pod")


def _ports(workload: Workload) -> Iterator[Problem]:
    for port, setting in (("grpc", "LISTEN"), ("health", "HEALTH_LISTEN")):
        name = f"{workload.service.upper()}_SERVER__{setting}"
        value = workload.value(name) or str(default_of(workload.service, name))
        host, _, number = value.rpartition(":")
        if workload.ports.get(port) != (int(number) if number.isdigit() else None):
            yield workload.wrong(
                f"containers[0].ports {port}", f"is {workload.ports.get(port)}, but {name} is {value!r}"
            )
        if host in ("127.0.0.1", "localhost", "[::1]"):
            yield workload.wrong(f"env {name}", f"is {value!r}: nobody outside the pod reaches loopback")


def _secrets(overlay: Overlay) -> Iterator[str]:
    """Names of the Secrets that will be there."""
    yield from (found.name for found in overlay.of("Secret"))
    yield from (str(found.spec.get("secretName")) for found in overlay.of("Certificate"))
    yield from (f"{found.name}-{what}" for found in overlay.of("Cluster") for what in ("app", "ca"))
    for namespace in overlay.of("Namespace"):
        yield from (name.strip() for name in namespace.annotations.get(BY_HAND, "").split(","))


def _uses(workload: Workload) -> Iterator[tuple[str, str]]:
    """Where Secrets are asked for, and which."""
    for index, container in enumerate(workload.containers):
        for entry in container.get("env") or ():
            reference: Any = (entry.get("valueFrom") or {}).get("secretKeyRef")
            if reference:
                yield f"containers[{index}].env {entry['name']}", reference["name"]
    for volume in workload.pod.get("volumes") or ():
        if "secret" in volume:
            yield f"volumes {volume['name']}", volume["secret"]["secretName"]
