"""The plan as a kustomize component: for HorizontalPodAutoscalers a floor, for KEDA a floor by the clock.

It patches what is there: without KEDA there are no ScaledObjects, and their patches touch nothing; with it there are no
HorizontalPodAutoscalers of ours. An overlay names the folder among its components.
"""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path

from loanmesh.promotion.capacity import SERVICES
from loanmesh.promotion.file import Promotion
from loanmesh.promotion.plan import Plan

FILE = "kustomization.yaml"


def component(promotion: Promotion, plan: Plan, source: str) -> str:
    """The component's kustomization.yaml.

    source  what to say it was made from.
    """
    window = cron_window(promotion, plan)
    lines = [
        f"# {promotion.name}: {promotion.start:%Y-%m-%d %H:%M} to {promotion.end:%Y-%m-%d %H:%M} {promotion.timezone},"
        f" {plan.arrivals_a_second:,.0f} applications a second at the height.",
        f"# Written by `loanmesh promotion plan {source} --out ...`: change that file and write this again.",
        "# Apply the overlay that names it the day before; the day after, apply overlays/production again.",
        "apiVersion: kustomize.config.k8s.io/v1alpha1",
        "kind: Component",
        "patches:",
    ]
    for name in SERVICES:
        one = plan.services[name]
        lines.append(
            f"  # {name}: {one.load_a_second:,.0f} a second / ({one.a_second:,.0f} a replica x"
            f" {promotion.utilisation:g}), at least the usual {promotion.replicas[name].usual}."
        )
        autoscaler = [_set("/spec/minReplicas", one.replicas), _set("/spec/maxReplicas", one.most)]
        cron = {"type": "cron", "metadata": {**window, "desiredReplicas": str(one.replicas)}}
        scaled = [_set("/spec/maxReplicaCount", one.most), _set("/spec/triggers/-", cron)]
        for kind, patch in (("HorizontalPodAutoscaler", autoscaler), ("ScaledObject", scaled)):
            lines.append(f"  - target: {{kind: {kind}, name: {name}}}")
            lines.append("    patch: |-")
            # JSON is YAML, and quotes what a cron line and a zone need quoted.
            lines += [f"      - {json.dumps(step)}" for step in patch]
    return "\n".join(lines) + "\n"


def cron_window(promotion: Promotion, plan: Plan) -> dict[str, str]:
    """KEDA's cron: from the lead before the start until the last that came may be decided, in the local time."""
    begins = promotion.start - dt.timedelta(seconds=plan.lead_s)
    ends = promotion.end + dt.timedelta(seconds=promotion.decide_within_s)
    # Whole minutes: down before, up after.
    ends += dt.timedelta(seconds=-(ends.second + ends.microsecond / 1e6) % 60)
    return {"timezone": promotion.timezone, "start": _cron(begins), "end": _cron(ends)}


def _cron(at: dt.datetime) -> str:
    return f"{at.minute} {at.hour} {at.day} {at.month} *"


def _set(path: str, value: object) -> dict[str, object]:
    # `add` sets what is there as well, and what is not.
    return {"op": "add", "path": path, "value": value}


def write(folder: Path, promotion: Promotion, plan: Plan, source: str) -> Path:
    """Write the component into a folder, made where it is not there; the file. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    path.write_text(component(promotion, plan, source), encoding="utf-8")
    return path
