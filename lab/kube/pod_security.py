"""Pod Security *restricted*, and what we ask beyond it: nothing to write to, no token, no secret in the open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lab.kube.overlay import Overlay, Problem, Workload

ENFORCE = "pod-security.kubernetes.io/enforce"
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
SECCOMP = ("RuntimeDefault", "Localhost")


def check(overlay: Overlay) -> Iterator[Problem]:
    """Namespaces enforce it, and every pod keeps it."""
    for namespace in overlay.of("Namespace"):
        if namespace.labels.get(ENFORCE) != "restricted":
            yield namespace.wrong(f"metadata.labels.{ENFORCE}", "must be restricted")
    for workload in overlay.workloads:
        yield from _pod(workload)
        yield from _token(overlay, workload)
        for index, container in enumerate(workload.containers):
            yield from _container(workload, container, f"containers[{index}]")


def _pod(workload: Workload) -> Iterator[Problem]:
    pod = workload.pod
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(field):
            yield workload.wrong(field, "must not be set (restricted)")
    for index, volume in enumerate(pod.get("volumes") or ()):
        if foreign := set(volume) - {"name"} - VOLUMES:
            yield workload.wrong(f"volumes[{index}].{min(foreign)}", "is no kind of volume that restricted allows")
    if (pod.get("securityContext") or {}).get("sysctls"):
        yield workload.wrong("securityContext.sysctls", "must not be set (restricted)")


def _token(overlay: Overlay, workload: Workload) -> Iterator[Problem]:
    """A token is for those alone who are granted something by it."""
    subjects = [subject for binding in overlay.of("RoleBinding") for subject in binding.data.get("subjects") or ()]
    granted = any(subject["name"] == workload.pod.get("serviceAccountName") for subject in subjects)
    if not granted and workload.pod.get("automountServiceAccountToken") is not False:
        yield workload.wrong("automountServiceAccountToken", "must be false: nothing is granted to its account")


def _container(workload: Workload, container: Mapping[str, Any], at: str) -> Iterator[Problem]:
    of_pod = workload.pod.get("securityContext") or {}
    own = container.get("securityContext") or {}
    both = {**of_pod, **own}
    here = f"{at}.securityContext"
    if both.get("runAsNonRoot") is not True:
        yield workload.wrong(f"{here}.runAsNonRoot", "must be true (restricted)")
    if not both.get("runAsUser"):
        yield workload.wrong(f"{here}.runAsUser", "must be a number above 0: the image alone does not say who runs")
    if (both.get("seccompProfile") or {}).get("type") not in SECCOMP:
        yield workload.wrong(f"{here}.seccompProfile.type", f"must be {' or '.join(SECCOMP)} (restricted)")
    if own.get("allowPrivilegeEscalation") is not False:
        yield workload.wrong(f"{here}.allowPrivilegeEscalation", "must be false (restricted)")
    if own.get("privileged"):
        yield workload.wrong(f"{here}.privileged", "must not be set (restricted)")
    if (own.get("procMount") or "Default") != "Default":
        yield workload.wrong(f"{here}.procMount", "must be Default (restricted)")
    capabilities = own.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or ()):
        yield workload.wrong(f"{here}.capabilities.drop", "must have ALL (restricted)")
    if set(capabilities.get("add") or ()) - {"NET_BIND_SERVICE"}:
        yield workload.wrong(f"{here}.capabilities.add", "may have NET_BIND_SERVICE only (restricted)")
    if own.get("readOnlyRootFilesystem") is not True:
        yield workload.wrong(f"{here}.readOnlyRootFilesystem", "must be true; an emptyDir is for what must be written")
    if any(port.get("hostPort") for port in container.get("ports") or ()):
        yield workload.wrong(f"{at}.ports", "must have no hostPort (restricted)")
