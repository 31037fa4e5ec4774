"""A pod that ends gets the time that its end takes, so that no call and no claim is cut off."""

from __future__ import annotations

from collections.abc import Iterator

from lab.kube.code import BATCH_S_MAX, CALLS_S_MAX, COMMIT_S_MAX, default_of, refused
from lab.kube.overlay import Overlay, Problem, Workload

CLOSE_S = 5
"""For closing what is open, and for a clock that is late, seconds."""
ENDPOINTS_S_MIN = 5
"""How long lists of endpoints may go on naming a pod that ends, seconds (resilience notes: 5 to 10)."""


def check(overlay: Overlay) -> Iterator[Problem]:
    """preStop, leaving, the batches under way and their commit, the calls under way and the close: one by one."""
    for workload in overlay.services():
        pre_stop_s = float(
            (((workload.main.get("lifecycle") or {}).get("preStop") or {}).get("sleep") or {}).get("seconds", 0)
        )
        leave_s = _seconds(workload, "LEAVE_S")
        drain_s = _seconds(workload, "DRAIN_S")
        batch_s, commit_s = (BATCH_S_MAX, COMMIT_S_MAX) if _decides(workload) else (0.0, 0.0)
        grace_s = float(workload.pod.get("terminationGracePeriodSeconds", 30))
        if pre_stop_s <= 0:
            yield workload.wrong("containers[0].lifecycle.preStop.sleep.seconds", "must be set: endpoints lag behind")
        if pre_stop_s + leave_s < ENDPOINTS_S_MIN:
            yield workload.wrong(
                f"env {_name(workload, 'LEAVE_S')}",
                f"preStop {pre_stop_s:g} + leave {leave_s:g} is below {ENDPOINTS_S_MIN} s, by which endpoints may lag",
            )
        if drain_s <= CALLS_S_MAX:
            yield workload.wrong(
                f"env {_name(workload, 'DRAIN_S')}",
                f"is {drain_s:g} s; must be above the longest call, {CALLS_S_MAX:g} s",
            )
        needed_s = pre_stop_s + leave_s + batch_s + commit_s + drain_s + CLOSE_S
        if grace_s < needed_s:
            yield workload.wrong(
                "terminationGracePeriodSeconds",
                f"is {grace_s:g}; must be at least preStop {pre_stop_s:g} + leave {leave_s:g} + batches {batch_s:g} + "
                f"commit {commit_s:g} + drain {drain_s:g} + close {CLOSE_S} = {needed_s:g} s",
            )


def _name(workload: Workload, setting: str) -> str:
    return f"{workload.service.upper()}_SERVER__{setting}"


def _seconds(workload: Workload, setting: str) -> float:
    name = _name(workload, setting)
    value = workload.value(name)
    # A value that is none is the settings' business; here the default stands in.
    return float(default_of(workload.service, name) if not value or refused(workload.service, name, value) else value)


def _decides(workload: Workload) -> bool:
    says = workload.value("INTAKE_WORK__DECIDES").lower()
    return workload.service == "intake" and says not in ("false", "0", "no", "off")
