"""Prometheus' rules as an object of its operator, written from the files that are tested: `python -m lab.kube.rules`.

kustomize cannot put a file into an object; so the object is kept, and a test says where it is older than the files.
"""

from __future__ import annotations

from pathlib import Path

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
FILES = tuple(DEPLOY / "observability" / "prometheus" / name for name in ("recording.yaml", "alerts.yaml"))
OUT = DEPLOY / "k8s" / "components" / "prometheus" / "rules.yaml"
HEAD = "# Written by `python -m lab.kube.rules` from deploy/observability/prometheus: change that instead.\n"


def text() -> str:
    """The object, as YAML."""
    groups = [group for path in FILES for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]]
    data = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "loanmesh"},
        "spec": {"groups": groups},
    }
    return HEAD + yaml.safe_dump(data, sort_keys=False, width=120, allow_unicode=True)


if __name__ == "__main__":
    OUT.write_text(text(), encoding="utf-8")
