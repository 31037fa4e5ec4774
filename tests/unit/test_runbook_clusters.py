"""What runbooks say to kubectl fits what is deployed: what they name is there, under that kind and those labels."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.kube.overlay import OVERLAYS, Overlay, build
from tests.runbook import FOLDER, kubectl_lines

PAGES = sorted(FOLDER.glob("*.md"))
KINDS = {
    "deployment": "Deployment", "daemonset": "DaemonSet", "scaledobject": "ScaledObject", "certificate": "Certificate",
    "certificates": "Certificate", "cluster": "Cluster", "podmonitor": "PodMonitor", "secret": "Secret",
}  # fmt: skip
MADE_THERE = {"pods", "hpa", "pvc"}
"""Kinds that the cluster makes from what is deployed."""
VERBS = {"get", "describe", "logs", "annotate", "patch", "delete", "rollout", "apply", "diff"}
OTHERS = {"cert-manager"}
"""Namespaces that are not ours: what is in them cannot be checked here."""


@pytest.fixture(scope="module")
def production() -> Overlay:
    return build(OVERLAYS / "production")


def complaints(line: str, overlay: Overlay) -> Iterator[str]:
    """What is wrong with a command."""
    words = shlex.split(line)
    if words.pop(0) != "kubectl":
        yield "is no kubectl"
        return
    if words[0] == "-n":
        namespace = words[1]
        words = words[2:]
        if namespace in OTHERS:
            return
        if namespace not in {found.data["metadata"]["name"] for found in overlay.objects}:
            yield f"there is no namespace {namespace}"
    verb = words.pop(0)
    if verb not in VERBS:
        yield f"{verb} is no verb that is known here"
    if verb == "rollout":
        words.pop(0)
    there = {(found.data["kind"], found.data["metadata"]["name"]) for found in overlay.objects}
    there |= {
        ("Secret", found.data["spec"]["secretName"]) for found in overlay.objects if found.data["kind"] == "Certificate"
    }
    while words:
        word = words.pop(0)
        if word == "-k":
            if not (OVERLAYS.parents[2] / words.pop(0) / "kustomization.yaml").is_file():
                yield "there is no such overlay"
        elif word == "-l":
            yield from _labels(words.pop(0), overlay)
        elif word in ("-p", "-L", "-o"):
            words.pop(0)
        elif word.startswith("-") or re.fullmatch(r"autoscaling\.keda\.sh/paused-replicas(=\d+|-)", word):
            continue
        else:
            kind, _, name = word.partition("/")
            if not name and kind in KINDS and words and not words[0].startswith("-"):
                name = words.pop(0)
            if kind in MADE_THERE and not name:
                continue
            if kind not in KINDS:
                yield f"{kind} is no kind that is deployed"
            elif name and (KINDS[kind], name) not in there:
                yield f"there is no {kind} {name}"


def _labels(selector: str, overlay: Overlay) -> Iterator[str]:
    key, _, value = selector.partition("=")
    if key == "cnpg.io/cluster":
        if ("Cluster", value) not in {(o.data["kind"], o.data["metadata"]["name"]) for o in overlay.objects}:
            yield f"there is no database cluster {value}"
        return
    templates = [o.data["spec"]["template"] for o in overlay.objects if o.data["kind"] in ("Deployment", "DaemonSet")]
    if not any(template["metadata"]["labels"].get(key) == value for template in templates):
        yield f"no pod has the label {selector}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_said_to_kubectl_names_what_is_deployed(page: Path, production: Overlay) -> None:
    lines = list(kubectl_lines(page))
    wrong = [f"{line}: {found}" for line in lines for found in complaints(line, production)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("kubectl -n loanmesh get pods -l app.kubernetes.io/name=intakes", "no pod has the label"),
        ("kubectl -n loanmesh logs deployment/scorer", "there is no deployment scorer"),
        ("kubectl -n loanmesh get cluster intake", "there is no cluster intake"),
        ("kubectl -n loanmesh explode deployment/scoring", "no verb"),
        ("kubectl -n lonmesh get pods", "no namespace"),
        ("kubectl apply -k deploy/k8s/overlays/promotions", "no such overlay"),
        ("kubectl -n loanmesh get pods -l cnpg.io/cluster=intake", "no database cluster"),
        ("helm upgrade loanmesh", "no kubectl"),
    ],
)
def test_a_planted_mistake_is_noticed(line: str, said: str, production: Overlay) -> None:
    assert any(said in found for found in complaints(line, production))
